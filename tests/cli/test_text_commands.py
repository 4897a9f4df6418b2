"""Which text a command judges on: the whole held-out text, with the model's own tokenizer, named in the table."""

import json
import shutil

import pytest

from moe_precision import allocate
from moe_precision.cli.main import main
from moe_precision.recipes.text_data import load_tokenizer, train_tokenizer


@pytest.fixture
def held(model_with_text, tmp_path):
    """A folder of held-out text, and how many tokens are predicted on it."""
    (tmp_path / "held").mkdir()
    tokens = 0
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    for i in range(12):
        text = f"def held_out_{i}():\n    return {i}\n" * 5
        (tmp_path / "held" / f"{i}.txt").write_text(text)
        tokens += len(tokenizer(text)["input_ids"]) + 1
    blocks = -(-tokens // 256)
    return tmp_path / "held", tokens, tokens - blocks


def tables(out: str) -> tuple[str, list[list[str]]]:
    lines = out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    title = " ".join(line.strip() for line in lines if not line.startswith("|"))
    return title, rows


def test_evaluate_takes_heldout_text_whole_and_names_it(held, tmp_path, capsys):
    folder, tokens, predicted = held
    assert main(["evaluate", str(tmp_path / "model"), "--heldout", str(folder)]) == 0
    title, rows = tables(capsys.readouterr().out)
    assert f"all of {folder}: 12 documents, {tokens:,} tokens" in title
    assert "by the counts of the same text" in title
    assert rows[-1][5] == str(predicted)


def test_evaluate_says_that_it_fell_back_on_the_standard_library(held, tmp_path, capsys, monkeypatch):
    from moe_precision.recipes import corpus

    few = corpus.load_text(str(tmp_path / "held"))
    monkeypatch.setattr(corpus, "python_stdlib", lambda: few)
    assert main(["evaluate", str(tmp_path / "model")]) == 0
    title, _ = tables(capsys.readouterr().out)
    assert "the held-out tenth of python-stdlib (the source of Python's standard library): 2 documents, " in title
    assert "by the counts of python-stdlib, training part" in title


@pytest.mark.slow
def test_compare_names_its_text_and_calibrates_on_no_heldout_text(held, tmp_path, capsys):
    folder, tokens, predicted = held
    command = ["compare", str(tmp_path / "model"), "--heldout", str(folder), "--group-size", "64"]
    command += ["--methods", "norm_only", "uniform", "-o", str(tmp_path / "x.json")]
    assert main(command) == 2
    assert "give --dataset too, or --calibration-batches 0" in capsys.readouterr().err
    assert main([*command, "--calibration-batches", "0"]) == 0
    title, _ = tables(capsys.readouterr().out)
    assert f"{predicted} tokens of" in title
    assert f"all of {folder}: 12 documents, {tokens:,} tokens" in title
    assert json.loads((tmp_path / "x.json").read_text())["text"].startswith(f"on all of {folder}")


def test_a_checkpoint_without_tokenizer_needs_one_by_name(held, tmp_path, capsys):
    folder, tokens, _ = held
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tmp_path / "model" / name, bare)
    for command in ("evaluate", "compare"):
        assert main([command, str(bare), "--heldout", str(folder)]) == 2
        assert "--tokenizer FOLDER or NAME" in capsys.readouterr().err
    assert main(["evaluate", str(bare), "--heldout", str(folder), "--tokenizer", str(tmp_path / "model")]) == 0
    assert f"{tokens:,} tokens" in tables(capsys.readouterr().out)[0]


@pytest.mark.slow
def test_a_table_is_read_by_its_column(held, tmp_path, capsys):
    folder, tokens, _ = held
    rows = [json.dumps({"body": file.read_text(), "label": "no text"}) for file in folder.iterdir()]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    command = ["evaluate", str(tmp_path / "model"), "--heldout", str(tmp_path / "rows.jsonl")]
    assert main(command) == 2
    assert "has the columns ['body', 'label'], not ['text']" in capsys.readouterr().err
    assert main([*command, "--text-column", "body"]) == 0
    assert f"12 documents, {tokens:,} tokens" in tables(capsys.readouterr().out)[0]


def test_auto_round_refuses_what_it_would_write_without_a_tokenizer(held, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("moe_precision.export.auto_round_backend.find_spec", lambda name: True)
    plan = allocate(tmp_path / "model", method="uniform", average_bits=2, group_size=64)
    plan.save(tmp_path / "plan.json")
    for file in (tmp_path / "model").glob("token*"):
        file.unlink()
    command = ["quantize", str(tmp_path / "model"), str(tmp_path / "plan.json"), str(tmp_path / "out")]
    assert main([*command, "--backend", "auto-round", "--iterations", "0"]) == 2
    assert "no tokenizer could be loaded" in capsys.readouterr().err


def test_the_tokenizer_of_another_model_is_refused(held, tmp_path, capsys):
    text = " ".join(f"word{i}" for i in range(2000))
    train_tokenizer([text], 2000).save_pretrained(tmp_path / "large")
    (tmp_path / "words.txt").write_text(text)
    command = ["evaluate", str(tmp_path / "model"), "--tokenizer", str(tmp_path / "large")]
    assert main([*command, "--heldout", str(tmp_path / "words.txt")]) == 2
    assert "it is another model's" in capsys.readouterr().err
