"""Arithmetic in the dtype of its tensors, whatever autocast the caller is in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def without_autocast() -> Iterator[None]:
    """Turns autocast off inside, on the CPU and on the accelerator; also a decorator.

    What is fitted, stored or measured must not depend on whether the caller is in the middle of mixed precision, and
    some operations in float64 fail there.
    """
    accelerator = torch.accelerator.current_accelerator()
    with ExitStack() as stack:
        for device in {"cpu"} if accelerator is None else {"cpu", accelerator.type}:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield
