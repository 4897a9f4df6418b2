"""``fit`` as a user types it: help that lists recipes and options, wrong arguments in one line."""

import sys
from types import SimpleNamespace

import pytest

from moe_precision.cli import lightning_cli
from moe_precision.cli.main import main
from moe_precision.plans.widths import PlanError

RECIPE = ["fit", "--config", "pretrain_mixtral"]


@pytest.mark.slow
def test_help_lists_recipes_and_options(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert (
        "  pretrain_mixtral: Pretrain a small Mixtral on Python's standard library and write its precision plan\n"
        in out
    )
    assert "  finetune_causal: Fine-tune a causal mixture of experts from its checkpoint, and write" in out
    assert "  recover: Recover what quantizing costs\n" in out
    assert "--trainer.max_steps" in out
    assert "--train {all,routers}" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.sequence_lenght", "3"], "moe_precision.recipes.TextDataModule has no option 'sequence_lenght'"),
        (["--trainer.max_stepz", "3"], "unrecognized arguments: --trainer.max_stepz 3"),
        (
            ["--trainer.max_steps", "many"],
            "Parser key \"trainer.max_steps\": Expected a <class 'int'>. Got value: many",
        ),
        (["--model.checkpoin", "x"], "moe_precision.recipes.CausalLM has no option 'checkpoin'"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["pytest"])  # LightningCLI warns where there are arguments other than its own
    with pytest.raises(SystemExit) as stop:
        main([*RECIPE, *arguments])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"moe-precision fit: error: {message}; `moe-precision fit --help` lists the options"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plan", "none.json"], "--plan 'none.json': no such file"),
        (["--trainer.accelerator", "gpux"], "You selected an invalid accelerator name: `accelerator='gpux'`"),
        (["--trainer.callbacks.average_bits", "9"], "average_bits=9.0 is outside the levels [1, 2, 3, 4]"),
        (["--model.checkpoint", "x"], "and checkpoint='x', expected exactly one: a config for a new model, or"),
    ],
)
def test_a_value_that_is_refused_is_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["pytest"])
    if "average_bits" in arguments[0]:
        arguments = ["--trainer.callbacks=moe_precision.callbacks.RouterNormMonitor", *arguments]
    assert main([*RECIPE, "--trainer.logger=false", *arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith("moe-precision fit: error: ")
    assert message in line


def test_an_unknown_recipe_is_one_line(capsys):
    assert main(["fit", "--config", "pretrain_mixtrall"]) == 2
    assert capsys.readouterr().err.startswith(
        "moe-precision fit: error: --config 'pretrain_mixtrall': no such file, and"
    )


def test_the_error_of_a_run_comes_after_what_wandb_prints(monkeypatch):
    """Its run is finished before the error leaves `fit`, not when the process ends. A stand-in: a real one is slow."""
    finished = []
    wandb = SimpleNamespace(run=object(), finish=lambda exit_code: finished.append(exit_code))

    def failing(**_):
        raise PlanError("group_size=96 does not divide the input width")

    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(lightning_cli, "FitCLI", failing)
    with pytest.raises(PlanError, match="group_size=96"):
        main(RECIPE)
    assert finished == [1]


@pytest.mark.slow
def test_a_refused_value_gives_its_own_reason_and_no_list_of_types(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["pytest"])
    assert main([*RECIPE, "--trainer.logger=false", "--model.checkpoint", "x"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("moe-precision fit: error: got config={'model_type': 'mixtral'")
    assert line.endswith("(in YAML, set the other to null)")
