"""Shards written one after the other in this process, or side by side in several new ones."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Generator, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from pathlib import Path
from threading import Thread, current_thread, main_thread
from typing import Any

import torch

from ...checkpoints.checkpoint import Checkpoint
from ..config import PlanQuantizationConfig
from .packer import Packer
from .shards import Shard

Settings = dict[str, Any]  # keywords of `PlanQuantizationConfig` as they were given: paths as paths


def written(
    missing: list[Shard], packer: Packer, folder: Path, job: str, workers: int, settings: Settings
) -> Generator[Shard, None, None]:
    """Writes shards and yields each when it is complete.

    Args:
        missing: What to write.
        packer: The packer of this process; others make their own.
        folder: Where to write.
        job: Goes into the metadata of each file.
        workers: How many processes; 1 is this one.
        settings: For the processes' own `PlanQuantizationConfig`.
    """
    if workers == 1 or len(missing) < 2:
        for shard in missing:
            packer.write(shard, folder, job)
            yield shard
        return
    workers = min(workers, len(missing))
    threads = max(1, torch.get_num_threads() // workers)
    start = packer.checkpoint, settings, threads, os.getpid()
    others = active_children()
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, start) as pool:
        try:
            with _uninterrupted():
                jobs = {pool.submit(_work, shard, folder, job): shard for shard in missing}
            for done in as_completed(jobs):
                done.result()
                yield jobs[done]
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, KeyboardInterrupt):  # else they would pack on, for minutes
                for worker in active_children():
                    if worker not in others:
                        worker.terminate()
            raise


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Processes that are started inside ignore Ctrl-C, which is for the one that started them."""
    if current_thread() is not main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


_of_worker: dict[str, Packer] = {}


def _start_worker(checkpoint: Checkpoint, settings: Settings, threads: int, parent: int) -> None:
    Thread(target=_die_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the process that started this one has shown them
        _of_worker["packer"] = Packer(checkpoint, PlanQuantizationConfig(**settings))


def _die_with(parent: int) -> None:
    """Ends this process soon after the one that started it, which may have been killed."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _work(shard: Shard, folder: Path, job: str) -> None:
    _of_worker["packer"].write(shard, folder, job)
