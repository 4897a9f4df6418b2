"""Which part of what a Trainer trains a callback is about, where that holds several models."""

from __future__ import annotations

from pytorch_lightning.utilities import rank_zero_warn
from torch import nn
from transformers import PreTrainedModel

from moe_precision.compat import wrapped_in
from moe_precision.layers.module_tree import MoELayerError
from moe_precision.layers.moe_layers import find_moe_layers
from moe_precision.layers.patterns import Patterns
from moe_precision.layers.roots import is_trained, root_model, transformers_models


def trained_part(module: nn.Module, name: str | None, patterns: Patterns) -> nn.Module:
    """The model that is recorded, planned for and saved: names of layers are relative to it.

    Of several transformers models it is the one that is named, else the only one that is trained (a teacher is
    frozen), else the only one of those with experts. Experts outside of any belong to the module itself.

    Args:
        module: The LightningModule or model, or what is around it.
        name: Path of a model in it, such as ``student``.
        patterns: ``router_pattern`` and ``expert_pattern``, as in `find_moe_layers`.

    Raises:
        MoELayerError: No such name, or several models with experts are trained and none is named.
    """
    if name is not None:
        return submodule(module, name)
    models = transformers_models(module)
    if isinstance(root_model(module), PreTrainedModel):
        return module  # in which `root_model` finds it
    if len(models) < 2:
        _warn_of_frozen(module, patterns)
        return module
    trained = [path for path, model in models.items() if is_trained(model)]
    layers = [layer.name for layer in find_moe_layers(module, **patterns)]
    holders = {path for path in trained if any(layer.startswith(f"{path}.") for layer in layers)}
    if len(holders) > 1:
        raise MoELayerError(
            f"{type(module).__name__} trains {len(holders)} models with experts, {', '.join(sorted(holders))}, and a "
            "plan is for one: freeze the others (requires_grad_(False)), or name one, as in "
            f"module={min(holders)!r}"
        )
    inside = [layer for layer in layers if any(layer.startswith(f"{path}.") for path in models)]
    return submodule(module, holders.pop()) if holders and len(inside) == len(layers) else module


def _warn_of_frozen(module: nn.Module, patterns: Patterns) -> None:
    """Nothing tells a frozen teacher from the first layers of a model, where neither is a transformers model."""
    trained = {
        layer.name: any(
            weight.parameter().requires_grad
            for weight in (layer.router_is, *(weight for bank in layer.banks.values() for weight in bank.weights))
        )
        for layer in find_moe_layers(module, **patterns)
    }
    frozen = [name for name, is_trained in trained.items() if not is_trained]
    if frozen and len(frozen) < len(trained):
        rank_zero_warn(
            f"{type(module).__name__}: {len(frozen)} of {len(trained)} layers are frozen, {frozen[0]!r} the first, and "
            "the plan is for all of them. If they are another model, such as a teacher, name the one that is trained, "
            "as in module='student'"
        )


class TrainedPart:
    """`trained_part`, which remembers what it has found.

    Args:
        name: Path of the model, if one is named.
    """

    def __init__(self, name: str | None) -> None:
        self.name = name
        self._known: tuple[nn.Module, nn.Module] | None = None

    def of(self, module: nn.Module, patterns: Patterns) -> nn.Module:
        """As `trained_part`."""
        if self._known is None or self._known[0] is not module:
            self._known = module, trained_part(module, self.name, patterns)
        return self._known[1]

    def forget(self) -> None:
        """Looks anew next time: what is frozen may have changed."""
        self._known = None


def submodule(module: nn.Module, path: str) -> nn.Module:
    """The part of a module at a path without wrappers, such as ``student``.

    Raises:
        MoELayerError: There is no such part.
    """
    part = module
    for name in path.split("."):
        while name not in (children := dict(part.named_children())):
            if (inner := wrapped_in(children)) is None:
                models = ", ".join(transformers_models(module)) or "none"
                raise MoELayerError(f"there is no module {path!r} in {type(module).__name__}; its models are: {models}")
            part = inner
        part = children[name]
    return part
