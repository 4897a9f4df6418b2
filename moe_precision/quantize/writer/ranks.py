"""Ranks: processes that write one checkpoint together, on one machine or several, started by torchrun or a scheduler.

They meet in torch's key-value store and share a folder; no tensor is sent. A collective would wait for a rank that has
died until its time is up, and could not be interrupted. Here every rank says every few seconds that it lives, and one
that waits looks whether the others do.
"""

from __future__ import annotations

import json
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from threading import Event, Thread

import torch.distributed as dist

from ...errors import MoEPrecisionError

JOIN = 600.0  # seconds until all have come
SILENCE = 120.0  # seconds after which a rank that says nothing is taken for dead
VISIBLE = 90.0  # seconds until a network file system shows what another machine has written; NFS keeps lists for 60
_BEAT, LOOK = 5.0, 0.2  # seconds
_FAREWELL, _SHORT_FAREWELL = 30.0, 5.0  # seconds that rank 0 waits for the others, who may be in the middle of a shard
_KEPT = "what is packed is kept, and the same command goes on from it with any number of ranks"


class RankError(MoEPrecisionError, ValueError):
    """Ranks that do not belong together, or one that has ended before all were done."""


class Ranks:
    """This process and those that it works with; without a store it is alone, and nothing here waits.

    Args:
        rank: Which one it is; 0 is the first, which speaks and writes what there is one of.
        size: How many there are.
        store: What they share.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: dist.Store | None = None) -> None:
        self.rank, self.size, self._store = rank, size, store
        self._exchanges = count()
        self._looked = time.monotonic()
        self._heard = {other: (0, self._looked) for other in range(size) if other != rank}

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def gathered(self, value: str = "", watch: Callable[[], None] = lambda: None) -> list[str]:
        """What all ranks say, by rank; waits for all of them, which make the same calls in the same order.

        Args:
            value: What this rank says.
            watch: Called again and again while waiting.

        Raises:
            RankError: One has failed or died.
        """
        if self._store is None:
            return [value]
        exchange = next(self._exchanges)
        keys = [f"said/{exchange}/{rank}" for rank in range(self.size)]
        with _reaching_the_store():
            self._store.set(keys[self.rank], value)
            while not self._store.check(keys):
                watch()
                self.check()
                time.sleep(LOOK)
            return [said.decode() for said in self._store.multi_get(keys)]

    def check(self) -> None:
        """Raises `RankError` if another rank has failed, or has not been heard of for long."""
        if self._store is None:
            return
        with _reaching_the_store():
            if self._store.check(["failed"]):
                raise RankError(f"{self._store.get('failed').decode()}; {_KEPT}")
            if (now := time.monotonic()) < self._looked + _BEAT:
                return
            self._looked = now
            for rank, (beats, since) in self._heard.items():
                if (heard := self._store.add(f"alive/{rank}", 0)) != beats:
                    self._heard[rank] = heard, now
                elif now - since > (limit := SILENCE if beats else JOIN):
                    raise RankError(
                        f"rank {rank} of {self.size} has not been heard of for {limit:g} seconds: it or its machine "
                        f"has died; {_KEPT}"
                    )

    def check_same(self, parts: Mapping[str, str]) -> None:
        """Checks that all ranks do the same job.

        Args:
            parts: What it depends on -> a hash of it; causes come before what follows from them.

        Raises:
            RankError: A rank has another one; the message says of what.
        """
        said = [json.loads(one) for one in self.gathered(json.dumps({**parts, "host": socket.gethostname()}))]
        for rank, one in enumerate(said):
            if differing := [part for part in parts if one.get(part) != said[0].get(part)]:
                raise RankError(
                    f"rank {rank} on {one['host']!r} has another {differing[0]} than rank 0 on {said[0]['host']!r}: "
                    "start all ranks with the same command, releases and files (copies need the same times: rsync -a)"
                )

    def check_shared(self, folder: Path) -> None:
        """Checks that all ranks see the folder that rank 0 has made.

        Raises:
            RankError: One does not.
        """
        if self.size == 1:
            return
        host, name = socket.gethostname(), f".{secrets.token_hex(8)}.tmp"  # removed later even if this one is killed
        try:
            if self.first:
                (folder / name).touch()
            name = self.gathered(name)[0]
            sees = self.first or seen(folder / name)
            blind = [said for said in self.gathered("" if sees else f"rank {self.rank} on {host!r}") if said]
        finally:
            if self.first:
                (folder / name).unlink(missing_ok=True)
        if blind:
            raise RankError(
                f"{', '.join(blind)} cannot see what rank 0 writes into {str(folder)!r}: write to a folder of a file "
                "system that all machines share, under the same path"
            )

    def fail(self, error: BaseException) -> None:
        """Tells the others why this rank ends, unless one of them was first."""
        text = (
            f"rank {self.rank} of {self.size} on {socket.gethostname()!r} has ended ({type(error).__name__}: {error})"
        )
        if isinstance(error, RankError):  # says who
            text = str(error).removesuffix(f"; {_KEPT}")
        elif isinstance(error, KeyboardInterrupt):
            text = f"rank {self.rank} of {self.size} on {socket.gethostname()!r} was interrupted"
        if self._store is not None:
            with suppress(RuntimeError):
                self._store.compare_set("failed", "", text)

    @contextmanager
    def living(self) -> Iterator[None]:
        """Inside, the others see that this rank lives. At the end rank 0, which may hold the store, waits for them."""
        store, ended = self._store, Event()
        if store is None:
            yield
            return

        def beat() -> None:
            with suppress(RuntimeError):  # the store has gone, which the rank itself will notice
                while not ended.wait(_BEAT):
                    store.add(f"alive/{self.rank}", 1)

        with _reaching_the_store():
            store.add(f"alive/{self.rank}", 1)
        thread = Thread(target=beat, daemon=True)
        thread.start()
        patience = _FAREWELL
        try:
            yield
        except BaseException as error:
            self.fail(error)
            patience = _SHORT_FAREWELL
            raise
        finally:
            ended.set()
            thread.join()
            with suppress(RuntimeError):
                store.set(f"left/{self.rank}", "")
                until = time.monotonic() + patience
                while self.first and time.monotonic() < until:
                    if store.check([f"left/{rank}" for rank in range(self.size)]):
                        break
                    time.sleep(LOOK)


@contextmanager
def _reaching_the_store() -> Iterator[None]:
    """Turns what torch raises when the process that holds the store has gone into `RankError`."""
    try:
        yield
    except RuntimeError as error:
        raise RankError(f"rank 0, or the launcher that started the ranks, has ended; {_KEPT}") from error


def seen(*files: Path) -> bool:
    """Whether all files are there, after some time on a file system that shows them late."""
    until = time.monotonic() + VISIBLE
    while not all(file.exists() for file in files):
        if time.monotonic() > until:
            return False
        time.sleep(LOOK)
    return True
