"""How long the command line takes to say what it can do, against importing what it is built on, in one run.

    python -m benchmarks.startup

Each row is the median of new processes, which take turns so that all meet the same load. The peers are
``transformers --help``, the command line of the largest dependency, and ``import transformers``, which the commands
themselves need.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from statistics import median

_OURS = [sys.executable, "-m", "moe_precision.cli"]
COMMANDS = {
    "`python -c pass`": [sys.executable, "-c", "pass"],
    "`import torch`": [sys.executable, "-c", "import torch"],
    "`import transformers`": [sys.executable, "-c", "import transformers"],
    "`transformers --help`": [sys.executable, "-m", "transformers.cli.transformers", "--help"],
    "`import moe_precision`": [sys.executable, "-c", "import moe_precision"],
    "`moe-precision --help`": [*_OURS, "--help"],
    "`moe-precision plan --help`": [*_OURS, "plan", "--help"],
}
PEER = "`import transformers`"


def seconds(command: list[str]) -> float:
    """Wall time of a new process."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def main(runs: int) -> None:
    """Prints the table."""
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(runs + 1):
        for name, command in COMMANDS.items():
            found = seconds(command)
            if number:  # the first fills the caches of the file system
                taken[name].append(found)
    peer = median(taken[PEER])
    print(f"| process | s | ratio to {PEER} |\n|---|---|---|")
    for name, times in taken.items():
        print(f"| {name} | {median(times):.2f} | {median(times) / peer:.2f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="processes per row (default 5)")
    main(parser.parse_args().runs)
