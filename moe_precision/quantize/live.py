"""Quantizing a model that is already in memory."""

from __future__ import annotations

import os
from functools import partial

from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from ..autocast import without_autocast
from ..compat import mark_as_quantized
from ..layers.materialized import check_materialized
from ..layers.moe_layers import find_moe_layers
from ..plans.document import Document
from ..plans.plan import PrecisionPlan
from ..recording.curvature import Curvature
from ..recording.statistics import ExpertStatistics
from .codec.grid import Grid
from .config import QUANT_METHOD, PlanQuantizationConfig, QuantizationError
from .hf import PlanHfQuantizer, check_not_split, finish
from .modules import EXPERTS_IMPLEMENTATION, kernels_of
from .replace import find_targets, replace_weight


@without_autocast()
def quantize_model(
    model: nn.Module,
    plan: PrecisionPlan | Document | str | os.PathLike[str],
    *,
    non_expert_bits: int | None = None,
    curvature: Curvature | str | os.PathLike[str] | None = None,
    grid: Grid | str | os.PathLike[str] | None = None,
    statistics: ExpertStatistics | str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Quantizes a model in memory, in place, by a precision plan.

    Args:
        model: A transformers model, or any module whose experts are lists of ``nn.Linear`` modules.
        plan: A `PrecisionPlan`, its dict, or the path of its file.
        non_expert_bits: 8 or 4 to quantize the other linear layers too.
        curvature: `Curvature` or its path, for the weights of the fit.
        grid: `Grid` or its path, in place of a fit.
        statistics: `ExpertStatistics` or the path of their file, by which the fit rounds.

    Returns:
        The same model, in evaluation mode. A transformers model can be saved with ``save_pretrained``; of another
        module save the ``state_dict()``, which `load_packed_state` reads.

    Raises:
        PlanError: The plan is for another model.
        UnsupportedLayoutError: Experts in a layout that cannot be packed yet.
        QuantizationError: The model is split over processes, or a weight is not finite.

    Example:
        >>> plan = allocate(model, method="weight_error", average_bits=2.5, group_size=64)
        >>> quantize_model(model, plan).save_pretrained("packed")
    """
    config = PlanQuantizationConfig(
        plan, non_expert_bits=non_expert_bits, curvature=curvature, grid=grid, statistics=statistics
    )
    check_not_split(model)
    layers = find_moe_layers(model, **config.plan.patterns)
    check_materialized(layers)
    config.in_names_of(model, layers)
    targets = find_targets(
        model, layers, config.plan, non_expert_bits, config.curvature, config.grid, config.statistics
    )
    config.warn_if_unweighted()
    config.check_weights(layers)
    own = dict(model.named_parameters(remove_duplicate=False))
    for target in targets:  # before any change: a half-packed model is useless
        if target.parameter not in own:
            raise QuantizationError(
                f"{type(model).__name__} holds {target.parameter!r} behind a wrapper; give the plain model: unwrap it, "
                "and merge PEFT adapters with merge_and_unload()"
            )
        if not model.get_parameter(target.parameter).isfinite().all():
            raise QuantizationError(f"{target.parameter!r} holds values that are not finite; has training diverged?")
    for target in tqdm(targets, desc="Quantizing", unit="weight"):
        weight = model.get_parameter(target.parameter).detach()
        replace_weight(model, target, config.plan.group_size, weight)
    if isinstance(model, PreTrainedModel):
        if any(target.fused for target in targets):
            model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
        quantizer = PlanHfQuantizer(config, pre_quantized=False)
        model.hf_quantizer = quantizer
        model.is_quantized, model.quantization_method = True, QUANT_METHOD
        model.config.quantization_config = config
        mark_as_quantized(model.config)
        finish(model)
    else:
        model.moe_precision_kernels = partial(kernels_of, model)  # type: ignore[assignment]
    return model.eval()
