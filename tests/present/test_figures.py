"""Pictures of plans: curves in the order of bits, whatever shares a width."""

import pytest
import torch

from moe_precision import RouterNormHistory, allocate, find_moe_layers
from moe_precision.layers.shape import LayerShape
from moe_precision.present.figures import plot_change_heatmap, plot_router_norms
from moe_precision.recording.router_norms import router_norms
from tests.support.models import build


def test_curves_of_a_plan_by_projection():
    """gate_up_proj is 2 x 128 x 64 weights of an expert, down_proj 64 x 128: two thirds and one third."""
    model = build("mixtral")
    layers = find_moe_layers(model)
    history = RouterNormHistory.of(layers, "mixtral")
    history.record(0, router_norms(layers))
    history.record(5, router_norms(layers) + torch.arange(16.0))
    plan = allocate(model, method="uniform", average_bits=2, group_size=64)
    layer = plan.layers["model.layers.0.mlp"]
    layer.projection_bits["gate_up_proj"] = [2, 2, 4, 4, 2, 2, 2, 1]
    layer.projection_bits["down_proj"] = [2, 3, 4, 1, 2, 2, 2, 1]
    assert [round(bits, 4) for bits in layer.mean_bits] == [2, 2.3333, 4, 3, 2, 2, 2, 1]
    first, second = plot_router_norms(history, plan).axes
    assert [text.get_text() for text in first.get_legend().get_texts()] == [
        "1 bits",
        "2 bits",
        "2.33 bits",
        "3 bits",
        "4 bits",
    ]
    assert [text.get_text() for text in second.get_legend().get_texts()] == ["2 bits"]
    colors = [line.get_color() for line in first.lines]
    assert colors[0] == colors[4] != colors[1]
    assert [line.get_ydata()[-1] for line in first.lines] == history.norms["model.layers.0.mlp"][-1].tolist()


@pytest.mark.parametrize("experts", [2, 8, 64])
def test_the_heatmap_counts_in_whole_numbers(experts):
    history = RouterNormHistory({"layer": LayerShape("gate", experts, {"up": (8, 8)})})
    history.record(0, torch.zeros(experts))
    history.record(1, torch.ones(experts))
    axis = plot_change_heatmap(history).axes[0]
    ticks = [*axis.get_xticks(), *axis.get_yticks()]
    assert ticks
    assert all(tick == int(tick) for tick in ticks)


def test_curves_without_a_plan():
    model = build("mixtral")
    layers = find_moe_layers(model)
    history = RouterNormHistory.of(layers, "mixtral")
    history.record(0, router_norms(layers))
    assert all(axis.get_legend() is None for axis in plot_router_norms(history).axes)
