"""Functions in processes of their own, forked off a server that has imported torch and transformers once.

For tests that kill processes or need several of them. A child starts in a fraction of a second; `fresh_python` of
support/models.py starts a new interpreter, for tests of what importing does.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["pytorch_lightning", "peft", "moe_precision.callbacks", "moe_precision.recipes"])


def start(function: Callable[..., None], *arguments: object, log: Path, **environment: str) -> BaseProcess:
    """Starts a process that calls a function with one thread; what it prints goes into the file ``log``."""
    process = _SERVER.Process(target=_call, args=(function, arguments, log, environment))
    process.start()
    return process


def _call(function: Callable[..., None], arguments: tuple, log: Path, environment: Mapping[str, str]) -> None:
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["tests"]
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    calibrate_on_few_tokens()
    function(*arguments)


def calibrate_on_few_tokens() -> None:
    """Of this process: see conftest.py."""
    from moe_precision.allocation import calibration

    calibration.TOKENS = 256


def finish(*processes: BaseProcess, logs: list[Path], seconds: float = 300) -> None:
    """Waits for processes to end well.

    Raises:
        AssertionError: One failed or took too long; all are ended, and the message has the end of its log.
    """
    for process, log in zip(processes, logs, strict=True):
        process.join(seconds)
        if process.exitcode != 0:
            for other in processes:
                other.kill()
            raise AssertionError(f"exit code {process.exitcode}: {log.read_text(errors='replace')[-3000:]}")
