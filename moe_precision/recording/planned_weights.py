"""Which weights a plan was made for, by the router norms that it holds."""

from __future__ import annotations

import torch
from torch import Tensor

from ..plans.methods import METHODS
from ..plans.plan import PrecisionPlan
from ..plans.widths import PlanError
from .router_norms import check_same_weights

_ADVICE = (
    "Make a plan for these: `moe-precision plan HISTORY --final CHECKPOINT -o PLAN` with the history beside the plan, "
    "if they are of another step of the same run, else `moe-precision plan CHECKPOINT -o PLAN`. To take these widths "
    "all the same, give plan.widths_only(), which save(path) writes for the command line"
)


def norms_of_plan(plan: PrecisionPlan) -> dict[str, Tensor]:
    """Router norms of the weights that a plan was made for, ``(E,)`` by layer; empty if its method reads no weights."""
    known = METHODS.get(plan.method)  # type: ignore[call-overload]  # a tool's name is in no registry
    if known is None or not known.reads:
        return {}
    last = {name: layer.router_norms.get("last") for name, layer in plan.layers.items()}
    return {name: torch.tensor(norms, dtype=torch.float32) for name, norms in last.items() if norms is not None}


def check_plan_is_for(plan: PrecisionPlan, found: dict[str, Tensor]) -> None:
    """Checks by router norms that a plan was made for these weights, as far as it says.

    Args:
        plan: The plan.
        found: Layer name -> ``(E,)`` of the weights at hand, any float dtype.

    Raises:
        PlanError: It was made for other weights.
    """
    check_same_weights(norms_of_plan(plan), found, "plan", PlanError, _ADVICE)
