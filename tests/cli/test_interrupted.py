"""Ctrl-C in `quantize`: one line that says what is kept, and a next run that says that it goes on."""

import os
import re
import signal
import sys
import time

import pytest

from moe_precision.cli.main import main
from moe_precision.quantize.writer.packer import Packer
from tests.support.checkpoints import contents, save_float
from tests.support.processes import start


def quantize(arguments, finished):
    """The command, which says when two files are packed and then waits for a signal."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where tests run with signals ignored
    write = Packer.write

    def write_and_wait(self, shard, *rest):
        write(self, shard, *rest)
        with open(finished, "a") as file:
            print(shard.file, file=file)
        if len(finished.read_text().split()) > 1:
            time.sleep(60)

    Packer.write = write_and_wait
    sys.exit(main(arguments))


@pytest.mark.slow
def test_control_c_keeps_what_is_packed(tmp_path, capsys):
    _, plan, source, out = save_float(tmp_path)
    plan.save(tmp_path / "plan.json")
    arguments = ["quantize", str(source), str(tmp_path / "plan.json"), str(out), "--max-shard-size", "1KB"]
    names, log = tmp_path / "finished.txt", tmp_path / "log.txt"
    process = start(quantize, arguments, names, log=log)
    while not names.exists() or names.read_text().count("\n") < 2:
        assert process.is_alive(), log.read_text()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 130
    said = log.read_text()
    assert "Traceback" not in said
    (partial,) = tmp_path.glob(".out.*.partial")
    line = re.compile(r"moe-precision quantize: interrupted; 2 packed files are kept in '(.*)', and the same command ")
    assert line.search(said)[1] == str(partial)
    assert main(arguments) == 0
    assert "goes on: 2 of 7 files were packed by an earlier run" in capsys.readouterr().err
    assert not partial.exists()
    main([*arguments[:3], str(tmp_path / "whole"), *arguments[4:]])
    assert "goes on" not in capsys.readouterr().err
    assert contents(out) == contents(tmp_path / "whole")


def quantize_with_workers(arguments):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main([*arguments, "--workers", "2"]))


@pytest.mark.thorough
@pytest.mark.parametrize("seconds", [2, 12])  # while workers start, while they work
def test_control_c_with_workers(seconds, tmp_path):
    _, plan, source, out = save_float(tmp_path)
    plan.save(tmp_path / "plan.json")
    arguments = ["quantize", str(source), str(tmp_path / "plan.json"), str(out), "--max-shard-size", "1KB"]
    process = start(quantize_with_workers, arguments, log=(log := tmp_path / "log.txt"))
    time.sleep(seconds)
    if process.is_alive():
        os.kill(process.pid, signal.SIGINT)
        process.join(30)
        assert process.exitcode == 130
    assert "Traceback" not in log.read_text()
    assert main(arguments) == 0


def test_other_commands_end_as_quietly(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("moe_precision.plans.plan.PrecisionPlan.load", interrupted)
    assert main(["show", "plan.json"]) == 130
    assert capsys.readouterr().err == "moe-precision show: interrupted\n"
