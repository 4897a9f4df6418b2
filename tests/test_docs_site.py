"""The site: quoted messages occur in the source, the API page is complete, the navigation names all pages."""

import ast
import re
from itertools import chain

import pytest
import yaml

import moe_precision
from moe_precision import callbacks
from tests.support.markdown import ROOT

DOCS = ROOT / "docs"


def texts(source: str) -> list[str]:
    """Every text in a source, with ``…`` for what an f-string fills in."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def test_values_of_a_text_are_left_out():
    assert "got …, expected b" in texts('f"got {a!r}, " "expected b"')


def quoted() -> list[str]:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"`([^`]*…[^`]*)`", page) + re.findall(r"^### `([^`…]*)`$", page, re.M)


@pytest.mark.slow
def test_quoted_messages_occur_in_the_source():
    folders = (ROOT / name for name in ("moe_precision", "callbacks", "recipes"))
    source = list(chain(*(texts(path.read_text(encoding="utf-8")) for at in folders for path in at.rglob("*.py"))))
    messages = [message for message in quoted() if message != "…"]
    assert len(messages) > 30
    assert not [message for message in messages if not any(message.strip("… ") in text for text in source)]


@pytest.mark.slow
def test_the_page_of_all_messages_has_each_in_one_section():
    hooks: dict = {"__file__": str(DOCS / "message_list.py")}
    exec((DOCS / "message_list.py").read_text(encoding="utf-8"), hooks)
    source = 'raise A(f"got {a!r}, " "expected b")\nraise B("x" + y) from e\nraise C\nraise D(f"{a}: {b}")\n'
    assert hooks["messages"](source + 'raise E("got it" + y)') == ["got …, expected b", "got it…"]
    page = (DOCS / "messages.md").read_text(encoding="utf-8")
    parts = [part for section in hooks["sections"](page) for part in section]
    assert hooks["part_of"]("a/b/c.py", ["a", "a/b", "a/bc"]) == "a/b"
    assert not [file for file in hooks["by_file"]() if not hooks["part_of"](file, parts)]
    assert not [part for part in parts if not (ROOT / part).exists()]
    filled = hooks["filled"](page)
    assert filled.count("\n- ") > 400
    assert "<!--" not in filled


def test_the_api_page_has_every_public_name_once():
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    public = {f"moe_precision.{name}" for name in moe_precision.__all__ if name != "__version__"}
    public |= {f"moe_precision.callbacks.{name}" for name in callbacks.__all__}
    assert sorted(re.findall(r"^::: ([\w.]+)$", page, re.M)) == sorted(public)


class Config(yaml.SafeLoader):
    """Reads mkdocs.yml without carrying out what its tags name."""


Config.add_multi_constructor("", lambda loader, suffix, node: None)


def pages(nav) -> list[str]:
    """The files in a navigation, at any depth."""
    if isinstance(nav, str):
        return [nav]
    return list(chain(*(pages(entry) for entry in (nav.values() if isinstance(nav, dict) else nav))))


def test_the_navigation_names_every_page_once():
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Config)
    assert sorted(pages(config["nav"])) == sorted(path.name for path in (*DOCS.glob("*.md"), *DOCS.glob("*.ipynb")))


@pytest.mark.parametrize(
    ("address", "expected"),
    [("https://host/x/blob/main/", "[a](https://host/x/blob/main/README.md#b), ![p](q.png)"), ("", "a, ![p](q.png)")],
)
def test_links_that_leave_the_docs_lead_to_the_repository_or_are_text(address, expected):
    for module in ("griffe", "tomllib"):  # of the extra `docs`, and of Python 3.11
        pytest.importorskip(module)
    hooks: dict = {}
    exec((DOCS / "site_hooks.py").read_text(encoding="utf-8"), hooks)
    assert hooks["rewritten"]("[a](../README.md#b), ![p](q.png)", "page.md", address) == expected
    assert hooks["linked"]('<a href="x.md#y"> <a href="x-z.md">') == '<a href="../x/#y"> <a href="../x-z/">'
