"""--json and --quiet mean the same for every command that prints a table."""

import json

import pytest

from moe_precision.cli.main import main, parser
from tests.cli.test_cli import run  # noqa: F401  the folder that training leaves

COMMANDS = ["show", "plan", "evaluate", "compare", "estimate", "doctor", "quantize"]


def arguments(command, folder):
    text = ["--dataset", str(folder / "text.txt"), "--max-batches", "1"]
    model, plan = str(folder / "checkpoint"), str(folder / "plan.json")
    history = str(folder / "plan.history.safetensors")
    return {
        "show": ["show", plan],
        "plan": ["plan", history, "--group-size", "64", "-o", str(folder / "new.json")],
        "evaluate": ["evaluate", model, *text],
        "compare": [
            *("compare", model, history, *text, "--group-size", "64", "--methods", "router_norm"),
            *("--random-draws", "1", "--calibration-batches", "0", "--granularity", "expert"),
        ],
        "estimate": ["estimate", model, "--average-bits", "2", "--total-gib", "0.001"],
        "doctor": ["doctor"],
        "quantize": ["quantize", model, plan, str(folder / "packed")],
    }[command]


KEYS = {
    "show": {"average_bits", "bits", "priced_share"},
    "plan": {"average_bits", "wrote"},
    "evaluate": {"text", "models"},
    "compare": {"rows", "verdict"},
    "estimate": {"rows", "fits", "quantizing_gib"},
    "doctor": {"works", "checks", "extras"},
    "quantize": {"out", "bytes_after", "stored_bits"},
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_one_json_object_and_nothing_else(command, run, capsys):  # noqa: F811
    assert main([*arguments(command, run), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document.keys() >= KEYS[command]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["show", "estimate", "quantize"])
def test_quiet_prints_nothing(command, run, capsys):  # noqa: F811
    assert main([*arguments(command, run), "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["show", "nothing.json", "--quiet"]) == 2
    assert "error" in capsys.readouterr().err


def test_the_commands_that_have_them(capsys):
    found = []
    for command, choice in parser()._subparsers._group_actions[0].choices.items():
        if any("--json" in action.option_strings for action in choice._actions):
            found.append(command)
    assert set(found) == set(COMMANDS)
    with pytest.raises(SystemExit):
        main(["show", "plan.json", "--json", "--quiet"])
