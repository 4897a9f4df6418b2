"""What kind of model a plan is for, and which other kinds hold the same layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def model_type_of(model: nn.Module) -> str:
    """transformers' ``config.model_type`` where there is one, else the name of the class."""
    config = getattr(model, "config", None)
    return str(getattr(config, "model_type", None) or type(model).__name__)


def may_have_the_same_layers(model: nn.Module, model_type: str) -> bool:
    """Whether a model is of a type, holds a model of it, or is what transformers puts into one of it."""
    from transformers import PreTrainedModel

    from ..compat import parts_of_config

    own = {model_type_of(model)}
    own |= {model_type_of(module) for module in model.modules() if isinstance(module, PreTrainedModel)}
    return model_type in own or not own.isdisjoint(parts_of_config(model_type))


def of_one_family(one: str, other: str) -> bool:
    """Whether two model types may have the same layers: equal, or one built inside the other, or unknown here."""
    from ..compat import is_model_type, parts_of_config

    if one == other or not (is_model_type(one) and is_model_type(other)):
        return True
    inside, inside_other = parts_of_config(one), parts_of_config(other)
    return one in inside_other or other in inside or not inside.isdisjoint(inside_other)
