"""A command that torchrun or a scheduler starts several times: each process does its part, the first one speaks."""

from __future__ import annotations

import argparse
import io
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout

from ..quantize.writer.meeting import all_ranks, environment
from ..quantize.writer.ranks import RankError


def by_ranks(run: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], None]:
    """``quantize`` as one of several ranks, if the environment says so.

    Args:
        run: Does the work of one of ``options.ranks``, and prints what the first one says.

    Returns:
        The same, which refuses options that cannot be divided, and prints nothing on other ranks than the first.
    """

    def run_as_rank(options: argparse.Namespace) -> None:
        if environment()[1] > 1:
            _check_divisible(options)
        with all_ranks() as ranks:
            options.ranks = ranks
            with _one_of_several(ranks.first) if ranks.size > 1 else nullcontext():
                run(options)
            if not ranks.first:
                options.document = None

    return run_as_rank


def _check_divisible(options: argparse.Namespace) -> None:
    """Raises `RankError` for what needs the whole model in one process."""
    alone = "in one process first, without torchrun and with WORLD_SIZE and RANK unset"
    if options.statistics_batches is not None:
        raise RankError(
            f"--statistics-batches cannot be divided among ranks: collect the statistics {alone} (`moe-precision plan "
            "CHECKPOINT --statistics-batches N -o PLAN` leaves them beside the plan, and so does collect_statistics in "
            "Python), then quantize by all ranks, which read that file"
        )
    if options.distill_steps is not None:
        raise RankError(
            f"--distill-steps cannot be divided among ranks: distill {alone} (distill_streamed in Python returns a "
            "grid: save it beside the plan), then quantize by all ranks, which take that grid"
        )
    if options.backend != "moe-precision":
        raise RankError(f"--backend {options.backend} cannot be divided among ranks: run it in one process")


@contextmanager
def _one_of_several(first: bool) -> Iterator[None]:
    """Inside, only the first rank prints and warns. SIGTERM ends one as Ctrl-C does, so that it tells the others."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if first:
            yield
            return
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        signal.signal(signal.SIGTERM, before)
