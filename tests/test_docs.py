"""Documentation that can be run or resolved: the plan format's example is a valid plan, links lead somewhere."""

import json
import re
from pathlib import Path

import pytest

from moe_precision import PrecisionPlan

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_format_pages_example_is_a_valid_plan():
    page = (ROOT / "docs" / "plan-format.md").read_text(encoding="utf-8")
    example = re.search(r"```json\n(.*?)```", page, re.DOTALL)
    assert example is not None
    plan = PrecisionPlan.from_dict(json.loads(example[1]))
    assert plan.layers["model.layers.0.mlp"].bits == [2, 3, 3, 2]
    assert plan.to_dict() == json.loads(example[1])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target
