"""Forward passes that go through the layers of a model side by side: all through the first, then all through the next.

So each layer has to be in memory only once, whatever the number of batches. A model's own code runs, each forward pass
in a thread, which waits in front of a layer until it is advanced. Only one thread runs at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn


class _Stopped(BaseException):
    """Ends the thread of a forward pass whose rest nobody needs."""


class ForwardPass:
    """One forward pass, without gradients, that stops in front of every layer.

    Args:
        run: The forward pass.
    """

    def __init__(self, run: Callable[[], object]) -> None:
        self.waits_at: str | None = None
        self._run, self._stopped = run, False
        self._error: BaseException | None = None
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        self._go.acquire()
        _of_thread.current = self
        try:
            if not self._stopped:
                with torch.no_grad():
                    self._run()
        except _Stopped:
            pass
        except BaseException as error:
            self._error = error
        self.waits_at = None
        self._run = _nothing
        self._back.release()

    def wait(self, layer: str) -> None:
        """In front of a layer, in this pass's own thread: lets the others go on."""
        self.waits_at = layer
        self._back.release()
        self._go.acquire()
        if self._stopped:
            raise _Stopped

    def advance(self) -> None:
        """Runs it up to the next layer, or to its end; raises what it raises."""
        self._go.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Ends it where it is; one that has ended stays so."""
        if self._thread.is_alive():
            self._stopped = True
            self._go.release()
            self._thread.join()


_of_thread = threading.local()


def _nothing() -> None:
    pass


class Gates:
    """Hooks in front of layers, at which every `ForwardPass` waits; other forward passes do not notice.

    Args:
        layers: Name -> module.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._handles = [module.register_forward_pre_hook(partial(_wait, name)) for name, module in layers.items()]

    def close(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _wait(name: str, module: nn.Module, args: Any) -> None:
    current = getattr(_of_thread, "current", None)
    if current is not None:
        current.wait(name)
