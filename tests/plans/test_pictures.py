"""Pictures of a run and its plan."""

from matplotlib.colors import to_rgba

from moe_precision import RouterNormHistory, allocate, find_moe_layers
from moe_precision.present.figures import plot_router_norms
from moe_precision.recording.router_norms import router_norms
from tests.support.models import build


def test_every_width_has_a_color_of_its_own():
    """Experts whose matrices have different widths have more mean widths than matplotlib has colors."""
    model = build("mixtral", num_local_experts=16)
    layers = find_moe_layers(model)
    history = RouterNormHistory.of(layers, "mixtral")
    for step in (0, 1):
        history.record(step, router_norms(layers))
    plan = allocate(model, method="uniform", average_bits=2, group_size=64)
    for down_proj, different in (([2] * 16, 8), ([1] * 8 + [8] * 8, 16)):
        plan = plan.with_bits({layers[0].name: {"gate_up_proj": [*range(1, 9)] * 2, "down_proj": down_proj}})
        colors = [to_rgba(curve.get_color()) for curve in plot_router_norms(history, plan).axes[0].get_lines()]
        means = plan.layers[layers[0].name].mean_bits
        assert len(set(means)) == len(set(colors)) == len(set(zip(means, colors, strict=True))) == different
