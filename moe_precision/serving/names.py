"""Tensors of packed experts are known by their names, whatever config.json says."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ServingError

if TYPE_CHECKING:
    from torch import Tensor, nn

_PACKED = re.compile(r"\.packed\.(?:[^.]+\.)*bits_\d+\.(?:codes|scale|offset|ends|matrices)$")


def is_packed(name: str) -> bool:
    """Whether a tensor of a checkpoint is part of a packed matrix.

    Example:
        >>> is_packed("model.layers.0.mlp.experts.packed.down_proj.bits_2.codes")
        True
    """
    return _PACKED.search(name) is not None


def not_packed(source: str) -> ServingError:
    """The error for a checkpoint whose config.json does not say that it is packed, although it should."""
    return ServingError(
        f"{source} has no quantization_config of moe_precision in its config.json, so its packed experts cannot be "
        "read: copy the config.json that was written with the weights"
    )


def refuse_packed_files(folder: str) -> None:
    """Raises `ServingError` if a file of a folder that is said to be float is packed; reads headers only."""
    from safetensors import safe_open

    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            if any(map(is_packed, opened.keys())):
                raise not_packed(repr(folder))


def refuse_packed(tensors: Iterable[tuple[str, Tensor]], source: str) -> Iterator[tuple[str, Tensor]]:
    """Passes on the tensors of a checkpoint that is said to be float, and raises `ServingError` at a packed one.

    Args:
        tensors: Names and tensors.
        source: Which checkpoint, for the message.
    """
    for name, tensor in tensors:
        if is_packed(name):
            raise not_packed(source)
        yield name, tensor


def with_other_names(model: nn.Module, names: Iterable[str]) -> set[str]:
    """The names, and all others of the same parameters: an engine may register one module in two places.

    Args:
        model: A model.
        names: Of some of its parameters; names that it does not have stay.
    """
    found = {*names}
    named = list(model.named_parameters(remove_duplicate=False))
    known = {id(parameter) for name, parameter in named if name in found}
    return found | {name for name, parameter in named if id(parameter) in known}
