"""What can be asked of a plan: checked once, and taken by everything that makes plans under the same names."""

import inspect
import json
from dataclasses import fields
from typing import get_args

import numpy as np
import pytest
import torch

from moe_precision import AllocationError, PlanError, allocate
from moe_precision.allocation.orders import ORDERS
from moe_precision.callbacks import (
    PrecisionAnneal,
    PrecisionAnnealTrainerCallback,
    RouterNormMonitor,
    RouterNormTrainerCallback,
)
from moe_precision.cli.main import parser
from moe_precision.layers.module_tree import MoELayerError
from moe_precision.layers.shape import LayerShape
from moe_precision.plans import methods
from moe_precision.plans.settings import PlanSettings

PAPER = {"method": "router_norm"}
NAMES = [one.name for one in fields(PlanSettings)]
LAYERS = {"0": LayerShape("router", 4, {"up": (64, 32), "down": (32, 64)})}  # 4 * 4096 weights


@pytest.mark.parametrize("function", [allocate, RouterNormMonitor, RouterNormTrainerCallback, PrecisionAnneal])
def test_everything_that_makes_plans_takes_the_settings_by_name_in_one_order(function):
    parameters = inspect.signature(function).parameters
    taken = [name for name in parameters if name in NAMES]
    assert taken == NAMES
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in taken)
    defaults = {one.name: one.default for one in fields(PlanSettings)}
    if function is PrecisionAnneal:
        defaults["method"] = "curvature"  # its optimizer has the second moments
    assert {name: parameters[name].default for name in taken} == defaults


def test_the_annealing_callback_of_transformers_passes_them_on():
    callback = PrecisionAnnealTrainerCallback(stored_bits=2.5, bits=(1, 2, 3), seed=3, group_size=64)
    assert callback.settings == PlanSettings(method="curvature", stored_bits=2.5, bits=(1, 2, 3), seed=3, group_size=64)


def test_the_command_line_has_an_option_for_each():
    options = vars(parser().parse_args(["plan", "history.safetensors"]))
    assert {name: options[name] for name in NAMES} == {one.name: one.default for one in fields(PlanSettings)}


def test_the_registry_is_the_one_list_of_methods():
    assert get_args(methods.MethodName) == (methods.AUTO, *methods.ALL_METHODS)
    assert tuple(methods.METHODS) == methods.ALL_METHODS
    assert set(ORDERS) == set(methods.ORDER_METHODS)
    assert set(methods.COST_METHODS) == {"weight_error", "curvature", "statistics", "shuffled_curvature", "sensitivity"}
    assert set(methods.PLAN_METHODS) == {methods.AUTO, *methods.ALL_METHODS} - {"sensitivity"}
    assert set(methods.CONTROLS) == {"uniform", "random", "reversed", "least_load", "shuffled_curvature"}
    assert set(methods.SEEDED) == {"random", "shuffled_curvature"}
    assert set().union(*(m.reads for m in methods.METHODS.values())) == set(get_args(methods.Signal))
    assert all(m.source and m.summary for m in methods.METHODS.values())


def test_a_budget_is_nominal_unless_another_one_is_given():
    assert PlanSettings().nominal_bits() == 2.5
    assert PlanSettings().levels == PlanSettings(method="curvature").levels == (1, 2, 3, 4)
    assert PlanSettings(method="router_norm").levels == (2, 3)
    assert PlanSettings(bits=(3, 2, 3)).levels == (2, 3)
    assert PlanSettings(method="uniform", average_bits=4).levels == (4,)
    assert PlanSettings(stored_bits=2.5 + 18 / 64, group_size=64).nominal_bits() == pytest.approx(2.5)
    settings = PlanSettings(expert_gib=2.75 * 16384 / 8 / 2**30, group_size=32, method="curvature", bits=(2, 4))
    assert settings.stored_budget(LAYERS) == pytest.approx(2.75)
    assert settings.nominal_bits(LAYERS) == pytest.approx(2.75 - 18 / 32)
    assert settings.budget.endswith("GiB")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "best"}, "unknown method 'best', expected one of auto, router_norm"),
        ({"average_bits": 2.5, "stored_bits": 2.5}, r"average_bits=2.5 and stored_bits=2.5 are 2 budgets; give one"),
        ({"stored_bits": 2.5, "expert_gib": 1.0}, "are 2 budgets; give one"),
        ({"average_bits": 4.5}, r"average_bits=4.5 is outside the levels \[1, 2, 3, 4\]"),
        ({"average_bits": 3.5, **PAPER}, r"average_bits=3.5 is outside the levels \[2, 3\]"),
        ({"stored_bits": 1.0}, r"stored_bits=1.0 is outside .* 1.14062 to 4.14062"),
        ({"stored_bits": 2.0, **PAPER}, r"stored_bits=2.0 is outside .* 2.14062 to 3.14062"),
        ({"bits": 2}, "must list the levels"),
        ({"bits": (1, 2, 4), **PAPER}, "equally spaced"),
        ({"bits": (1, 2, 3, 4), **PAPER}, "one, two or three levels"),
        ({"stored_bits": 2.5, "bits": (1, 2, 3, 4), **PAPER}, "one, two or three levels"),
        ({"granularity": "row"}, "unknown granularity 'row', expected one of expert,"),
        (
            {"granularity": "layer", **PAPER},
            "orders the experts of a layer: granularity='layer' needs a method that knows costs",
        ),
        ({"zeta": 0.0}, "zeta must be positive"),
        ({"method": "uniform"}, "gives all experts one width: average_bits=2.5 is not a width"),
        ({"stored_bits": 9.0, "bits": (2, 16)}, "counts nominal bits, and experts at 16 bits have no scales"),
    ],
)
def test_what_cannot_be_asked(given, message):
    with pytest.raises(AllocationError, match=message):
        PlanSettings(**given)


def test_what_cannot_be_stored():
    with pytest.raises(PlanError, match="group_size=60 is not a positive multiple of 8"):
        PlanSettings(group_size=60)
    with pytest.raises(PlanError, match="bits must be 1 to 8, 16"):
        PlanSettings(bits=(2, 9), average_bits=3)
    with pytest.raises(PlanError, match="group_size=128 does not divide the input width 32 of 'up' in layer '0'"):
        PlanSettings().check_fits(LAYERS)
    with pytest.raises(MoELayerError, match=r"router_pattern='\('"):
        PlanSettings(router_pattern="(")
    with pytest.raises(AllocationError, match=r"GiB for 16384 expert weights: stored_bits=.* is outside"):
        PlanSettings(expert_gib=1.0, group_size=32).check_fits(LAYERS)


def test_only_compare_measures_sensitivities():
    with pytest.raises(AllocationError, match=r"'sensitivity' needs measured costs.*expected one of auto, router_norm"):
        PlanSettings(method="sensitivity").check_plannable()


def test_settings_of_a_later_release_are_read():
    read = PlanSettings.recorded({"bits": [2, 3], "granularity": "row", "new": 1}, "of_tomorrow", 64)
    assert (read.method, read.levels, read.granularity) == ("of_tomorrow", (2, 3), "row")
    assert read.to_dict() == {"bits": [2, 3], "granularity": "row"}
    assert not read.knows_costs


def test_numbers_of_numpy_and_torch_become_pythons():
    settings = PlanSettings(
        bits=np.array([3, 2]),
        average_bits=np.float32(2.5),
        group_size=np.int64(64),
        seed=torch.tensor(3),
        zeta=np.float64(2),
    )
    assert settings == PlanSettings(bits=(2, 3), average_bits=2.5, group_size=64, seed=3, zeta=2.0)
    assert json.loads(json.dumps(settings.to_dict())) == settings.to_dict()
    assert PlanSettings(bits=range(2, 4)) == PlanSettings(bits=(2.0, 3.0))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bits": (True, 2)}, r"bits=True: expected a whole number"),
        ({"bits": "23"}, "must list the levels"),
        ({"bits": (2.5, 3)}, r"bits=2.5: expected a whole number"),
        ({"bits": ()}, "got none"),
        ({"average_bits": True}, "average_bits=True: expected a finite number"),
        ({"stored_bits": float("nan")}, "stored_bits=nan: expected a finite number"),
        ({"expert_gib": float("inf")}, "expert_gib=inf: expected a finite number"),
        ({"average_bits": "2.5"}, "average_bits='2.5': expected a finite number"),
        ({"seed": None}, "seed=None: expected a whole number"),
        ({"group_size": 32.5}, "group_size=32.5: expected a whole number"),
        ({"zeta": float("inf")}, "zeta=inf: expected a finite number"),
    ],
)
def test_what_is_no_number(given, message):
    with pytest.raises(AllocationError, match=message):
        PlanSettings(**given)


def test_uniform_settings_are_those_that_a_file_gives_back():
    settings = PlanSettings(method="uniform", average_bits=2)
    assert settings.bits == (2,)
    assert PlanSettings.recorded(settings.to_dict(), "uniform", settings.group_size) == settings
