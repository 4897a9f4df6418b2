"""0 bits: what may be asked for, what a plan may do, and how its file says it."""

import json

import pytest

from moe_precision import AllocationError, PlanSettings, PrecisionPlan
from moe_precision.callbacks import RouterNormMonitor
from moe_precision.layers.shape import LayerShape
from moe_precision.plans import document
from moe_precision.plans.layer_plan import LayerPlan
from moe_precision.plans.widths import PlanError
from moe_precision.present.plan_summary import dropped_text, plan_lines


def plan_of(up, down, top_k=2, **more):
    shape = LayerShape("router", len(up), {"up": (64, 32), "down": (32, 64)}, top_k=top_k)
    layer = LayerPlan(shape, {"up": list(up), "down": list(down)}, **more)
    return PrecisionPlan("mixtral", {"0": layer}, 32, "statistics")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"method": "router_norm", "average_bits": 1},
            "method 'router_norm' cannot tell what that costs: expected stat",
        ),
        ({"method": "curvature", "average_bits": 1}, "method 'curvature' cannot tell what that costs"),
        ({"method": "random", "average_bits": 1}, "method 'random' cannot tell"),
        ({"granularity": "layer"}, "granularity='layer' cannot express"),
        ({"bits": (0,), "average_bits": 0}, "would drop all experts"),
        ({"max_dropped": 1.0}, "max_dropped=1.0: expected a share"),
        ({"min_tokens": -1}, "min_tokens=-1: expected a number of tokens"),
        ({"average_bits": 5}, "outside the levels"),
    ],
)
def test_what_cannot_be_asked(given, message):
    with pytest.raises(AllocationError, match=message):
        PlanSettings(**{"bits": (0, 1, 2), **given})


def test_a_uniform_plan_of_nothing():
    with pytest.raises(AllocationError, match="average_bits=0 is not a width"):
        PlanSettings(method="uniform", average_bits=0)


def test_a_callback_that_collects_no_statistics():
    with pytest.raises(ValueError, match="0 among the levels needs expert statistics"):
        RouterNormMonitor(bits=(0, 1, 2), average_bits=1, statistics_batches=0)


def test_auto_drops_by_statistics_alone():
    settings = PlanSettings(bits=(0, 1, 2), average_bits=1)
    assert settings.resolved("statistics").method == "statistics"
    with pytest.raises(AllocationError, match="'auto' has only 'curvature' here"):
        settings.resolved("curvature")


def test_sizes():
    plan = plan_of([0, 2, 4, 2], [0, 2, 2, 2])
    assert plan.drops
    assert plan.layers["0"].dropped == [0]
    assert plan.average_bits == (0 + 2 + 3 + 2) / 4
    assert plan.stored_bits == pytest.approx((0 + 2 + 3 + 2 + 3 * 18 / 32) / 4)  # nothing is stored of expert 0


def test_the_file_has_a_version_that_older_readers_refuse(tmp_path):
    plan = plan_of([0, 2, 4, 2], [0, 2, 2, 2])
    plan.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    assert (data["format_version"], data["layers"]["0"]["top_k"]) == (3, 2)
    again = PrecisionPlan.load(tmp_path / "plan.json")
    assert (again.layers, again.layers["0"].shape.top_k) == (plan.layers, 2)
    data["format_version"] = 2
    with pytest.raises(PlanError, match="states format_version 2, but 0 bits, which drop an expert, make it 3"):
        PrecisionPlan.from_dict(data)
    assert plan_of([2, 2], [2, 2]).to_dict()["format_version"] == document.FORMAT_VERSION == 2


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ({"up": [2, 2, 0, 2]}, r"expert [23] has bits {'up': [02], 'down': [02]}; 0 drops an expert: give 0 to all of"),
        ([0, 0, 0, 2], "3 of 4 experts are dropped and 1 are left, but 2 serve each token: keep at least 2"),
        ([0, 0, 0, 0], "4 of 4 experts are dropped"),
    ],
)
def test_a_plan_edited_by_hand(bits, message):
    plan = plan_of([2] * 4, [2] * 4)
    with pytest.raises(PlanError, match=message):
        plan.with_bits({"0": bits})
    data = plan.with_bits({"0": [2, 2, 0, 0]}).to_dict()
    for name, widths in (bits if isinstance(bits, dict) else {"up": bits, "down": bits}).items():
        data["layers"]["0"]["projections"][name]["bits"] = widths
    with pytest.raises(PlanError, match=message):
        PrecisionPlan.from_dict(data)


def test_show_says_what_dropped_experts_had():
    signals = {"tokens": [10.0, 30, 40, 20], "expert_load": [5.0, 45, 45, 5], "routing_weight": [1.0, 40, 40, 19]}
    plan = plan_of([0, 2, 2, 2], [0, 2, 2, 2], signals=signals)
    text = "1 of 4 experts dropped, which had 5.0% of the tokens and 1.0% of the routing weight"
    assert dropped_text(plan) == text
    assert text in " ".join(" ".join(plan_lines(plan)).split())
    seen = plan_of([0, 2, 2, 2], [0, 2, 2, 2], signals={"tokens": signals["tokens"]})
    assert dropped_text(seen) == "1 of 4 experts dropped, which had 10.0% of the tokens"
    nothing = plan_of([0, 2, 2, 2], [0, 2, 2, 2], signals={"tokens": [0.0] * 4})
    assert dropped_text(nothing) == "1 of 4 experts dropped"
