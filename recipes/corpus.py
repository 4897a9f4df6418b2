"""Text for the recipes: Python's own standard library where nothing is downloaded, else files or a `datasets` name.

Everything comes back as a `datasets.DatasetDict` with the splits `train` and `validation`. No file is in both splits.
"""

import ast
import glob
import hashlib
import math
import sysconfig
import textwrap
from collections.abc import Iterable
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset

STDLIB = "python-stdlib"
# Tests and installed packages are not the library; encodings and pydoc_data are generated tables, not code.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
VALIDATION_FRACTION = 0.1


def validation_paths(paths: Iterable[str]) -> set[str]:
    """Choose the tenth of the paths whose hashes are smallest, at least one, as the validation files.

    The choice depends on the paths alone, so it is the same on every machine and in every run.

    Args:
        paths: Paths relative to the corpus root, with `/` as separator.
    """
    ranked = sorted(paths, key=lambda path: hashlib.sha256(path.encode()).hexdigest())
    return set(ranked[: math.ceil(VALIDATION_FRACTION * len(ranked))])


def _split_by_file(texts: dict[str, str]) -> DatasetDict:
    held_out = validation_paths(texts)
    splits = {
        "train": [path for path in texts if path not in held_out],
        "validation": [path for path in texts if path in held_out],
    }
    return DatasetDict(
        {
            split: Dataset.from_dict({"path": paths, "text": [texts[path] for path in paths]})
            for split, paths in splits.items()
        }
    )


def python_stdlib() -> DatasetDict:
    """Read the source of the running Python's standard library, without its tests.

    Returns:
        Splits `train` and `validation` with the columns `path` (relative to the library) and `text`, one row per file,
        about 600 files and 10 million characters.

    Raises:
        FileNotFoundError: This Python ships without its library's source.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = {}
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts[:-1]):
            continue
        try:
            texts[relative.as_posix()] = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a module in another encoding is a test case, not prose or code to learn from
    if len(texts) < 2:
        raise FileNotFoundError(
            f"found {len(texts)} source files of Python's standard library in {root}, expected some hundreds; "
            "this Python was installed without them: give a folder of text files or a `datasets` name instead"
        )
    return _split_by_file(texts)


def _local_files(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    if path.is_file():
        return [path]
    return sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())


def _local_text(pattern: str, files: list[Path]) -> DatasetDict:
    texts = {}
    for file in files:
        try:
            texts[file.as_posix()] = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{file}, found for dataset {pattern!r}, is not UTF-8 text ({error}); leave it out"
            ) from error
    if len(texts) > 1:
        return _split_by_file(texts)
    ((name, text),) = texts.items()
    cut = len(text) - math.ceil(VALIDATION_FRACTION * len(text))
    return DatasetDict(
        train=Dataset.from_dict({"path": [name], "text": [text[:cut]]}),
        validation=Dataset.from_dict({"path": [name], "text": [text[cut:]]}),
    )


def _named_dataset(dataset: str, dataset_config: str | None, columns: dict[str, str]) -> DatasetDict:
    """Load a `datasets` name and rename its columns: `columns` maps a column's name there to its name here."""
    try:
        loaded = load_dataset(dataset, dataset_config)
    except Exception as error:
        raise ValueError(
            f"dataset {dataset!r} is not {STDLIB!r}, no local file, folder or glob matches it, and "
            f"`datasets.load_dataset` could not load it: {type(error).__name__}: {error}"
        ) from error
    if "train" not in loaded:
        raise ValueError(f"dataset {dataset!r} has the splits {list(loaded)}, expected one named 'train'")
    if "validation" not in loaded:
        parts = loaded["train"].train_test_split(test_size=VALIDATION_FRACTION, seed=0)
        loaded = DatasetDict(train=parts["train"], validation=parts["test"])
    present = loaded["train"].column_names
    missing = [column for column in columns if column not in present]
    if missing:
        raise ValueError(f"dataset {dataset!r} has the columns {present}, not {missing}; name its own columns")
    splits = DatasetDict({split: loaded[split] for split in ("train", "validation")})
    return splits.select_columns(list(columns)).rename_columns({old: new for old, new in columns.items() if old != new})


def load_text(dataset: str, dataset_config: str | None = None, text_column: str = "text") -> DatasetDict:
    """Load running text.

    Args:
        dataset: `"python-stdlib"`; or a local file, folder or glob of UTF-8 text, one row per file, split by file (a
            single file by position: its last tenth is the validation split); or a name for `datasets.load_dataset`.
        dataset_config: The configuration's name, for a `datasets` name only.
        text_column: The column that holds the text, for a `datasets` name only.

    Returns:
        Splits `train` and `validation` with the column `text`, and `path` where the text comes from files.

    Raises:
        ValueError: Nothing was found, a file is not UTF-8, or a split or column is missing.
    """
    if dataset == STDLIB:
        return python_stdlib()
    files = _local_files(dataset)
    if files:
        return _local_text(dataset, files)
    if Path(dataset).expanduser().is_dir():
        raise ValueError(f"the folder {dataset!r} holds no file; expected text files")
    return _named_dataset(dataset, dataset_config, {text_column: "text"})


def functions_with_summaries(source: str) -> list[tuple[str, str]]:
    """Cut every documented function out of a Python file, in the order of the file.

    Args:
        source: The text of one Python file.

    Returns:
        Pairs of a function's source, dedented and without its docstring, and the docstring's first line. Functions
        whose body is nothing but the docstring, or shares the docstring's lines, are left out; so is everything
        in a file that does not parse.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    lines = source.splitlines()
    pairs = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        docstring, first, after = ast.get_docstring(node), node.body[0], node.body[1]
        last = first.end_lineno or first.lineno
        if not docstring or first.lineno == node.lineno or after.lineno <= last:
            continue
        kept = lines[node.lineno - 1 : first.lineno - 1] + lines[last : node.end_lineno]
        pairs.append((node.lineno, textwrap.dedent("\n".join(kept)), docstring.strip().splitlines()[0].strip()))
    return [(document, summary) for _, document, summary in sorted(pairs)]


def summarization_pairs(
    dataset: str = STDLIB,
    dataset_config: str | None = None,
    document_column: str = "document",
    summary_column: str = "summary",
) -> DatasetDict:
    """Load documents with their summaries.

    From Python source (the standard library, or local files) a document is a function without its docstring and its
    summary is the docstring's first line; the split is that of `load_text`, by file.

    Args:
        dataset: As for `load_text`.
        dataset_config: The configuration's name, for a `datasets` name only.
        document_column: The column to summarize, for a `datasets` name only.
        summary_column: The column with the summaries, for a `datasets` name only.

    Returns:
        Splits `train` and `validation` with the columns `document` and `summary`.

    Raises:
        ValueError: As for `load_text`; or a split of local files holds no documented function.
    """
    if dataset != STDLIB and not _local_files(dataset):
        return _named_dataset(dataset, dataset_config, {document_column: "document", summary_column: "summary"})
    splits = {}
    for split, rows in load_text(dataset).items():
        pairs = [pair for text in rows["text"] for pair in functions_with_summaries(text)]
        if not pairs:
            raise ValueError(
                f"the {split} split of dataset {dataset!r} ({len(rows)} files) holds no Python function with a "
                "docstring and a body; give more Python files, or a `datasets` name with two columns"
            )
        splits[str(split)] = Dataset.from_dict(
            {"document": [document for document, _ in pairs], "summary": [summary for _, summary in pairs]}
        )
    return DatasetDict(splits)
