"""Costs from second moments of the inputs, and what ``method="auto"`` stands for."""

import pytest
import torch

from moe_precision import AllocationError, PlanSettings, allocate, collect_statistics, find_moe_layers
from moe_precision.allocation.costs import curvature_cost, expert_costs, statistics_cost
from moe_precision.present.tables import as_text, plan_table
from moe_precision.quantize.codec.guided import fit_of
from moe_precision.quantize.kernels import scaled
from moe_precision.recording.history import RouterNormHistory
from moe_precision.recording.second_moments import curvature_of
from tests.support.models import build
from tests.support.optimizers import trained_with

LAYER = "model.layers.0.mlp"


@pytest.fixture
def known():
    """A model, its curvature and its statistics."""
    model = build("mixtral")
    curvature = curvature_of(find_moe_layers(model), [trained_with(torch.optim.AdamW, model)])
    return model, curvature, collect_statistics(model, [{"input_ids": torch.arange(3, 128)[None]}])


def test_cost_by_hand():
    weight = torch.zeros(2, 2)
    quantized = torch.tensor([[1.0, -1.0], [2.0, 0.0]])
    rows, columns = torch.tensor([1.0, 3.0]), torch.tensor([1.0, 3.0])  # of one matrix of squared gradients, mean 2
    moment = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    # H has trace 2, the columns sum to 4: H' = [[2, 1], [1, 2]]. Row 0: 2 - 2 + 2 = 2, weight 1 / 2. Row 1: 8, 3 / 2.
    assert float(statistics_cost(weight, quantized, rows, columns, moment)) == pytest.approx(0.5 * (1 + 12))
    assert float(statistics_cost(weight, quantized, rows, columns, 7 * moment)) == pytest.approx(6.5)
    assert float(statistics_cost(weight, quantized, torch.zeros(2), torch.zeros(2), moment)) == 0


def test_a_diagonal_moment_gives_the_cost_of_curvature():
    torch.manual_seed(0)
    weight, quantized = torch.randn(2, 8, 16)
    rows, columns = torch.rand(8), torch.rand(16)
    columns *= rows.mean() / columns.mean()
    by_statistics = statistics_cost(weight, quantized, rows, columns, 3 * columns.diag())
    torch.testing.assert_close(by_statistics, curvature_cost(weight, quantized, rows, columns))


@pytest.mark.slow
def test_costs_of_a_model(known):
    model, curvature, statistics = known
    layers = find_moe_layers(model)
    costs = expert_costs(layers, (2, 16), 64, curvature, statistics, together=True)
    weight = model.get_parameter(f"{LAYER}.experts.down_proj")[3].detach()
    error = scaled(*fit_of(LAYER, "down_proj", [3], curvature, statistics)(weight[None], 2, 64))[0] - weight
    weights = curvature.fit_weights(LAYER, "down_proj", 3)
    moment = statistics.fit_moment(LAYER, "down_proj", 3, weights)
    rows, columns = (one[LAYER]["down_proj"][3] for one in (curvature.rows, curvature.columns))
    by_row = torch.stack([row @ moment @ row for row in error])
    expected = 0.5 * (rows / rows.mean() * by_row).sum() * columns.sum() / moment.trace()
    assert costs[LAYER]["down_proj"][3].tolist() == pytest.approx([float(expected), 0.0], rel=1e-4)


@pytest.mark.slow
def test_an_expert_without_tokens_is_priced_by_curvature(known):
    model, curvature, statistics = known
    statistics.tokens[LAYER][3] = 0
    layers = find_moe_layers(model)
    together = expert_costs(layers, (2,), 64, curvature, statistics, together=True)[LAYER]["down_proj"]
    alone = expert_costs(layers, (2,), 64, curvature, statistics)[LAYER]["down_proj"]
    assert torch.equal(together[3], alone[3])
    assert not torch.equal(together[2], alone[2])


@pytest.mark.slow
def test_the_plan_says_what_auto_stands_for(known, tmp_path):
    model, curvature, statistics = known
    history = RouterNormHistory.of(find_moe_layers(model), "mixtral")
    history.record(0, torch.ones(16))
    history.record(1, torch.arange(16.0) + 1)
    given = {"group_size": 64, "average_bits": 2.25}
    both = allocate(model, history, curvature=curvature, statistics=statistics, **given)
    assert (both.method, both.granularity) == ("statistics", "expert+projection")
    assert both.settings.levels == (1, 2, 3, 4)
    assert both.notes["auto"] == "there are curvature and expert statistics"
    explicit = allocate(model, history, curvature=curvature, statistics=statistics, method="statistics", **given)
    assert {name: layer.projection_bits for name, layer in both.layers.items()} == {
        name: layer.projection_bits for name, layer in explicit.layers.items()
    }
    assert "auto" not in explicit.notes
    assert allocate(model, history, curvature=curvature, **given).method == "curvature"
    for options in ({"model": model, "statistics": statistics}, {"curvature": curvature}):
        paper = allocate(**options, history=history, **given)
        assert (paper.method, paper.granularity, paper.settings.levels) == ("router_norm", "expert", (2, 3))
        assert paper.notes["auto"].startswith("without ")
    note = both.notes["statistics"]
    assert note == {
        "text": "",
        "tokens": {name: of.sort().values[[0, 3, 7]].tolist() for name, of in statistics.tokens.items()},
    }
    assert ", ".join(f"{n:,}" for n in note["tokens"][LAYER]) in as_text(plan_table(both))
    assert "statistics" not in allocate(model, history, curvature=curvature, **given).notes
    both.save(tmp_path / "plan.json")
    assert type(both).load(tmp_path / "plan.json").notes == both.notes


@pytest.mark.parametrize(
    ("asked", "levels"),
    [
        ({}, (2, 3)),
        ({"average_bits": 2}, (2, 3)),
        ({"average_bits": 1.5}, (1, 2)),
        ({"average_bits": 4}, (3, 4)),
        ({"average_bits": 3, "bits": (2, 4)}, (2, 4)),
        ({"average_bits": 3, "bits": (2, 3, 4)}, (2, 3, 4)),
        ({"average_bits": 3, "bits": (2, 3, 8)}, (3, 8)),
        ({"stored_bits": 2.25}, (2, 3)),
    ],
)
def test_levels_that_the_papers_rule_takes(asked, levels):
    settings = PlanSettings(**asked)
    paper = settings.resolved("router_norm")
    assert (paper.levels, paper.granularity, paper.method) == (levels, "expert", "router_norm")
    assert settings.resolved("statistics").levels == settings.levels
    assert paper.resolved("statistics") is paper


def test_what_cannot_be_planned():
    model = build("mixtral")
    with pytest.raises(AllocationError, match=r"average_bits=5 is outside the levels \[1, 2, 3, 4\]"):
        allocate(model, average_bits=5)
    curvature = curvature_of(find_moe_layers(model), [trained_with(torch.optim.AdamW, model)])
    with pytest.raises(AllocationError, match="'statistics' needs expert statistics, which RouterNormMonitor writes"):
        allocate(model, method="statistics", curvature=curvature, group_size=64)
