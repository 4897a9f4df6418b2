"""Text from local files: splits do not depend on a path's spelling, held-out text is whole, tables are no prose."""

import json
from pathlib import Path

import pytest
from datasets import Dataset

from moe_precision.recipes import SummarizationDataModule, TextDataModule
from moe_precision.recipes.corpus import load_text, summarization_pairs
from moe_precision.recipes.local_text import local_files
from moe_precision.recipes.text_data import train_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty texts in two folders."""
    for i in range(20):
        file = tmp_path / "text" / "ab"[i % 2] / f"{i}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"text {i} and some more words\n")
    return tmp_path / "text"


def test_a_split_does_not_depend_on_how_the_path_is_spelled(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder.parent)
    spellings = ["text", "./text/", str(folder), f"{folder}/a/..", "text/**/*.txt", f"{folder}/**/*.txt"]
    splits = [load_text(spelling)["validation"]["text"] for spelling in spellings]
    assert len(splits[0]) == 2  # a tenth of 20
    assert all(split == splits[0] for split in splits)


def test_hidden_files_of_a_folder_are_no_text(folder: Path):
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.txt").write_text("x")
    (folder / "a" / ".DS_Store").write_bytes(b"\xff\xff")
    assert len(local_files(str(folder))) == 20


def test_heldout_text_is_taken_whole(folder: Path, tmp_path: Path):
    text = load_text(None, heldout=str(folder))
    assert list(text) == ["validation"]
    assert len(text["validation"]) == 20
    (tmp_path / "one.txt").write_text("0123456789")
    text = load_text(str(folder), heldout=str(tmp_path / "one.txt"))
    assert text["validation"]["text"] == ["0123456789"]
    assert text["train"]["text"] == load_text(str(folder))["train"]["text"]
    with pytest.raises(ValueError, match=r"share 10 files, the first is '\d+.txt'"):
        load_text(str(folder), heldout=str(folder / "a"))
    with pytest.raises(ValueError, match="--heldout 'nowhere': no local file"):
        load_text(str(folder), heldout="nowhere")
    with pytest.raises(ValueError, match="neither a dataset nor held-out text"):
        load_text(None)


def write_table(file: Path, rows: dict[str, list]) -> None:
    if file.suffix == ".parquet":
        Dataset.from_dict(rows).to_parquet(str(file))
    elif file.suffix in (".csv", ".tsv"):
        Dataset.from_dict(rows).to_csv(str(file), sep="\t" if file.suffix == ".tsv" else ",")
    else:
        whole = [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]
        file.write_text(json.dumps(whole) if file.suffix == ".json" else "\n".join(map(json.dumps, whole)))


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".tsv", ".parquet"])
def test_tables_are_not_read_as_prose(suffix: str, tmp_path: Path):
    words = [f'row {i}, with a "quote"' for i in range(20)]
    file = tmp_path / f"table{suffix}"
    write_table(file, {"id": list(range(20)), "text": words, "other": words[::-1]})
    assert load_text(None, heldout=str(file))["validation"]["text"] == words
    parts = load_text(str(file))
    assert (len(parts["train"]), len(parts["validation"])) == (18, 2)
    assert sorted([*parts["train"]["text"], *parts["validation"]["text"]]) == sorted(words)
    assert load_text(None, text_column="other", heldout=str(file))["validation"]["text"] == words[::-1]
    pairs = summarization_pairs(None, None, "text", "other", heldout=str(file))["validation"]
    assert (pairs["document"], pairs["summary"]) == (words, words[::-1])
    with pytest.raises(ValueError, match=r"has the columns \['id', 'text', 'other'\], not \['body'\]"):
        load_text(str(file), text_column="body")
    with pytest.raises(ValueError, match="row 0: expected text in column 'text', got 0"):
        load_text(str(file), text_column="id")


def test_tables_that_cannot_be_used_say_why(folder: Path, tmp_path: Path):
    (folder / "rows.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match=r"holds tables \(rows.jsonl\) and files that are read as prose \(a/0.txt\)"):
        load_text(str(folder))
    with pytest.raises(ValueError, match="has 1 rows, which cannot be split"):
        load_text(str(folder / "rows.jsonl"))
    (tmp_path / "broken.jsonl").write_text('{"text": ')
    with pytest.raises(ValueError, match=r"could not read '.*broken.jsonl' as a table"):
        load_text(str(tmp_path / "broken.jsonl"))


def test_several_tables_are_split_by_file(tmp_path: Path):
    for i in range(3):
        write_table(tmp_path / f"{i}.jsonl", {"text": [f"{i} {row}" for row in range(4)]})
    parts = load_text(str(tmp_path))
    assert (len(parts["train"]), len(parts["validation"])) == (8, 4)
    assert len({text[0] for text in parts["validation"]["text"]}) == 1


def test_modules_say_what_they_judge_on(folder: Path, tmp_path: Path):
    tokenizer = train_tokenizer(["text and some more words"], 300)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = TextDataModule(None, tokenizer=str(tmp_path / "tokenizer"), heldout=str(folder))
    data.setup("validate")
    tokens = sum(len(tokenizer(file.read_text())["input_ids"]) + 1 for file in folder.rglob("*.txt"))
    assert data.judged_on == f"all of {folder}: 20 documents, {tokens} tokens"
    assert int(data.token_counts.sum()) == tokens  # counted there, where there is no other text
    with pytest.raises(ValueError, match="no training text beside the held-out text"):
        data.train_dataloader()
    data = TextDataModule(str(folder), tokenizer=str(tmp_path / "tokenizer"))
    data.setup("validate")
    assert data.judged_on.startswith(f"the held-out tenth of {folder}: 2 documents, ")
    with pytest.raises(ValueError, match="give a dataset, or a tokenizer"):
        TextDataModule(None, heldout=str(folder)).setup()


def test_summaries_of_heldout_functions(tmp_path: Path):
    function = 'def add_{i}(a, b):\n    """Add {i}."""\n    return a + b + {i}\n\n'
    for name in ("train", "held"):
        (tmp_path / name).mkdir()
        for i in range(4):
            (tmp_path / name / f"{i}.py").write_text(function.format(i=i))
    data = SummarizationDataModule(str(tmp_path / "train"), heldout=str(tmp_path / "held"), vocab_size=400)
    data.setup()
    assert data.judged_on.startswith(f"all of {tmp_path / 'held'}: 4 documents, ")
    assert len(data.val_dataloader().dataset) == 4
