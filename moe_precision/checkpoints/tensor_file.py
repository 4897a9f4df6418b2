"""The one format of files that hold named tensors: safetensors whose metadata states a format, a version and JSON.

History, curvature and grid are each one `TensorFile`. However such a file is damaged, reading it raises the error of
its own kind.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files import save_tensors
from ..layers.shape import LayerShape

Nested = dict[str, dict[str, Tensor]]  # layer -> projection -> tensor


@dataclass(frozen=True)
class TensorFile:
    """One kind of tensor file.

    Attributes:
        format: Its name in the metadata, such as ``moe-precision-history``.
        version: The version that this release writes and reads.
        error: Raised for a file that cannot be read; takes a message.
        what: What the file holds, for messages, such as ``router-norm history``.
    """

    format: str
    version: int
    error: type[Exception]
    what: str

    def save(self, path: str | os.PathLike[str], tensors: Mapping[str, Tensor], **metadata: object) -> None:
        """Writes a file in one step.

        Args:
            path: The file.
            tensors: Name -> tensor, on any device.
            metadata: Strings are written as they are, all else as JSON.

        Raises:
            OSError: The file cannot be written; an existing one is left as it was.
        """
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
        stated = {"format": self.format, "version": str(self.version), **texts}
        save_tensors({name: tensor.cpu() for name, tensor in tensors.items()}, path, stated)

    def load(self, path: str | os.PathLike[str]) -> Contents:
        """Reads a file that `save` wrote.

        Raises:
            FileNotFoundError: No such file.
            Exception: `error`, where it is truncated, not a safetensors file, or of another format or version.
        """
        name = os.fspath(path)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"no {self.what} at {name!r}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise self.error(
                f"{name!r} is truncated, or not a {self.what} file: {error}. Copy it again, or make it again"
            ) from error
        found = metadata.get("format")
        if found != self.format:
            states = "has no format in its metadata" if found is None else f"is of format {found!r}"
            raise self.error(f"{name!r} {states}, expected {self.format!r}: give the file that holds the {self.what}")
        if metadata.get("version") != str(self.version):
            raise self.error(
                f"{name!r} is of version {metadata.get('version')} of {self.format}, this release reads version "
                f"{self.version}: read it with the release that wrote it, or make it again"
            )
        return Contents(name, self, tensors, metadata)


@dataclass(frozen=True)
class Contents:
    """What a tensor file holds. A part that is asked for and missing raises the error of the file's kind.

    Attributes:
        path: The file, for messages.
        file: What kind of file it is.
        tensors: Name -> tensor, on the CPU.
        metadata: Key -> text, ``format`` and ``version`` among them.
    """

    path: str
    file: TensorFile
    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    def damaged(self, reason: str) -> Exception:
        """The error to raise for a file whose contents do not match what it claims to be."""
        return self.file.error(
            f"{self.path!r} is not an intact {self.file.what} file: {reason}. Copy it again, or make it again"
        )

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """One tensor; its shape is checked if one is given."""
        if name not in self.tensors:
            raise self.damaged(f"it has no tensor {name!r}")
        found = self.tensors[name]
        if shape is not None and found.shape != shape:
            raise self.damaged(f"tensor {name!r} has shape {tuple(found.shape)}, expected {shape}")
        return found

    def by_layer(self, kind: str, layers: Iterable[str]) -> dict[str, Tensor]:
        """Layer name -> tensor ``kind/<layer>``, for those of the layers that have one."""
        return {layer: self.tensors[f"{kind}/{layer}"] for layer in layers if f"{kind}/{layer}" in self.tensors}

    def nested(self, kind: str, layers: Mapping[str, LayerShape]) -> Nested:
        """Layer name -> projection name -> tensor ``kind/<layer>/<projection>``, for all projections of the layers."""
        return {
            layer: {name: self.tensor(f"{kind}/{layer}/{name}") for name in shape.projections}
            for layer, shape in layers.items()
        }

    def text(self, key: str, default: str | None = None) -> str:
        """A value of the metadata as it is; the default, if there is one, where a file does not have the key."""
        found = self.metadata.get(key, default)
        if found is None:
            raise self.damaged(f"it has no {key!r} in its metadata")
        return found

    def decoded(self, key: str, default: str | None = None) -> Any:
        """A value of the metadata, or the default, read as JSON."""
        try:
            return json.loads(self.text(key, default))
        except json.JSONDecodeError as error:
            raise self.damaged(f"{key!r} in its metadata is not JSON ({error})") from error

    def layers(self) -> dict[str, LayerShape]:
        """The value of ``layers`` in the metadata, written from `shapes_of`: what the layers of a model are."""
        layers = self.decoded("layers")
        try:
            found = {name: LayerShape.from_dict(layer) for name, layer in layers.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise self.damaged(f"'layers' in its metadata describes no layers ({error!r})") from error
        if not found:
            raise self.damaged("'layers' in its metadata is empty")
        return found


def shapes_of(layers: Mapping[str, LayerShape]) -> dict[str, dict[str, Any]]:
    """Layer shapes as plain types, for the metadata of a file."""
    return {name: layer.to_dict() for name, layer in layers.items()}


def named(kind: str, tensors: Mapping[str, Tensor | Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Names of tensors in a file.

    Args:
        kind: What the names begin with.
        tensors: Layer name -> tensor, or layer name -> projection name -> tensor.

    Returns:
        ``kind/<layer>`` -> tensor, or ``kind/<layer>/<projection>`` -> tensor; `Contents.by_layer` and
        `Contents.nested` are the inverse.
    """
    found: dict[str, Tensor] = {}
    for layer, value in tensors.items():
        if isinstance(value, Tensor):
            found[f"{kind}/{layer}"] = value
        else:
            found |= {f"{kind}/{layer}/{name}": tensor for name, tensor in value.items()}
    return found
