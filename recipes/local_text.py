"""Text from local files: prose, a document per file, or tables, a document per row. Nothing here is downloaded.

Files are known by their names relative to the folder, so that a split does not depend on how a path is spelled.
"""

import glob
import hashlib
import math
from collections.abc import Iterable
from pathlib import Path

from datasets import Dataset, DatasetDict, concatenate_datasets

VALIDATION_FRACTION = 0.1
# What `datasets` reads as a table; read as prose, keys and quotes would be trained and judged on.
TABLES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")


def validation_paths(paths: Iterable[str]) -> set[str]:
    """Choose the tenth of the paths whose hashes are smallest, at least one, as the validation files.

    The choice depends on the paths alone, so it is the same on every machine and in every run.

    Args:
        paths: Paths relative to the corpus root, with `/` as separator.
    """
    ranked = sorted(paths, key=lambda path: hashlib.sha256(path.encode()).hexdigest())
    return set(ranked[: math.ceil(VALIDATION_FRACTION * len(ranked))])


def split_by_file(rows: Dataset) -> DatasetDict:
    """Split rows into `train` and `validation` by their column `path`; no file is in both."""
    paths = rows["path"]
    held_out = validation_paths(dict.fromkeys(paths))
    return DatasetDict(
        train=rows.select([i for i, path in enumerate(paths) if path not in held_out]),
        validation=rows.select([i for i, path in enumerate(paths) if path in held_out]),
    )


def local_files(pattern: str) -> dict[str, Path]:
    """Find files: name relative to the folder, or to the part of a glob before its first wildcard -> file.

    Args:
        pattern: A file, a folder or a glob. Hidden files of a folder are left out.
    """
    path = Path(pattern).expanduser()
    if path.is_file():
        return {path.name: path}
    if path.is_dir():
        root, files = path, [file for file in path.rglob("*") if not _hidden(file.relative_to(path))]
    else:
        fixed = 0
        while fixed < len(path.parts) and not glob.has_magic(path.parts[fixed]):
            fixed += 1
        root, files = Path(*path.parts[:fixed]), [Path(name) for name in glob.glob(str(path), recursive=True)]
    return {file.relative_to(root).as_posix(): file for file in sorted(files) if file.is_file()}


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def are_tables(pattern: str, files: dict[str, Path]) -> bool:
    """Whether the files are tables, for `datasets` to read.

    Raises:
        ValueError: Some are tables and some are not.
    """
    tables = [name for name, file in files.items() if file.suffix.lower() in TABLES]
    prose = [name for name, file in files.items() if file.suffix.lower() not in TABLES]
    if tables and prose:
        raise ValueError(
            f"{pattern!r} holds tables ({tables[0]}) and files that are read as prose ({prose[0]}); give one kind, as "
            f"a folder or as a glob such as {str(Path(pattern) / '**' / ('*' + Path(tables[0]).suffix))!r}"
        )
    return bool(tables)


def read_rows(pattern: str, files: dict[str, Path], columns: dict[str, str]) -> Dataset:
    """Read all files: a row per file of prose, with the column `text`, or the rows of tables.

    Args:
        pattern: What was asked for, for messages.
        files: As `local_files` found them.
        columns: For tables, a column's name there -> its name here.

    Returns:
        A dataset with the column `path` and `text`, or those of `columns`.

    Raises:
        ValueError: A file of prose is not UTF-8; a table cannot be read, or lacks a column of text.
    """
    if are_tables(pattern, files):
        return concatenate_datasets([_read_table(name, file, columns) for name, file in files.items()])
    texts = {}
    for name, file in files.items():
        try:
            texts[name] = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}, found for {pattern!r}, is not UTF-8 text ({error}); leave it out") from error
    return Dataset.from_dict({"path": list(texts), "text": list(texts.values())})


def _read_table(name: str, file: Path, columns: dict[str, str]) -> Dataset:
    kind = file.suffix.lower()
    try:
        if kind == ".parquet":
            table = Dataset.from_parquet(str(file))
        elif kind in (".csv", ".tsv"):
            table = Dataset.from_csv(str(file), sep="\t" if kind == ".tsv" else ",")
        else:
            table = Dataset.from_json(str(file))
    except Exception as error:  # of pandas, pyarrow or datasets
        cause = error.__cause__ or error
        raise ValueError(
            f"`datasets` could not read {str(file)!r} as a table: {type(cause).__name__}: {cause}"
        ) from error
    missing = [column for column in columns if column not in table.column_names]
    if missing:
        raise ValueError(f"{str(file)!r} has the columns {table.column_names}, not {missing}")
    table = table.select_columns(list(columns)).rename_columns({a: b for a, b in columns.items() if a != b})
    for column in table.column_names:
        wrong = next((i for i, value in enumerate(table[column]) if not isinstance(value, str)), None)
        if wrong is not None:
            raise ValueError(
                f"{str(file)!r}, row {wrong}: expected text in column {column!r}, got {table[wrong][column]!r}"
            )
    return table.add_column("path", [name] * len(table))


def split_local(pattern: str, files: dict[str, Path], columns: dict[str, str]) -> DatasetDict:
    """Read local files and split them: by file; one table by row, one file of prose by position.

    Raises:
        ValueError: As for `read_rows`; or there is one row alone in a table.
    """
    rows = read_rows(pattern, files, columns)
    if len(files) > 1:
        return split_by_file(rows)
    if are_tables(pattern, files):
        if len(rows) < 2:
            raise ValueError(f"{pattern!r} has {len(rows)} rows, which cannot be split; expected at least 2")
        parts = rows.train_test_split(test_size=VALIDATION_FRACTION, seed=0)
        return DatasetDict(train=parts["train"], validation=parts["test"])
    name, text = rows["path"][0], rows["text"][0]
    cut = len(text) - math.ceil(VALIDATION_FRACTION * len(text))
    return DatasetDict(
        train=Dataset.from_dict({"path": [name], "text": [text[:cut]]}),
        validation=Dataset.from_dict({"path": [name], "text": [text[cut:]]}),
    )


def whole(pattern: str, columns: dict[str, str]) -> Dataset:
    """Read held-out files, all of them.

    Raises:
        ValueError: As for `read_rows`; or no file was found.
    """
    files = local_files(pattern)
    if not files:
        raise ValueError(f"--heldout {pattern!r}: no local file, folder or glob with a file")
    return read_rows(pattern, files, columns)


def check_apart(dataset: str, heldout: str) -> None:
    """Check that no held-out file is also training text.

    Raises:
        ValueError: A file is in both.
    """
    training = {file.resolve() for file in local_files(dataset).values()}
    both = [name for name, file in local_files(heldout).items() if file.resolve() in training]
    if both:
        raise ValueError(
            f"--heldout {heldout!r} and --dataset {dataset!r} share {len(both)} files, the first is {both[0]!r}: a "
            "model would be judged on text that costs are measured on; keep them apart"
        )
