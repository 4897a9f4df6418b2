"""The plan file: what it holds, and a clear error for each way in which it can be wrong."""

import json

import jsonschema
import numpy as np
import pytest

from moe_precision import AllocationError, PlanError, PrecisionPlan, allocate
from moe_precision.plans.document import schema
from tests.support.models import PlainMoE, build

LAYER = "model.layers.0.mlp"


@pytest.fixture
def plan(mixtral):
    return allocate(mixtral, average_bits=2.5, bits=(2, 3), group_size=64)


@pytest.fixture
def path(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def test_round_trip(plan, path):
    assert PrecisionPlan.load(path) == plan
    jsonschema.Draft202012Validator.check_schema(schema())
    text = path.read_text()
    assert '"bits": [' in text
    assert len(text.splitlines()) < 120  # lists of numbers stay on one line


def test_asked_and_reached(mixtral):
    plan = allocate(mixtral, average_bits=2.6, bits=(2, 3), group_size=64)
    assert plan.settings is not None
    assert plan.settings.average_bits == 2.6
    assert plan.average_bits == 2.5  # floor(8 * 0.6) = 4 of 8 experts get 3 bits
    written = plan.to_dict()
    assert (written["settings"]["average_bits"], written["average_bits"]) == (2.6, 2.5)


def test_the_file_keeps_what_stands_inside_of_strings(mixtral, tmp_path):
    pattern = r"gate[ 1 ]?\.weight[ 2,  3 ]*$"
    plan = allocate(mixtral, group_size=64, router_pattern=pattern)
    plan.save(tmp_path / "plan.json")
    assert PrecisionPlan.load(tmp_path / "plan.json").patterns == {"router_pattern": pattern}


def test_with_bits(plan, path):
    edited = plan.with_bits({LAYER: {"down_proj": [8] * 8}})
    assert edited.layers[LAYER].projection_bits["down_proj"] == [8] * 8
    assert edited.layers[LAYER].projection_bits["gate_up_proj"] == plan.layers[LAYER].projection_bits["gate_up_proj"]
    assert edited.notes["edited"]
    edited.save(path)
    assert PrecisionPlan.load(path) == edited
    assert plan.with_bits({LAYER: [4] * 8}).layers[LAYER].bits == [4] * 8
    for bits, message in (
        ({"x": [2] * 8}, r"no layer 'x'; it has model\.layers\.0\.mlp"),
        ({LAYER: [2] * 7}, "has 8 experts, got 7 widths of 'gate_up_proj'"),
        ({LAYER: {"up": [2] * 8}}, "has no 'up'; it has gate_up_proj, down_proj"),
        ({LAYER: [9] * 8}, "bits must be 1 to 8"),
        ({LAYER: 5}, "expected one width per expert for 'gate_up_proj', got 5"),
        ({LAYER: [True] * 8}, "bits of gate_up_proj=True: expected a whole number"),
    ):
        with pytest.raises((PlanError, AllocationError), match=message):
            plan.with_bits(bits)
    numpy = plan.with_bits({LAYER: np.full(8, 4)})
    numpy.save(path)
    assert PrecisionPlan.load(path) == numpy


def test_plans_share_nothing_that_can_be_edited(plan):
    before = json.dumps(plan.to_dict())
    other = plan.with_bits({LAYER: {"gate_up_proj": [4] * 8}})
    written, read = plan.to_dict(), PrecisionPlan.from_dict(plan.to_dict())
    for layers in (other.layers, read.layers, plan.widths_only().layers):
        for layer in layers.values():
            layer.projection_bits["down_proj"][0] = 8
    written["layers"][LAYER]["projections"]["down_proj"]["bits"][0] = 8
    assert json.dumps(plan.to_dict()) == before


def test_projections_weigh_by_their_size(plan):
    layers = plan.layers
    for layer in layers.values():
        layer.projection_bits["gate_up_proj"][:] = [2] * 8
        layer.projection_bits["down_proj"][:] = [16] * 8
    assert plan.average_bits == pytest.approx((2 * 2 + 16) / 3)  # gate_up holds two thirds of the weights
    assert plan.stored_bits == pytest.approx((2 * (2 + 18 / 64) + 16) / 3)
    with pytest.raises(PlanError, match="projection_bits"):
        _ = layers[LAYER].bits
    assert plan.granularity == "layer+projection"
    layers[LAYER].projection_bits["down_proj"][0] = 8
    assert plan.granularity == "expert+projection"
    assert PrecisionPlan.from_dict(plan.to_dict()) == plan


def test_whole_numbers_may_be_written_as_floats(path):
    plan = PrecisionPlan.load(path)
    bits = plan.layers[LAYER].bits
    edited(path, lambda d: set_bits(d, float(bits[2])))
    assert PrecisionPlan.load(path) == plan
    assert all(type(width) is int for width in PrecisionPlan.load(path).layers[LAYER].bits)


def edited(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    return path


def set_bits(data, value, projection="down_proj"):
    data["layers"][LAYER]["projections"][projection]["bits"][2] = value


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format="x"), """not a precision plan: expected "format": 'moe-precision-plan', got 'x'"""),
        (lambda d: d.update(format_version=1), "format_version 1, this release reads 2"),
        (lambda d: d.pop("layers"), "'layers' is a required property"),
        (lambda d: d.update(layers={}), "should be non-empty"),
        (lambda d: d.update(group_size=60), "not a multiple of 8"),
        (lambda d: d.update(group_size=128), "group_size=128 does not divide the input width 64"),
        (lambda d: set_bits(d, 9), r"at \$\.layers\['model.layers.0.mlp'\].*bits\[2\].*9 is not one of"),
        (lambda d: set_bits(d, 0), "expert 2 has bits {'gate_up_proj': 3, 'down_proj': 0}; 0 drops an expert"),
        (lambda d: set_bits(d, 2.5), "2.5 is not one of"),
        (
            lambda d: [set_bits(d, 8, projection) for projection in ("gate_up_proj", "down_proj")],
            "states average_bits 2.5, but",
        ),
        (lambda d: d["layers"][LAYER]["projections"]["down_proj"]["bits"].pop(), "8 experts but 7 values of bits"),
        (lambda d: d["layers"][LAYER]["signals"]["max_variance"].pop(), "8 experts but 7 values of max_variance"),
        (lambda d: d["layers"][LAYER].update(order=[0] * 8), "does not name each of its 8 experts once"),
        (lambda d: d.update(granularity="layer"), "states granularity 'layer', its bits are 'expert'"),
        (lambda d: d.update(baseline="zero"), r"at \$\.baseline"),
        (
            lambda d: d["settings"].update(stored_bits=3),
            "average_bits and stored_bits in its settings",
        ),
        (lambda d: d["layers"][LAYER].update(costs={"x": {"2": [0] * 8}}), "costs of 'x', which is not one of its mat"),
    ],
)
def test_invalid_content(path, change, message):
    with pytest.raises(PlanError, match=message):
        PrecisionPlan.load(edited(path, change))


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_not_finite(path, constant):
    text = path.read_text()
    value = json.loads(text)["layers"][LAYER]["signals"]["max_variance"][0]
    path.write_text(text.replace(str(value), constant))
    with pytest.raises(PlanError, match=f"holds {constant}; every number in a plan must be finite"):
        PrecisionPlan.load(path)


def test_truncated(path):
    path.write_text(path.read_text()[:-40])
    with pytest.raises(PlanError, match="not a complete JSON file"):
        PrecisionPlan.load(path)


def test_not_text(tmp_path):
    (tmp_path / "plan.json").write_bytes(bytes(range(128, 256)))
    with pytest.raises(PlanError, match=r"plan\.json' is not a complete JSON file"):
        PrecisionPlan.load(tmp_path / "plan.json")


def test_granularity_is_the_coarsest_that_describes_the_bits(plan, mixtral):
    assert plan.granularity == "expert"
    uniform = allocate(mixtral, method="uniform", average_bits=3, group_size=64)
    assert uniform.granularity == "layer"
    for layer in uniform.layers.values():
        layer.projection_bits["down_proj"][:] = [4] * 8
    assert uniform.granularity == "layer+projection"


def test_missing():
    with pytest.raises(FileNotFoundError):
        PrecisionPlan.load("no/such/plan.json")


def test_check(plan, mixtral):
    plan.check(mixtral)
    with pytest.raises(PlanError, match="for a model of type 'mixtral', this model is 'qwen3_moe'"):
        plan.check(build("qwen3_moe"))
    with pytest.raises(PlanError, match=r"of the model's layers the plan lacks \['model.layers.2.mlp'\]"):
        plan.check(build("mixtral", num_hidden_layers=3))
    with pytest.raises(PlanError, match=r"of its layers the model lacks \['model.layers.1.mlp'\]"):
        plan.check(build("mixtral", num_hidden_layers=1))
    with pytest.raises(PlanError, match=r"layer 'model\.layers\.0\.mlp' is .*num_experts=4"):
        plan.check(build("mixtral", num_local_experts=4))
    with pytest.raises(PlanError, match="PlainMoE"):
        plan.check(PlainMoE())


def test_diff(plan, mixtral):
    assert plan.diff(plan) == []
    other = allocate(mixtral, method="uniform", average_bits=3, group_size=64)
    lines = plan.diff(other)
    assert len(lines) == 2 * 4 * 2  # two layers, four experts at 2 bits, two projections
    low = plan.layers[LAYER].bits.index(2)
    assert f"{LAYER} expert {low} down_proj: 2 -> 3 bits" in lines


def test_an_interrupted_write_leaves_the_old_plan(plan, path, monkeypatch):
    before = path.read_text()
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        plan.save(path)
    assert path.read_text() == before
    assert [p.name for p in path.parent.iterdir()] == ["plan.json"]
