"""mlx-lm's ``quantization``: bits for the matrix of all experts of a layer."""

from __future__ import annotations

import json

from ..plans.plan import PrecisionPlan
from .exported import Exported, ExportError, check_granularity, with_widths
from .mlx_names import family_of, mlx_module
from .names import all_places

_GROUP_SIZES = (32, 64, 128)
_WIDTHS = (2, 3, 4, 5, 6, 8)  # its 1 bit has the levels least and greatest: an error above that of zeros


def export(plan: PrecisionPlan) -> Exported:
    """For ``mlx_lm.convert(quant_predicate=...)`` and config.json's ``quantization``; paths are of mlx-lm's modules.

    Raises:
        ExportError: The names of the family in mlx-lm are not known, experts of a layer differ, or MLX does not have
            the group size.
    """
    names = {place: mlx_module(place, plan.model_type) for place in all_places(plan)}
    check_granularity(plan, "layer+projection", "MLX keeps a matrix of all experts of a layer in one tensor")
    if plan.group_size not in _GROUP_SIZES:
        raise ExportError(
            f"MLX has groups of {_GROUP_SIZES}, the plan has {plan.group_size}; make it with --group-size 64"
        )
    plan, notes = with_widths(plan, _WIDTHS, "MLX")
    settings = {"group_size": plan.group_size, "mode": "affine"}
    config: dict[str, object] = {}
    for place, name in names.items():
        bits = plan.layers[place.layer].projection_bits[place.projection][0]
        config[name] = False if bits == 16 else {"bits": bits, **settings}
    widest = max((of_one["bits"] for of_one in config.values() if isinstance(of_one, dict)), default=8)
    family = family_of(plan.model_type)
    if family.needs:
        part = "the text_config of config.json" if family.inside else "config.json"
        notes.append(
            f"mlx-lm reads {', '.join(family.needs)} from {part}, where transformers 5 does not write them under these "
            "names: add what is missing before mlx_lm.convert (rope_theta from rope_parameters), or mlx-lm stops or "
            "takes defaults of its own"
        )
    notes.append("every other layer: give mlx_lm.convert a predicate that returns False, or its own bits, for it")
    config = {"bits": widest, **settings, **config}
    return Exported(config, json.dumps(config, indent=2) + "\n", plan, tuple(notes))
