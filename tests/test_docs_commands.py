"""Every ``moe-precision`` command in the README and docs is one that the real parsers take.

A command in a block is parsed whole. A command in a sentence may leave things out: its name and options are looked up
in its help. Nothing is run.
"""

import argparse
import re
import shlex

import pytest
from pytorch_lightning.cli import LightningCLI

from moe_precision.cli.main import main
from tests.support.markdown import PAGES, ROOT, blocks, inline_code


class Parsed(BaseException):
    """The arguments were taken; nothing that `main` catches."""


@pytest.fixture
def only_parsed(monkeypatch):
    """`main` and LightningCLI stop where their work would begin."""
    for parser, method in ((argparse.ArgumentParser, "parse_args"), (LightningCLI, "parse_arguments")):
        parse = getattr(parser, method)

        def parse_and_stop(*args, _parse=parse, **kwargs):
            _parse(*args, **kwargs)
            raise Parsed

        monkeypatch.setattr(parser, method, parse_and_stop)
    monkeypatch.setattr("sys.argv", ["pytest"])  # LightningCLI warns where there are arguments other than its own
    monkeypatch.chdir(ROOT)  # `--config recipes/...`


def commands(page):
    """Arguments of each command in a page's blocks, without what comes before (torchrun, srun) and after (> file)."""
    found = []
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language in ("", "sh", "bash", "console") and not block.comment.startswith("not run:"):
            for line in block.code.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                for name in ("moe-precision", "moe_precision"):
                    if name in words:
                        words = words[words.index(name) + 1 :]
                        found.append(words[: next((i for i, w in enumerate(words) if w[0] in ">|&;"), None)])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [a for page in PAGES for a in commands(page)], ids=" ".join)
def test_commands_in_blocks_are_parsed(arguments, only_parsed):
    with pytest.raises(Parsed):
        main(arguments)


@pytest.mark.slow
def test_a_wrong_command_is_seen(only_parsed, capsys):
    for wrong in ("plan x --average-bit two", "plant x", "fit --trainer.max_step_s 1"):
        with pytest.raises(SystemExit):
            main(wrong.split())
    capsys.readouterr()
    assert main(["fit", "--config", "none"]) == 2
    assert "'none': no such file" in capsys.readouterr().err


def test_commands_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```\nsrun moe-precision plan x \\\n  -o y > z  # why\n```\n")
    assert commands(page) == [["plan", "x", "-o", "y"]]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_sentences_exist(page, capsys):
    for code in inline_code(page.read_text(encoding="utf-8")):
        if not code.startswith("moe-precision ") or code.startswith("moe-precision COMMAND"):
            continue
        words = code.replace("\\|", "|").split()[1:]
        names = [word for word in words if re.fullmatch(r"[a-z]+", word)] if "|" in words else words[:1]
        for name in names:
            with pytest.raises(SystemExit) as stopped:
                main([name, "--help"])
            assert stopped.value.code == 0, code
            text = capsys.readouterr().out
            if name != "fit":  # its options are LightningCLI's
                options = {word.split("=")[0] for word in words if word.startswith("--")}
                assert options <= set(re.findall(r"--[a-z-]+", text)), code
