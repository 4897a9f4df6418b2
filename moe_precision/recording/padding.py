"""Which of a layer's rows are padding: what a batch marks by an ``attention_mask`` of 0."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..layers.module_tree import root_model


class Padding:
    """Looks at the masks of every batch that a model is called with, until it is closed.

    Args:
        model: The model, or a wrapper around it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._masks: dict[str, Tensor | None] = {}  # keyword -> (tokens,) bool
        self._handle = root_model(model).register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = {name: kwargs.get(name) for name in ("attention_mask", "decoder_attention_mask")}
        self._masks = {
            name: mask.flatten() != 0 if isinstance(mask, Tensor) and mask.ndim == 2 else None
            for name, mask in given.items()
        }

    def real(self, layer: str, rows: int) -> Tensor | None:
        """Whether each row that a layer is given is a token, ``(rows,)`` bool; None where no mask is for these rows."""
        decoder = "decoder" in layer.split(".")
        mask = self._masks.get("decoder_attention_mask" if decoder else "attention_mask")
        return None if mask is None or len(mask) != rows else mask

    def close(self) -> None:
        """Stops looking; a second call does nothing."""
        self._handle.remove()
