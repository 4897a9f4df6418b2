"""How ranks find each other: by torchrun's variables, in the store that they name."""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from threading import current_thread, main_thread

import torch.distributed as dist

from .ranks import JOIN, LOOK, RankError, Ranks


def environment() -> tuple[int, int]:
    """The rank of this process and how many there are, by the variables that torchrun sets; (0, 1) without them.

    Raises:
        RankError: Some variables are missing, or are no numbers that go together.
    """
    if "WORLD_SIZE" not in os.environ and "RANK" not in os.environ:
        return 0, 1
    needed = ["RANK", "WORLD_SIZE"]
    if os.environ.get("WORLD_SIZE") != "1":
        needed += ["MASTER_ADDR", "MASTER_PORT"]
    otherwise = "start it with torchrun, set all four, or unset WORLD_SIZE and RANK for a process that works alone"
    if missing := [name for name in needed if not os.environ.get(name)]:
        raise RankError(f"{', '.join(missing)} of torchrun's variables are not set, others are: {otherwise}")
    said = {name: os.environ[name] for name in needed if name != "MASTER_ADDR"}
    if not all(value.isdecimal() for value in said.values()) or int(said["RANK"]) >= int(said["WORLD_SIZE"]):
        raise RankError(f"expected numbers, with RANK below WORLD_SIZE, got {said}: {otherwise}")
    return int(said["RANK"]), int(said["WORLD_SIZE"])


@contextmanager
def all_ranks() -> Iterator[Ranks]:
    """Yields the ranks that this process is one of by the variables of torchrun, once all have come.

    Inside, a rank that ends with an exception tells the others. Without the variables a process is alone.

    Raises:
        RankError: The variables do not go together, or the ranks do not find each other.

    Example:
        >>> with all_ranks() as ranks:
        ...     quantize_checkpoint("checkpoint", "precision_plan.json", "packed", ranks=ranks)
        >>> ranks.size  # started by hand, not by torchrun
        1
    """
    rank, size = environment()
    if size == 1:
        yield Ranks()
        return
    if not dist.is_available():
        raise RankError("this build of torch has no torch.distributed: install another, or start one process")
    if dist.is_initialized():
        raise RankError(
            "torch.distributed is in use in this process already: start ranks of their own, with torchrun and "
            "`moe-precision quantize`"
        )
    try:
        with _interruptible():
            store = _met(rank, size, dist.PrefixStore("moe-precision", _store()))
    except (RuntimeError, ValueError, OSError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RankError(
            f"rank {rank} of {size} has not met the others at {where} (MASTER_ADDR and MASTER_PORT): "
            f"{str(error).splitlines()[0]}. Start all ranks within {JOIN / 60:g} minutes, with the address of rank 0 "
            "and a free port"
        ) from error
    ranks = Ranks(rank, size, store)
    with ranks.living():
        yield ranks


def _met(rank: int, size: int, store: dist.Store) -> dist.Store:
    """A part of the store that only these ranks know: torchrun keeps a store when it starts its ranks again.

    Each rank says hello with a name that is new, and rank 0 answers to that name, with the part that it has chosen.
    """
    own, until = secrets.token_hex(8), time.monotonic() + JOIN
    if rank:
        store.set(f"hello/{rank}", f"{own} {size}")
        while not store.check([f"welcome/{own}"]):
            if time.monotonic() > until:
                raise TimeoutError("rank 0 has not come")
            time.sleep(LOOK)
        part = dist.PrefixStore(store.get(f"welcome/{own}").decode(), store)
        if part.compare_set(f"joined/{rank}", "", own).decode() != own:
            raise RankError(f"two processes have RANK={rank}: give each its own, from 0 to {size - 1}")
        return part
    part = dist.PrefixStore(own, store)
    while missing := [other for other in range(1, size) if not part.check([f"alive/{other}"])]:
        if time.monotonic() > until:
            raise TimeoutError(f"ranks {missing} have not come with WORLD_SIZE={size}")
        for other in missing:
            if store.check([f"hello/{other}"]):
                name, its_size = store.get(f"hello/{other}").decode().split()
                if int(its_size) == size:  # others may be of ranks that were started before
                    store.set(f"welcome/{name}", own)
        time.sleep(LOOK)
    return part


@cache
def _store() -> dist.Store:
    """One for all calls of a process: a second one would meet the first, which is about to go."""
    found: tuple[dist.Store, int, int] = next(dist.rendezvous("env://", timeout=timedelta(seconds=JOIN)))
    return found[0]


@contextmanager
def _interruptible() -> Iterator[None]:
    """Inside, Ctrl-C ends the process at once, also where torch would not look at it for minutes."""
    if current_thread() is not main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
