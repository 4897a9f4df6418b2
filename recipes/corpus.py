"""Text for the recipes: Python's own standard library where nothing is downloaded, else files or a `datasets` name.

Everything comes back as a `datasets.DatasetDict` with the splits `train` and `validation`. No file is in both splits.
"""

import ast
import sysconfig
import textwrap
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset

from moe_precision.recipes.local_text import (
    VALIDATION_FRACTION,
    check_apart,
    local_files,
    split_by_file,
    split_local,
    whole,
)

STDLIB = "python-stdlib"
# Tests and installed packages are not the library; encodings and pydoc_data are generated tables, not code.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}


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
    return split_by_file(Dataset.from_dict({"path": list(texts), "text": list(texts.values())}))


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


def held_out_name(dataset: str | None, dataset_config: str | None = None, heldout: str | None = None) -> str:
    """Name the text that a model is judged on, for the tables."""
    if heldout is not None:
        return f"all of {heldout}"
    if dataset == STDLIB:
        return f"the held-out tenth of {STDLIB} (the source of Python's standard library)"
    part = "tenth" if dataset is not None and local_files(dataset) else "part"
    return f"the held-out {part} of " + " ".join(name for name in (dataset, dataset_config) if name)


def load_text(
    dataset: str | None,
    dataset_config: str | None = None,
    text_column: str = "text",
    heldout: str | None = None,
) -> DatasetDict:
    """Load running text.

    Args:
        dataset: `"python-stdlib"`; or local files: a file, folder or glob of UTF-8 text, one row per file, or of
            tables (.json, .jsonl, .csv, .tsv, .parquet), which `datasets` reads; split by file (one file of text by
            position: its last tenth is the validation split; one table by row); or a name for
            `datasets.load_dataset`. None for held-out text alone.
        dataset_config: The configuration's name, for a `datasets` name only.
        text_column: The column that holds the text, for tables and `datasets` names.
        heldout: Local files that are the validation split, all of them, instead of a part of `dataset`.

    Returns:
        Splits `train` (unless `dataset` is None) and `validation` with the column `text`, and `path` where the text
        comes from files.

    Raises:
        ValueError: Nothing was found, a file is not UTF-8, a split or column is missing, or held-out files are among
            those of `dataset`.
    """
    return _load(dataset, dataset_config, {text_column: "text"}, heldout)


def _load(dataset: str | None, dataset_config: str | None, columns: dict[str, str], heldout: str | None) -> DatasetDict:
    if heldout is None:
        if dataset is None:
            raise ValueError("got neither a dataset nor held-out text; give one")
        return _split(dataset, dataset_config, columns)
    if dataset is not None:
        check_apart(dataset, heldout)
    held_out = whole(heldout, columns)
    if dataset is None:
        return DatasetDict(validation=held_out)
    return DatasetDict(train=_split(dataset, dataset_config, columns)["train"], validation=held_out)


def _split(dataset: str, dataset_config: str | None, columns: dict[str, str]) -> DatasetDict:
    if dataset == STDLIB:
        return python_stdlib()
    files = local_files(dataset)
    if files:
        return split_local(dataset, files, columns)
    if Path(dataset).expanduser().is_dir():
        raise ValueError(f"the folder {dataset!r} holds no file; expected text files")
    return _named_dataset(dataset, dataset_config, columns)


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
    dataset: str | None = STDLIB,
    dataset_config: str | None = None,
    document_column: str = "document",
    summary_column: str = "summary",
    heldout: str | None = None,
) -> DatasetDict:
    """Load documents with their summaries.

    From Python source (the standard library, or local files) a document is a function without its docstring and its
    summary is the docstring's first line; the split is that of `load_text`, by file. Tables and `datasets` names have
    both in columns.

    Args:
        dataset: As for `load_text`.
        dataset_config: The configuration's name, for a `datasets` name only.
        document_column: The column to summarize, for tables and `datasets` names.
        summary_column: The column with the summaries, likewise.
        heldout: As for `load_text`.

    Returns:
        Splits `train` (unless `dataset` is None) and `validation` with the columns `document` and `summary`.

    Raises:
        ValueError: As for `load_text`; or a split of local files holds no documented function.
    """
    loaded = _load(dataset, dataset_config, {document_column: "document", summary_column: "summary"}, heldout)
    splits = {}
    for split, rows in loaded.items():
        if "document" in rows.column_names:
            splits[str(split)] = rows
            continue
        pairs = [pair for text in rows["text"] for pair in functions_with_summaries(text)]
        if not pairs:
            named = held_out_name(dataset, dataset_config, heldout) if split == "validation" else repr(dataset)
            raise ValueError(
                f"{named}: its {split} split ({len(rows)} files) holds no Python function with a docstring and a body; "
                "give more Python files, or a table or a `datasets` name with two columns"
            )
        splits[str(split)] = Dataset.from_dict(
            {"document": [document for document, _ in pairs], "summary": [summary for _, summary in pairs]}
        )
    return DatasetDict(splits)
