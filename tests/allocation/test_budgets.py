"""Budgets in stored bits and in GiB, bad arguments, and the parts of the paper's rule on their own."""

import pytest
import torch

from moe_precision import AllocationError, RouterNormHistory, allocate, find_moe_layers
from moe_precision.recording.router_norms import router_norms


@pytest.mark.parametrize("method", ["router_norm", "load", "weight_error"])
def test_budgets_in_stored_bits_and_in_gib(method, mixtral):
    layers = find_moe_layers(mixtral)
    history = RouterNormHistory.of(layers, "mixtral")
    history.record(0, router_norms(layers))
    history.add_load({layer.name: torch.rand(2, 8) for layer in layers})
    how = {"method": method, "bits": (2, 3), "group_size": 64}
    by_bits = allocate(mixtral, history, average_bits=2.5, **how)
    assert allocate(mixtral, history, **how, stored_bits=2.5 + 18 / 64).diff(by_bits) == []
    weights = 2 * 8 * 3 * 64 * 128
    plan = allocate(mixtral, history, **how, expert_gib=2.78125 * weights / 8 / 2**30)
    assert plan.diff(by_bits) == []
    assert plan.to_dict()["settings"]["expert_gib"] == 2.78125 * weights / 8 / 2**30
    with pytest.raises(AllocationError, match=r"1.0 GiB for 393216 expert weights: stored_bits=.* outside"):
        allocate(mixtral, history, **how, expert_gib=1.0)
    with pytest.raises(AllocationError, match="are 2 budgets"):
        allocate(mixtral, history, **how, expert_gib=1.0, stored_bits=3.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "sensitivity"}, "moe-precision compare` takes them"),
        ({"method": "curvature"}, "needs curvature"),
        ({"granularity": "layer"}, "needs what each width costs, and 'auto' has only 'router_norm' here"),
        (
            {"granularity": "layer", "method": "random"},
            "orders the experts of a layer.*needs a method that knows costs",
        ),
        ({"stored_bits": 3.0, "bits": (2, 16)}, "a method that knows costs"),
        ({"stored_bits": 9.0}, "outside what the levels"),
        ({"method": "weight_error", "granularity": "expert+layer"}, "unknown granularity"),
        ({"method": "weight_error", "average_bits": 5.0}, "outside the levels"),
    ],
)
def test_bad_arguments(settings, message, mixtral):
    with pytest.raises(AllocationError, match=message):
        allocate(mixtral, group_size=64, **settings)
    with pytest.raises(AllocationError, match="give the model or its checkpoint"):
        allocate(history="x.safetensors", method="weight_error")


def test_ablations_of_the_papers_rule(mixtral):
    layers = find_moe_layers(mixtral)
    with torch.no_grad():
        for layer in layers:
            layer.router_weight().mul_(torch.linspace(2, 1, 8).unsqueeze(1))
            bank = layer.container().gate_up_proj
            bank[3, :128] *= 10  # the largest variance by far
    norms = layers[0].router_weight().norm(dim=1)
    plan = allocate(mixtral, method="final_norm", group_size=64).layers[layers[0].name]
    assert plan.order == [3, *[e for e in norms.argsort().tolist() if e != 3]]
    plan = allocate(mixtral, method="norm_only", group_size=64).layers[layers[0].name]
    assert plan.order == norms.argsort().tolist()
    assert allocate(mixtral, method="max_variance", group_size=64).layers[layers[0].name].order[0] == 3
