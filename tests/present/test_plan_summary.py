"""A plan on one screen: what its lines say, by hand, and that they fit 80 columns."""

from dataclasses import replace

import pytest

from moe_precision import PrecisionPlan
from moe_precision.layers.shape import LayerShape
from moe_precision.plans.layer_plan import LayerPlan
from moe_precision.plans.settings import PlanSettings
from moe_precision.present.plan_summary import bits_map, plan_document, plan_lines, priced_share, share_by_bits

SHAPES = {"up": (64, 32), "down": (32, 64)}


def plan(layers, notes=None, method="curvature", name="model.layers.{}.mlp"):
    """A plan of layers given as ``(bits of up, bits of down)``."""
    of = {
        name.format(index): LayerPlan(LayerShape("r", len(up), SHAPES), {"up": up, "down": down})
        for index, (up, down) in enumerate(layers)
    }
    return PrecisionPlan(
        "mixtral", of, 32, method, PlanSettings(group_size=32, method=method), notes=notes or {}, baseline_step=0
    )


def test_a_digit_for_each_expert():
    same = [1, 2, 3, 16]
    assert bits_map(plan([(same, same)]))[0] == "model.layers.{}.mlp: 4 experts, one digit per expert"
    assert bits_map(plan([(same, same), ([2, 2, 2, 2], [2, 2, 2, 4])])) == [
        "model.layers.{}.mlp: 4 experts, one digit per expert, the mean of its matrices",
        "    0  5.50  123f",
        "    1  2.25  2223",
        "f: left as it is, at 16 bits",
    ]


def test_many_experts_share_a_digit():
    many = [1] * 64 + [3] * 64 + [2, 2, 2, 4] + [4] * 124
    lines = bits_map(plan([(many, many)]))
    assert lines[0].endswith("256 experts, one digit for 4 experts")
    assert lines[1].split()[-1] == "1" * 16 + "3" * 16 + "3" + "4" * 31  # (2 + 2 + 2 + 4) / 4 = 2.5


def test_a_large_plan_is_a_screen_of_80_columns():
    large = plan([([2] * 256, [3] * 256)] * 58, {"auto": "there is curvature, and there are no expert statistics"})
    lines = plan_lines(large)
    assert len(lines) < 68
    assert max(map(len, lines)) <= 80


def test_what_was_priced_by_measurement():
    known = plan([([1, 2], [2, 2])])
    layer = known.layers["model.layers.0.mlp"]
    costs = {"up": {1: [0.5, 0.0], 2: [0.1, 0.0]}, "down": {1: [0.5, 0.2], 2: [0.1, 0.1]}}
    statistics = {"text": "my text", "tokens": {"model.layers.0.mlp": [5, 40, 1200]}}
    notes = {"calibration_tokens": 4096, "left_over": 0.0213, "statistics": statistics}
    priced = replace(known, layers={"model.layers.0.mlp": replace(layer, costs=costs)}, notes=notes)
    assert priced_share(priced) == 0.75  # the second expert's up has no gradient
    assert priced_share(known) == 0
    assert share_by_bits(priced) == {1: 0.25, 2: 0.75}
    text = " ".join(" ".join(plan_lines(priced)).split())
    assert "priced by measurement: 75.0% of the expert weights, calibrated on 4,096 tokens" in text
    assert "5 tokens for the least seen expert, 40 in the middle, 1,200 for the most seen, from my text" in text
    assert "0.021 bits per weight left unused" in text
    assert "weights by bits: 25.0% at 1, 75.0% at 2" in text
    document = plan_document(priced)
    assert (document["priced_share"], document["left_over"]) == (0.75, 0.0213)
    assert document["bits"] == {"model.layers.0.mlp": {"up": [1, 2], "down": [2, 2]}}


@pytest.mark.parametrize("notes", [{}, {"read_from": "folder", "group_sizes": [128, 64]}])
def test_a_plan_without_costs_claims_no_prices(notes):
    text = " ".join(plan_lines(plan([([2, 2], [2, 2])], notes, method="router_norm")))
    assert "priced" not in text
    assert ("groups: 128 and 64" in text) == bool(notes)
