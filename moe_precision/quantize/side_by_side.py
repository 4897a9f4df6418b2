"""Forward passes that go through the layers of a model side by side: all through the first, then all through the next.

So each layer has to be in memory only once, whatever the number of batches. A model's own code runs, each forward pass
in a thread of its own, which waits at every layer until the caller has run that layer for it. Only one thread runs at a
time, and all layers run in the caller's: each thread would keep for itself the memory that it has freed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ..compat import call_through, called_as_before


class ForwardPass:
    """One forward pass, without gradients, that waits at every layer of `Gates`.

    Args:
        run: The forward pass.

    Attributes:
        waits_at: Name of the layer where it waits; None before its start and after its end.
    """

    def __init__(self, run: Callable[[], object]) -> None:
        self.waits_at: str | None = None
        self._run, self._stopped = run, False
        self._error: BaseException | None = None
        self._layer: Callable[[], Any] | None = None  # what it waits for
        self._output: Any = None
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._work, name="forward pass", daemon=True)

    def _work(self) -> None:
        _of_thread.current = self
        try:
            with torch.no_grad():
                self._run()
        except SystemExit:  # stopped
            pass
        except BaseException as error:
            self._error = error
        self.waits_at = self._layer = None
        self._back.release()

    def wait_for(self, name: str, layer: Callable[[], Any]) -> Any:
        """In its own thread: the output of a layer, which the caller of `advance` runs."""
        self.waits_at, self._layer = name, layer
        self._back.release()
        self._go.acquire()
        if self._stopped:
            raise SystemExit  # ends this thread alone, and no model's `except Exception` catches it
        output, self._output = self._output, None
        return output

    def start(self) -> None:
        """Runs it up to the first layer; raises what it raises."""
        self._thread.start()
        self._until_it_waits()

    @torch.no_grad()
    def peek(self) -> None:
        """Runs the layer where it waits, and leaves it there; raises what the layer raises."""
        assert self._layer is not None
        self._layer()

    @torch.no_grad()
    def advance(self) -> None:
        """Runs the layer where it waits, and the pass up to the next one, or to its end; raises what they raise."""
        assert self._layer is not None
        layer, self._layer = self._layer, None
        self._output = layer()
        self._go.release()
        self._until_it_waits()

    def _until_it_waits(self) -> None:
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Ends it where it waits; one that has ended, or was never started, stays so."""
        if self._thread.is_alive():
            self._stopped = True
            self._go.release()
            self._thread.join()


_of_thread = threading.local()


class Gates:
    """Makes every `ForwardPass` wait at some layers; calls from elsewhere do not notice.

    Args:
        layers: Name -> module.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = list(layers.values())
        for name, module in layers.items():
            call_through(module, partial(_gate, name))

    def close(self) -> None:
        """Lets go of the layers."""
        for module in self._layers:
            called_as_before(module)


def _gate(name: str, call: Callable[[], Any]) -> Any:
    current: ForwardPass | None = getattr(_of_thread, "current", None)
    return call() if current is None else current.wait_for(name, call)
