"""The notebook in docs: executed as a whole, commands parsed, outputs those of its code; all of it runs again."""

import json
import re
import shlex

import pytest

from moe_precision.cli.main import main, parser
from tests.support.markdown import ROOT, anchors, links

PATH = ROOT / "docs" / "first-hour.ipynb"
CELLS = json.loads(PATH.read_text(encoding="utf-8"))["cells"]
CODE = [("".join(cell["source"]), cell) for cell in CELLS if cell["cell_type"] == "code"]
AGAIN = "`make notebook` executes it again"
FEWER = {"max_steps=200": "max_steps=12", "statistics_batches=32": "statistics_batches=4"}  # for a quick run


def command(source: str) -> list[str] | None:
    """The arguments of a cell that is one ``!moe-precision`` command."""
    if not source.startswith("!"):
        return None
    words = shlex.split(source[1:].replace("\\\n", " "))
    assert words[0] == "moe-precision"
    return words[1:]


def printed(cell) -> str:
    return "".join("".join(output.get("text", "")) for output in cell["outputs"])


def headers(text: str) -> list[str]:
    """The head of every table in a text: names of columns, no figures."""
    return [re.sub(r"\s+", " ", line) for line in re.findall(r"^\|.*\|(?=\n\|--)", text, re.M)]


def test_it_was_executed_as_a_whole():
    counts = [cell["execution_count"] for _, cell in CODE]
    assert counts == list(range(1, len(CODE) + 1)), AGAIN
    kinds = {output["output_type"] for _, cell in CODE for output in cell["outputs"]}
    assert kinds <= {"stream", "execute_result"}, f"an error: {AGAIN}"
    assert PATH.stat().st_size < 200_000
    assert not re.search(r"/(?:tmp|root|home|Users)/", PATH.read_text(encoding="utf-8"))


def test_links_lead_somewhere():
    text = "\n\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
    for target in links(text):
        name, _, anchor = target.partition("#")
        page = (PATH.parent / name).read_text(encoding="utf-8")
        assert not anchor or anchor in anchors(page), target


@pytest.mark.parametrize("arguments", [a for source, _ in CODE if (a := command(source))], ids=" ".join)
def test_commands_are_parsed(arguments):
    parser(arguments[:1]).parse_args(arguments)


@pytest.mark.thorough
def test_all_of_it_runs_and_prints_the_same_tables(tmp_path, monkeypatch, capsys):
    """With fewer steps; only the figures may differ from what is stored."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    names: dict = {"__name__": "notebook"}
    for source, cell in CODE:
        if "IPython" in source:
            continue
        capsys.readouterr()
        if (arguments := command(source)) is not None:
            if arguments[0] == "report":
                pytest.importorskip("plotly")
            if arguments[0] == "compare":
                arguments += ["--methods", "router_norm", "--granularity", "expert", "--max-batches", "1"]
            assert main(arguments) == 0, source
        else:
            for all_of_it, part in FEWER.items():
                source = source.replace(all_of_it, part)
            exec(compile(source, "first-hour.ipynb", "exec"), names)
        assert headers(printed(cell)) == headers(capsys.readouterr().out) or "pytorch_lightning" in source, AGAIN
