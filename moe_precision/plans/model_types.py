"""What kind of model a plan is for, and which other kinds hold the same layers."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from ..compat import parts_of_configs


def model_type_of(model: nn.Module) -> str:
    """transformers' ``config.model_type`` where there is one, else the name of the class."""
    config = getattr(model, "config", None)
    return str(getattr(config, "model_type", None) or type(model).__name__)


def related_types(model: nn.Module) -> set[str]:
    """The types of a model, of all transformers models inside it, and of those in which transformers puts one like it.

    A plan for any of these may have the same layers.
    """
    own = {model_type_of(model)}
    own |= {model_type_of(module) for module in model.modules() if isinstance(module, PreTrainedModel)}
    return own | {outer for outer, parts in parts_of_configs().items() if parts & own}
