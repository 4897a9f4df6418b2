"""Documentation that can be resolved: the plan format's example is a valid plan, links lead somewhere."""

import json
import re

import pytest

from moe_precision import PrecisionPlan
from tests.support.markdown import PAGES, ROOT, anchors, blocks, inline_code, links


def test_the_format_pages_example_is_a_valid_plan():
    page = (ROOT / "docs" / "plan-format.md").read_text(encoding="utf-8")
    (example,) = (block for block in blocks(page) if block.language == "json")
    plan = PrecisionPlan.from_dict(json.loads(example.code))
    assert plan.layers["model.layers.0.mlp"].bits == [2, 3, 3, 2]
    assert plan.to_dict() == json.loads(example.code)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """The file is there, and so is the heading after ``#``."""
    lost = []
    for target in links(page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            lost.append(target)
    assert not lost


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_make_and_modules_exist(page):
    text = page.read_text(encoding="utf-8")
    code = "\n".join([block.code for block in blocks(text) if block.language in ("", "sh", "bash")] + inline_code(text))
    targets = set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"\bmake ([a-z][\w-]*)", code)) <= targets
    for module in re.findall(r"python -m ((?:benchmarks|tests)[\w.]*)", code):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


def test_headings_are_named_as_github_names_them():
    page = "# A `code_name`, and: [a link](x.md)\n## Twice\n```\n# not a heading\n```\n## Twice\n## 2.25 bits --now\n"
    assert anchors(page) == {"a-code_name-and-a-link", "twice", "twice-1", "225-bits---now"}
