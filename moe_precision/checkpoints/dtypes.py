"""The dtype of every tensor of a model in 16 bits: transformers keeps some in float32, each family others.

Where experts are chosen by scores that lie close together, such as DeepSeek-V3's ``e_score_correction_bias``, rounding
them to bfloat16 sends tokens to other experts.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig, PreTrainedModel

from ..compat import dtype_plan, model_of_config

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""What a checkpoint may be saved in, by the name that users give."""


def meta_model_of(model_class: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A new float model on the meta device, with the dtypes that ``from_pretrained(dtype=)`` gives its tensors.

    Args:
        model_class: Its class.
        config: Its config, which is left as it is.
        dtype: The dtype of all tensors but those that the family keeps in another one.
    """
    config = copy.deepcopy(config)
    config.dtype = dtype
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = model_of_config(model_class, config)
    keep_float32(model, dtype)
    return model


def keep_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Changes the dtype of the tensors of a meta model in ``dtype`` that its family keeps in another one."""
    plan = {re.compile(pattern.replace("*", ".*")): kept for pattern, kept in dtype_plan(model, dtype).items()}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        kept = next((kept for pattern, kept in plan.items() if pattern.search(name)), tensor.dtype)
        if tensor.is_floating_point() and tensor.dtype != kept:
            tensor.data = tensor.data.to(kept)


def cast(model: PreTrainedModel, state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A model's tensors in another dtype, as ``from_pretrained(dtype=)`` would load them.

    Args:
        model: The model.
        state: Its tensors, each whole, by their names in the model.
        dtype: The dtype of all floating tensors but those that the family keeps in another one.
    """
    model_class = next(one for one in type(model).__mro__ if not issubclass(one, FSDPModule))
    own = meta_model_of(model_class, model.config, dtype).state_dict()
    dtypes = {name: tensor.dtype for name, tensor in own.items()}
    return {name: t.to(dtypes.get(name, dtype)) if t.is_floating_point() else t for name, t in state.items()}
