"""A name on the Hub in the place of a folder: taken from the cache, or the command that downloads it. No network."""

import json
import shutil

import peft
import pytest

from moe_precision import PrecisionPlan
from moe_precision.checkpoints import Checkpoint, CheckpointError
from moe_precision.checkpoints.hub import is_hub_name
from moe_precision.cli.main import main
from tests.support.models import build


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of the Hub that holds one model, as `hf download some/model` leaves it."""
    folder = tmp_path / "cache" / "models--some--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0123abcd" * 5)
    build("mixtral").save_pretrained(folder / "snapshots" / ("0123abcd" * 5))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.slow
def test_what_is_in_the_cache_is_taken(cache, tmp_path, capsys):
    assert Checkpoint("some/model").name == "model"
    output = tmp_path / "plan.json"
    how = ["--method", "weight_error", "--group-size", "64", "-o", str(output)]
    assert main(["plan", "some/model", *how]) == 0
    assert PrecisionPlan.load(output).notes["final"] == "model"
    assert main(["estimate", "some/model", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.partition("wrote")[2].partition("\n")[2])["model_type"] == "mixtral"
    assert main(["quantize", "some/model", str(output), str(tmp_path / "packed")]) == 0
    assert Checkpoint(tmp_path / "packed").is_quantized


@pytest.mark.parametrize(
    ("command", "advice"),
    [
        (["plan", "Qwen/Qwen3-30B-A3B"], "give the folder: hf download Qwen/Qwen3-30B-A3B --local-dir Qwen3-30B-A3B"),
        (["plan", "--final", "Qwen/Qwen3-30B-A3B"], "hf download Qwen/Qwen3-30B-A3B --local-dir Qwen3-30B-A3B"),
        (["evaluate", "Qwen/Qwen3-30B-A3B"], "hf download Qwen/Qwen3-30B-A3B --local-dir Qwen3-30B-A3B"),
        (["estimate", "Qwen/Qwen3-30B-A3B"], "hf download Qwen/Qwen3-30B-A3B config.json --local-dir FOLDER"),
    ],
)
def test_what_is_not_says_how_to_download_it(command, advice, cache, capsys):
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert advice in line


def test_paths_are_no_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert is_hub_name("Qwen/Qwen3-30B-A3B")
    for path in ("runs/typo", "model", "./a/b", "a/b/c", "/a/b", "../b", tmp_path):
        assert not is_hub_name(path)


def test_the_lines_for_an_adapter_make_a_checkpoint(tmp_path):
    model = build("mixtral")
    model.save_pretrained(tmp_path / "base")
    base = type(model).from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="holds PEFT adapters, no model: merge first") as error:
        Checkpoint(tmp_path / "adapter")
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    exec("\n".join(["from peft import AutoPeftModelForCausalLM", *(line.strip() for line in lines[1:])]))
    shutil.rmtree(tmp_path / "adapter")
    assert Checkpoint(tmp_path / "adapter-merged").layers()[0].num_experts == 8
