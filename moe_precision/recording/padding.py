"""Which of a layer's rows are padding: what a batch marks by an ``attention_mask`` of 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


class Padding:
    """The masks of the batch that a model is called with."""

    def __init__(self) -> None:
        self._masks: dict[str, Tensor | None] = {}  # keyword -> (tokens,) bool

    def see(self, batch: Mapping[str, Any]) -> None:
        """Keeps the masks among the keyword arguments of a forward pass."""
        given = {name: batch.get(name) for name in ("attention_mask", "decoder_attention_mask")}
        self._masks = {
            name: mask.flatten() != 0 if isinstance(mask, Tensor) and mask.ndim == 2 else None
            for name, mask in given.items()
        }

    def real(self, layer: str, rows: int) -> Tensor | None:
        """Whether each row that a layer is given is a token, ``(rows,)`` bool; None where no mask is for these rows."""
        decoder = "decoder" in layer.split(".")
        mask = self._masks.get("decoder_attention_mask" if decoder else "attention_mask")
        return None if mask is None or len(mask) != rows else mask

    def forget(self) -> None:
        """Lets go of the masks."""
        self._masks = {}
