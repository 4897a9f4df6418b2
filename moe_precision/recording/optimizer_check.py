"""Whether an optimizer will keep of the experts' gradients what curvature needs, before training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..compat import held_by_deepspeed
from ..layers.moe_layers import MoELayer
from .curvature import CurvatureError
from .masters import innermost
from .trusted import problem_in_half, problem_of


def check_second_moments(layers: list[MoELayer], optimizers: Iterable[Any]) -> None:
    """Raises `CurvatureError` if the optimizers that train the experts can keep no second moment of their weights.

    An optimizer that trains no expert yet is given the benefit of the doubt.

    Args:
        layers: As found by `find_moe_layers`.
        optimizers: Lightning's or accelerate's wrappers are looked through.
    """
    weights = [weight for layer in layers for bank in layer.banks.values() for weight in bank.weights]
    for weight in weights:
        if held_by_deepspeed(weight.parameter()):
            continue
        if weight.gathers or weight.is_adapted:
            what = "in flat shards (FSDP1)" if weight.gathers else "behind an adapter"
            raise CurvatureError(
                f"{weight.name!r} is {what}: the optimizer keeps no second moment of the whole weight. Let "
                "curvature_batches=64 take squared gradients after the last step"
            )
        if getattr(weight.parameter(), "main_param", None) is not None:
            raise CurvatureError(
                f"{weight.name!r} is trained through Megatron's float32 copy, whose moments are not read. Take the "
                "curvature from the checkpoint afterwards (moe-precision plan CHECKPOINT --method curvature), or "
                "record with method='router_norm'"
            )
    experts = {id(weight.parameter()) for weight in weights}
    held = any(held_by_deepspeed(weight.parameter()) for weight in weights)
    for optimizer in optimizers:
        for one in innermost([optimizer]) if held else []:
            if (problem := problem_of(one)) is not None:
                raise _none(problem)
        inner = getattr(optimizer, "optimizer", optimizer)
        trained = [
            (group, parameter)
            for group in inner.param_groups
            for parameter in group["params"]
            if id(parameter) in experts
        ]
        in_half = (problem_in_half(optimizer, *pair) for pair in trained)
        if trained and (problem := problem_of(optimizer, experts) or next(filter(None, in_half), None)) is not None:
            raise _none(problem)


def _none(problem: str) -> CurvatureError:
    return CurvatureError(
        f"{problem}. Train the experts with AdamW or Adafactor, or let curvature_batches=64 take squared gradients "
        "after the last step"
    )
