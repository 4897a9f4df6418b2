"""The transformers models inside of a module, and the one of them that all names are relative to."""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import PreTrainedModel

from ..compat import wrapped_in


def root_model(module: nn.Module) -> nn.Module:
    """The transformers model inside a LightningModule or a wrapper; of several, the only one that is trained.

    The module itself if it holds none, or several that are trained. Layer names are relative to it, so that a plan made
    in training fits the checkpoint saved afterwards.
    """
    models = list(transformers_models(module).values())
    if len(models) > 1:
        models = [model for model in models if is_trained(model)]
    return models[0] if len(models) == 1 else module


def transformers_models(module: nn.Module) -> dict[str, PreTrainedModel]:
    """The outermost transformers models in a module, itself included, by their path without wrappers.

    Averages of weights that a module keeps beside its model (torch's ``AveragedModel``) are not among them.
    """
    found: dict[str, PreTrainedModel] = {}

    def search(path: str, part: nn.Module) -> None:
        if isinstance(part, PreTrainedModel):
            found[path] = part
            return
        children = {name: child for name, child in part.named_children() if not isinstance(child, AveragedModel)}
        if (inner := wrapped_in(children)) is not None:
            search(path, inner)
            return
        for name, child in children.items():
            search(f"{path}.{name}".lstrip("."), child)

    search("", module)
    return found


def is_trained(model: nn.Module) -> bool:
    """Whether any parameter of a model is to be trained; a teacher, for one, is frozen."""
    return any(parameter.requires_grad for parameter in model.parameters())
