"""Memory that is used again and again: on CPUs, fresh memory costs more than the arithmetic that fills it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..compat import storage_users

_Kind = tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device]  # shape, strides


class Buffers:
    """A pool of tensors by shape, strides, dtype and device."""

    def __init__(self) -> None:
        self._free: dict[_Kind, list[Tensor]] = {}

    def take(self, like: Tensor) -> Tensor:
        """An uninitialized tensor like another."""
        free = self._free.get(_kind(like), [])
        if free:
            return free.pop()
        with torch.inference_mode(False):  # else it could not be used in training
            return torch.empty_like(like, requires_grad=False)

    def give(self, buffer: Tensor) -> bool:
        """Takes a tensor back for reuse, unless another still shares its memory; returns whether it did."""
        if storage_users(buffer) == 1:
            self._free.setdefault(_kind(buffer), []).append(buffer)
            return True
        return False


def _kind(tensor: Tensor) -> _Kind:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device
