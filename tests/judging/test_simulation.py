"""A simulated plan is the packed model: same loss, and the float weights are back afterwards."""

import copy

import pytest
import torch

from moe_precision import AllocationError, allocate, find_moe_layers, quantize_model
from moe_precision.allocation.costs import CostError, expert_costs
from moe_precision.judging.simulation import SimulatedExperts
from moe_precision.recording.collecting import collect_statistics
from moe_precision.recording.second_moments import curvature_of
from moe_precision.recording.statistics import ExpertStatistics, StatisticsError
from tests.support.models import build, logits
from tests.support.optimizers import trained_with

pytestmark = pytest.mark.slow


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "switch_transformers"])
def test_logits_are_those_of_the_packed_model(family):
    model = build(family)
    optimizer = trained_with(torch.optim.AdamW, model)
    layers = find_moe_layers(model)
    curvature = curvature_of(layers, [optimizer])
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with SimulatedExperts(layers, (1, 2, 3), 64, curvature) as simulated:
        for seed in range(2):
            plan = allocate(
                copy.deepcopy(model), method="random", bits=(1, 2, 3), average_bits=2, seed=seed, group_size=64
            )
            simulated.apply({name: layer.projection_bits for name, layer in plan.layers.items()})
            found = logits(model)
            simulated.restore()
            packed = quantize_model(copy.deepcopy(model), plan, curvature=curvature)
            torch.testing.assert_close(found, logits(packed), atol=1e-5, rtol=1e-4)
            simulated.apply({name: layer.projection_bits for name, layer in plan.layers.items()})
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_statistics_round_as_in_the_packed_model(tmp_path):
    model = build("mixtral")
    layers = find_moe_layers(model)
    ids = torch.randint(3, 128, (4, 32), generator=torch.Generator().manual_seed(0))
    statistics = collect_statistics(model, [{"input_ids": ids}])
    plan = allocate(model, method="uniform", average_bits=2, group_size=64)
    with SimulatedExperts(layers, (2,), 64, statistics=statistics) as simulated:
        simulated.apply({name: layer.projection_bits for name, layer in plan.layers.items()})
        found = logits(model)
        simulated.restore()
        costs = simulated.costs((2,), None)
    packed = quantize_model(copy.deepcopy(model), plan, statistics=statistics)
    torch.testing.assert_close(found, logits(packed), atol=1e-5, rtol=1e-4)
    for layer, of_layer in expert_costs(layers, (2,), 64, statistics=statistics).items():
        for name, of_all in of_layer.items():
            torch.testing.assert_close(costs[layer][name], of_all)


def test_a_plan_by_the_fit_that_packs(tmp_path):
    model = build("mixtral")
    curvature = curvature_of(find_moe_layers(model), [trained_with(torch.optim.AdamW, model)])
    ids = torch.randint(3, 128, (4, 32), generator=torch.Generator().manual_seed(0))
    collect_statistics(model, [{"input_ids": ids}]).save(tmp_path / "s.safetensors")
    how = {"method": "curvature", "curvature": curvature, "average_bits": 2, "bits": (1, 2, 3), "group_size": 64}
    plan = allocate(model, statistics=tmp_path / "s.safetensors", **how)
    costs = expert_costs(
        find_moe_layers(model), (1, 2, 3), 64, curvature, ExpertStatistics.load(tmp_path / "s.safetensors")
    )
    name, layer = next(iter(plan.layers.items()))
    torch.testing.assert_close(
        torch.tensor(layer.costs["down_proj"][2]), costs[name]["down_proj"][:, 1].float(), atol=0, rtol=1e-4
    )
    with pytest.raises(AllocationError, match="method 'weight_error' has no use for statistics"):
        allocate(model, method="weight_error", statistics=tmp_path / "s.safetensors", group_size=64)
    with torch.no_grad():
        find_moe_layers(model)[0].router_weight()[0] *= 1.02
    curvature.router_norms = {layer.name: layer.row_norms() for layer in find_moe_layers(model)}
    with pytest.raises(StatisticsError, match="belongs to other weights"):
        allocate(model, statistics=tmp_path / "s.safetensors", **how)


def test_costs_are_those_of_the_allocator():
    model = build("mixtral")
    layers = find_moe_layers(model)
    curvature = curvature_of(layers, [trained_with(torch.optim.AdamW, model)])
    with SimulatedExperts(layers, (2, 3), 64, curvature) as simulated:
        simulated.apply({layers[0].name: {"down_proj": [2] * 8}})
        found = simulated.costs((2, 3), curvature)
    expected = expert_costs(layers, (2, 3), 64, curvature)
    for name in expected:
        for projection in expected[name]:
            torch.testing.assert_close(found[name][projection], expected[name][projection], rtol=1e-6, atol=0)


def test_sensitivity_changes_one_matrix_at_a_time():
    model = build("mixtral")
    layers = find_moe_layers(model)
    before = logits(model)
    with SimulatedExperts(layers, (1, 4), 64) as simulated:
        found = simulated.sensitivity((1, 4), lambda: float((logits(model) - before).norm()))
        simulated.set((layers[1].name, "gate_up_proj", 5), 1)
        alone = float((logits(model) - before).norm())
    assert found[layers[1].name]["gate_up_proj"].shape == (8, 2)
    assert found[layers[1].name]["gate_up_proj"][5, 0].item() == pytest.approx(alone)
    total = [sum(of[:, i].sum() for layer in found.values() for of in layer.values()) for i in range(2)]
    assert total[0] > 3 * total[1] > 0
    assert torch.equal(logits(model), before)


def test_weights_that_cannot_be_put_back_are_an_error():
    class Double(torch.nn.Module):
        def forward(self, weight):
            return 2 * weight

    model = build("mixtral")
    torch.nn.utils.parametrize.register_parametrization(model.model.layers[0].mlp.experts, "down_proj", Double())
    with pytest.raises(CostError, match="sharded or behind an adapter"):
        SimulatedExperts(find_moe_layers(model), (2,), 64)
