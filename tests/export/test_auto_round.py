"""AutoRound as a backend, where it is not installed: what is refused before it starts, and what a failure leaves.

`make test-exports` runs it.
"""

import sys

import pytest
import torch

from moe_precision import PlanError, allocate
from moe_precision.checkpoints.headers import CheckpointError
from moe_precision.cli.main import main
from moe_precision.export import auto_round_backend as auto_round
from moe_precision.export.auto_round_backend import AutoRoundError, quantize_with_auto_round
from tests.support.models import build

BLOCKS = [torch.arange(8), torch.arange(8)]


@pytest.fixture
def float_model(tmp_path):
    model = build("mixtral")
    model.save_pretrained(tmp_path / "float")
    plan = allocate(model, method="uniform", average_bits=4, bits=(4,), group_size=32)
    plan.save(tmp_path / "plan.json")
    return tmp_path / "float", plan


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(auto_round, "find_spec", lambda name: object())


def test_it_has_to_be_installed(float_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(auto_round, "find_spec", lambda name: None)
    command = ["quantize", str(float_model[0]), str(tmp_path / "plan.json"), str(tmp_path / "out")]
    assert main([*command, "--backend", "auto-round", "--iterations", "0"]) == 2
    assert "pip install 'moe-precision[auto-round]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_options_of_the_other_backend(float_model, tmp_path, capsys):
    command = ["quantize", str(float_model[0]), str(tmp_path / "plan.json"), str(tmp_path / "out")]
    assert main([*command, "--backend", "auto-round", "--non-expert-bits", "8"]) == 2
    assert "--non-expert-bits cannot be used with --backend auto-round" in capsys.readouterr().err


@pytest.mark.slow
def test_bad_input_is_refused_before_any_work(float_model, tmp_path, installed, monkeypatch):
    monkeypatch.setattr(auto_round.subprocess, "run", lambda *_, **__: pytest.fail("started"))
    checkpoint, plan = float_model
    with pytest.raises(ValueError, match="iterations=200, but no blocks"):
        quantize_with_auto_round(checkpoint, plan, tmp_path / "out")
    with pytest.raises(ValueError, match="iterations=-1: expected 0"):
        quantize_with_auto_round(checkpoint, plan, tmp_path / "out", BLOCKS, iterations=-1)
    for out, message in ((checkpoint, "is, or lies in, the float"), (checkpoint.parent, "would be replaced")):
        with pytest.raises(CheckpointError, match=message):
            quantize_with_auto_round(checkpoint, plan, out, BLOCKS)
    with pytest.raises(ValueError, match="several lengths"):
        quantize_with_auto_round(checkpoint, plan, tmp_path / "out", [torch.arange(8), torch.arange(9)])
    of_another = allocate(build("qwen3_moe"), method="uniform", average_bits=4, bits=(4,), group_size=32)
    with pytest.raises(PlanError, match="the plan is for"):
        quantize_with_auto_round(checkpoint, of_another, tmp_path / "out", BLOCKS)
    main(["quantize", str(checkpoint), str(tmp_path / "plan.json"), str(tmp_path / "packed")])
    with pytest.raises(CheckpointError, match="quantized already"):
        quantize_with_auto_round(tmp_path / "packed", plan, tmp_path / "out", BLOCKS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("sys.exit(3)", "ended with status 3"),
        ("shutil.copytree(source, out, dirs_exist_ok=True)", "is a float checkpoint"),
        ("pass", "wrote no checkpoint"),
    ],
)
def test_a_failure_leaves_what_was_there(script, message, float_model, tmp_path, installed, monkeypatch):
    checkpoint, plan = float_model
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("before")
    run = auto_round.subprocess.run

    def instead(command, **options):
        source, out = command[3:5]
        return run([sys.executable, "-c", f"import shutil, sys; {source=}; {out=}; {script}"], **options)

    monkeypatch.setattr(auto_round.subprocess, "run", instead)
    with pytest.raises((AutoRoundError, CheckpointError), match=message):
        quantize_with_auto_round(checkpoint, plan, tmp_path / "out", BLOCKS)
    assert (tmp_path / "out" / "config.json").read_text() == "before"
    assert {path.name for path in tmp_path.iterdir()} == {"float", "out", "plan.json"}
