"""Every command as a user types it, and user errors as one line with exit status 2."""

import json
import shutil

import pytest
import torch

from moe_precision import PrecisionPlan, RouterNormHistory, allocate
from moe_precision.checkpoints.checkpoint import load_model
from moe_precision.cli.fit import with_packaged_recipes
from moe_precision.cli.main import main
from moe_precision.layers.moe_layers import find_moe_layers
from moe_precision.recipes.text_data import train_tokenizer
from moe_precision.recording.router_norms import router_norms
from tests.support.models import build

TEXT = "".join(f"def function_{i}(argument):\n    return argument + {i * i}\n" for i in range(400))


@pytest.mark.parametrize("arguments", [["demo", "--max-steps", "0"], ["evaluate", "x", "--max-batches", "-1"]])
def test_counts_are_positive(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "expected a whole number of at least 1" in capsys.readouterr().err


@pytest.mark.slow
def test_the_callbacks_help_is_one_option_away(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--trainer.callbacks.help", "RouterNormMonitor"])
    assert stop.value.code == 0
    assert "every_n_steps" in capsys.readouterr().out


@pytest.fixture
def run(tmp_path):
    """A folder as training leaves it: checkpoint with tokenizer, history, plan."""
    tokenizer = train_tokenizer([TEXT], 300)
    model = build("mixtral", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    layers = find_moe_layers(model)
    history = RouterNormHistory.of(layers, "mixtral")
    history.record(0, router_norms(layers))
    with torch.no_grad():  # training, in short
        for layer, scales in zip(layers, torch.linspace(1, 2, 16).split(8), strict=True):
            layer.router_is.read().mul_(scales[:, None])
    history.record(7, router_norms(layers))
    model.save_pretrained(tmp_path / "checkpoint")
    history.measure_variance(layers)
    history.save(tmp_path / "plan.history.safetensors")
    allocate(history=history, group_size=64).save(tmp_path / "plan.json")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


@pytest.mark.parametrize("command", ["fit", "plan", "show", "quantize", "export", "evaluate", "demo"])
def test_help_teaches_by_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert f"example:\n  moe-precision {command} " in out


def test_plan_again_with_other_bits(run, capsys):
    out = run / "again.json"
    arguments = ["--average-bits", "2.25", "--bits", "1", "2", "3", "--group-size", "32", "-o", str(out)]
    assert main(["plan", str(run / "plan.history.safetensors"), *arguments]) == 0
    plan = PrecisionPlan.load(out)
    assert plan.average_bits == 2.25
    assert plan.baseline_step == 0
    assert plan.last_step == 7
    assert sorted(plan.layers["model.layers.0.mlp"].bits) == [1, 1, 2, 2, 3, 3, 3, 3]
    digits = "".join(map(str, plan.layers["model.layers.0.mlp"].bits))
    assert f"    0  2.25  {digits}" in capsys.readouterr().out.splitlines()


def test_plan_from_a_checkpoint_alone(run):
    out = run / "final.json"
    assert main(["plan", str(run / "checkpoint"), "--group-size", "64", "-o", str(out)]) == 0
    assert json.loads(out.read_text())["baseline"] == "none"


def test_show_and_diff(run, capsys):
    assert main(["show", str(run / "plan.json")]) == 0
    assert "model.layers.{}.mlp: 8 experts, one digit per expert\n    0  2.50  33332222" in capsys.readouterr().out
    assert main(["show", str(run / "plan.json"), "--full"]) == 0
    assert "| model.layers.1.mlp | all        | 4 x 3, 4 x 2 " in capsys.readouterr().out
    assert main(["show", str(run / "plan.json"), "--diff", str(run / "plan.json")]) == 0
    assert "same bits" in capsys.readouterr().out
    other = run / "uniform.json"
    source = str(run / "plan.history.safetensors")
    main(["plan", source, "--method", "uniform", "--average-bits", "3", "--group-size", "64", "-o", str(other)])
    capsys.readouterr()
    assert main(["show", str(run / "plan.json"), "--diff", str(other)]) == 0
    assert "model.layers.1.mlp expert 7 down_proj: 2 -> 3 bits" in capsys.readouterr().out


@pytest.mark.slow
def test_quantize_and_evaluate(run, capsys):
    out = run / "packed"
    assert main(["quantize", str(run / "checkpoint"), str(run / "plan.json"), str(out)]) == 0
    printed = capsys.readouterr().out
    assert "2.78" in printed.split("MB, ")[1]  # 2.5 nominal bits, and 18 bits for each group of 64
    model = load_model(out)
    assert model.quantization_method == "moe_precision"
    assert (out / "tokenizer.json").is_file()
    assert main(["evaluate", str(out), "--dataset", str(run / "text.txt"), "--max-batches", "2"]) == 0
    row = capsys.readouterr().out.splitlines()
    assert any(line.startswith("| packed") for line in row)


@pytest.mark.slow
def test_evaluate_against_the_float_checkpoint(run, capsys):
    out, data = run / "packed", ["--dataset", str(run / "text.txt"), "--max-batches", "2"]
    model = load_model(run / "checkpoint")
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # surer of its tokens
    model.save_pretrained(run / "checkpoint")
    assert main(["quantize", str(run / "checkpoint"), str(run / "plan.json"), str(out)]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(out), "--reference", str(run / "checkpoint"), "--card", *data]) == 0
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    head = next(line for line in lines if "model" in line)
    rows = {line[0]: dict(zip(head, line, strict=True)) for line in lines if len(line) == len(head)}
    assert head[-5:] == ["KL to float", "KL, 99 %", "KL, 99.9 %", "top-1", "same experts"]
    assert {rows["checkpoint (reference)"][column] for column in head[-5:]} == {"-"}
    packed = rows["packed"]
    assert 0 < float(packed["KL to float"]) < float(packed["KL, 99 %"]) <= float(packed["KL, 99.9 %"])
    assert 0 < float(packed["same experts"].rstrip("%")) <= 100
    card = (out / "README.md").read_text()
    assert f"{packed['loss']} of this one; KL divergence {packed['KL to float']} nats per token.\n" in card
    assert main(["evaluate", str(run / "checkpoint"), "--card", *data]) == 2
    assert "--card adds to a card that `moe-precision quantize` has written" in capsys.readouterr().err
    assert main(["evaluate", str(run / "checkpoint"), "--reference", str(run / "checkpoint"), *data]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert [cell.strip() for cell in last.split("|")[-6:-1]] == ["0.00000", "0.0000", "0.0000", "100.0%", "100.0%"]


@pytest.mark.slow
def test_evaluate_refuses_a_reference_that_the_model_was_not_made_of(run, capsys):
    checkpoint, data = str(run / "checkpoint"), ["--dataset", str(run / "text.txt")]
    main(["quantize", checkpoint, str(run / "plan.json"), str(run / "packed")])
    build("olmoe", vocab_size=300).save_pretrained(run / "type")
    build("mixtral", vocab_size=301).save_pretrained(run / "size")
    shutil.copytree(run / "checkpoint", run / "tokens")
    train_tokenizer(["A quite different text, where other pairs of bytes are frequent. " * 9], 300).save_pretrained(
        run / "tokens"
    )
    for name, message in {
        "packed": "is quantized; give the float checkpoint",
        "type": "have different model types (mixtral and olmoe): give the float checkpoint that it was made from",
        "size": "and 301): give",
        "tokens": "have different tokenizers: give",
        "nowhere": "no checkpoint folder",
    }.items():
        capsys.readouterr()
        assert main(["evaluate", checkpoint, "--reference", str(run / name), *data]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_in_a_refusal_makes_a_plan_that_is_taken(run, capsys, monkeypatch):
    assert main(["export", str(run / "plan.json"), "--to", "llm-compressor", "--engine", "vllm"]) == 2
    command = capsys.readouterr().err.split("moe-precision plan ")[1].split()
    command = [{"HISTORY": "plan.history.safetensors", "CHECKPOINT": "checkpoint"}.get(word, word) for word in command]
    command[command.index("curvature")] = "weight_error"  # none was recorded
    monkeypatch.chdir(run)
    assert main(["plan", *command]) == 0
    assert main(["export", command[-1], "--to", "llm-compressor", "--engine", "vllm"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "{run}/missing.safetensors"], "no router-norm history"),
        (["plan", "{run}/plan.history.safetensors", "--average-bits", "5"], "outside the levels"),
        (["plan", "{run}/plan.history.safetensors"], "group_size=128 does not divide"),
        (["plan", "{run}/plan.history.safetensors", "-o", "{run}/text.txt/plan.json"], "cannot write"),
        (["plan", "{run}/plan.history.safetensors", "-o", "{run}/plan.json"], "exists; name another file"),
        (["show", "{run}/text.txt"], "not a complete JSON file"),
        (["show", "{run}/checkpoint/model.safetensors"], "not a complete JSON file"),
        (["quantize", "{run}/nowhere", "{run}/plan.json", "{run}/out"], "no checkpoint folder"),
        (["quantize", "{run}/checkpoint", "{run}/nowhere.json", "{run}/out"], "No such file"),
        (["evaluate", "{run}/nowhere"], "no checkpoint folder"),
    ],
)
def test_user_errors(arguments, message, run, capsys):
    if "-o" not in arguments and arguments[0] == "plan":
        arguments = [*arguments, "-o", "{run}/out.json"]
    assert main([argument.format(run=run) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"moe-precision {arguments[0]}: error: ")
    assert message in error
    assert not (run / "out").exists()
    assert not (run / "out.json").exists()


def test_packaged_recipes_are_found_by_their_bare_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("pretrain_mixtral", "pretrain_mixtral.yaml"):
        for arguments in (["--config", name], [f"--config={name}"], ["-c", name]):
            assert with_packaged_recipes(arguments)[-1].endswith("recipes/pretrain_mixtral.yaml")
    with pytest.raises(FileNotFoundError, match=r"not one of the packaged recipes: .*pretrain_mixtral"):
        with_packaged_recipes(["--config", "pretrain_mixtrall"])
    # another path, or a config written out, is never replaced by a recipe
    for value in ("typo/pretrain_mixtral.yaml", "pretrain_mixtral.json", '{"seed_everything": 1}', ""):
        assert with_packaged_recipes(["--config", value]) == ["--config", value]
    (tmp_path / "recover.yaml").write_text("seed_everything: 1")
    assert with_packaged_recipes(["--config", "recover.yaml"]) == ["--config", "recover.yaml"]  # a file comes first


def test_a_plan_must_be_found_again_with_the_files_beside_it(tmp_path, capsys):
    assert main(["plan", "x.history.safetensors", "-o", str(tmp_path / "plan")]) == 2
    assert "expected the path of a plan, which ends in .json" in capsys.readouterr().err
