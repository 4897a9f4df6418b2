"""A precision plan as another quantizer's own config; one file per target, and all names in `names`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from ..plans.plan import PrecisionPlan, as_plan
from . import autoround, by_expert, dynquant, gguf, gptqmodel, llm_compressor, mlx, modelopt, torchao
from .exported import ENGINES, Exported, ExportError
from .reading import plan_of_checkpoint

__all__ = ["ENGINES", "TARGETS", "ExportError", "Exported", "export", "plan_of_checkpoint"]

_SERVED: dict[str, Callable[..., Exported]] = {  # checkpoints that inference engines read
    "autoround": autoround.export,
    "gptqmodel": gptqmodel.export,
    "llm-compressor": llm_compressor.export,
}
TARGETS: dict[str, Callable[..., Exported]] = _SERVED | {
    "gguf": gguf.export,
    "mlx": mlx.export,
    "torchao": torchao.export,
    "modelopt": modelopt.export,
    "dynquant": dynquant.export,
    "exl3": by_expert.exl3,
    "fq-policy": by_expert.fq_policy,
    "hybrid-bit-map": by_expert.hybrid_bit_map,
}


def export(
    plan: PrecisionPlan | dict[str, Any] | str | os.PathLike[str], to: str, engine: str | None = None
) -> Exported:
    """Converts a plan to another tool's config.

    Args:
        plan: A plan, its dict, or the path of its file.
        to: A key of `TARGETS`.
        engine: ``vllm`` or ``sglang``, for targets whose checkpoints these engines serve: makes an export that the
            engine accepts.

    Returns:
        The config, its text, the plan as the target carries it out, and what a user has to know.

    Raises:
        ExportError: An unknown target or engine, or a plan that the target cannot carry out.

    Example:
        >>> found = export("precision_plan.json", to="autoround")
        >>> AutoRound(model, tokenizer, bits=4, group_size=64, layer_config=found.config)
    """
    if to not in TARGETS:
        raise ExportError(f"to={to!r} is not one of {', '.join(TARGETS)}")
    plan = as_plan(plan)
    if plan.average_bits == 16:
        raise ExportError("nothing to quantize: every width of the plan is 16, which leaves an expert as it is")
    if plan.drops:
        raise ExportError(
            f"the plan drops experts (0 bits), and {to} has no format for an expert that is not there: make a plan "
            "with --bits from 1, or cut them out with `moe-precision prune` and export the plan of what is left"
        )
    if to in _SERVED:
        return _SERVED[to](plan, engine)
    if engine is not None:
        raise ExportError(f"engine={engine!r} works with {', '.join(_SERVED)}; {to} has formats of its own")
    return TARGETS[to](plan)
