"""A packed module that is not of transformers: its saved state, read into a new module."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..layers.moe_layers import find_moe_layers
from ..plans.document import Document
from ..plans.plan import PrecisionPlan, as_plan
from .config import PlanQuantizationConfig, QuantizationError
from .modules import kernels_of
from .replace import find_targets, replace_weight


def load_packed_state(
    model: nn.Module,
    plan: PrecisionPlan | Document | str | os.PathLike[str],
    state: Mapping[str, Tensor],
    *,
    non_expert_bits: int | None = None,
) -> nn.Module:
    """Makes a new module the packed one whose ``state_dict()`` was saved after `quantize_model`; in place.

    For modules of your own. A model of transformers is saved with ``save_pretrained`` and loaded with
    ``from_pretrained``, which check more.

    Args:
        model: As it was built before it was quantized; its weights do not matter, and it may be on the meta device.
        plan: The plan that it was quantized by, its dict, or the path of its file.
        state: What ``state_dict()`` of the packed module gave, each tensor in its dtype.
        non_expert_bits: As it was quantized with.

    Returns:
        The same module, in evaluation mode.

    Raises:
        PlanError: The plan is for another model.
        QuantizationError: The state is of another module, plan or ``non_expert_bits``, or the model of transformers.

    Example:
        >>> from safetensors.torch import load_file, save_file
        >>> from torch import nn
        >>> def build():
        ...     module = nn.Module()
        ...     module.router = nn.Linear(32, 4, bias=False)
        ...     module.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32)) for _ in range(4))
        ...     return module
        >>> module = build()
        >>> plan = allocate(module, method="weight_error", average_bits=2.5, group_size=32)
        >>> save_file(quantize_model(module, plan).state_dict(), "packed.safetensors")
        >>> module = load_packed_state(build(), plan, load_file("packed.safetensors"))
    """
    if isinstance(model, PreTrainedModel):
        raise QuantizationError(f"{type(model).__name__} is a model of transformers: load it with from_pretrained")
    quantization = PlanQuantizationConfig(as_plan(plan).widths_only(), non_expert_bits=non_expert_bits)
    layers = find_moe_layers(model, **quantization.plan.patterns)
    quantization.in_names_of(model, layers)
    for target in find_targets(model, layers, quantization.plan, non_expert_bits):
        replace_weight(model, target, quantization.plan.group_size, weight=None)
    own = model.state_dict()
    wrong = [name for name in own if name not in state or state[name].shape != own[name].shape]
    wrong += [name for name in state if name not in own]
    if wrong:
        raise QuantizationError(
            f"the state is not that of this {type(model).__name__}, packed by this plan: {len(wrong)} tensors are "
            f"missing, unexpected or of another shape, {wrong[0]!r} the first. Give the module, plan and "
            "non_expert_bits that it was saved with"
        )
    model.load_state_dict(state, assign=True)
    model.moe_precision_kernels = partial(kernels_of, model)  # type: ignore[assignment]
    return model.eval()
