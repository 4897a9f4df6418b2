"""What each of two ranks does in tests of `quantize` by several processes, as torchrun would start them."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.support.processes import start


def start_ranks(function: Callable[..., None], folder: Path, *arguments: object) -> list[BaseProcess]:
    """Two processes that call a function with ``folder``; what they print goes to ``rank_0.txt`` and ``rank_1.txt``."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    return [
        start(function, folder, *arguments, log=folder / f"rank_{rank}.txt", RANK=str(rank), **common)
        for rank in range(2)
    ]


def command(folder: Path, *more: str, out: str = "out", plan: str = "plan.json") -> list[str]:
    """``quantize`` with a file for each layer, and for what is in none."""
    names = [str(folder / "float"), str(folder / plan), str(folder / out)]
    return ["quantize", *names, "--max-shard-size", "1KB", *more]


def several(folder: Path) -> None:
    """Runs that succeed and runs that fail, one after the other, with what each has printed in ``said_<rank>.json``."""
    from moe_precision.checkpoints.headers import CheckpointError
    from moe_precision.cli.main import main
    from moe_precision.quantize.writer import ranks
    from moe_precision.quantize.writer.packer import Packer

    ranks.VISIBLE = 0.5
    rank, said = int(os.environ["RANK"]), {}

    def run(name: str, arguments: list[str]) -> None:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            status = main(arguments)
        said[name] = status, out.getvalue(), err.getvalue()

    run("whole", command(folder, "--json"))
    run("resumed", command(folder, out="resumed"))
    run("plan", command(folder, out="other", plan=("plan.json", "other.json")[rank]))
    run("folder", command(folder, out=("here/out", "there/out")[rank]))

    write = Packer.write

    def failing(self, shard, *rest):
        if rank == 1 and len(written) == 1:
            raise CheckpointError("a weight of layer 1 is not finite")
        write(self, shard, *rest)
        written.append(shard.file)

    written: list[str] = []
    Packer.write = failing
    run("failed", command(folder, out="failed"))
    Path(folder, f"said_{rank}.json").write_text(json.dumps(said))


def until_killed(folder: Path) -> None:
    """Rank 1 waits in its second file, and writes one that says so."""
    import sys

    from moe_precision.cli.main import main
    from moe_precision.quantize.writer import ranks
    from moe_precision.quantize.writer.packer import Packer

    ranks.SILENCE, ranks._BEAT, ranks._SHORT_FAREWELL = 1.0, 0.1, 0.5
    signal.signal(signal.SIGINT, signal.default_int_handler)
    write, written = Packer.write, []

    def waiting(self, shard, *rest):
        if os.environ["RANK"] == "1" and written:
            Path(folder, "waits").touch()
            time.sleep(60)
        write(self, shard, *rest)
        written.append(shard.file)

    Packer.write = waiting
    sys.exit(main(command(folder)))
