"""Documentation that can be run or resolved: the plan format's example is a valid plan, links lead somewhere."""

import json
import re
from pathlib import Path

import pytest
import torch

from moe_precision import PrecisionPlan
from tests.support.models import build

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


def test_the_loop_without_a_trainer_runs(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "recording.md").read_text(encoding="utf-8")
    loop = re.search(r"<!-- tests/test_docs.py runs this -->\n```python\n(.*?)```", page, re.DOTALL)
    assert loop is not None
    monkeypatch.chdir(tmp_path)
    model = build("mixtral")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(0))

    def train_step(model):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    exec(loop[1], {"model": model, "train_step": train_step})
    plan = PrecisionPlan.load("precision_plan.json")
    plan.check(model)
    assert plan.baseline_step == 0
    assert any(any(layer.signals["router_norm_change"]) for layer in plan.layers.values())
