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
import tempfile
import time
from pathlib import Path
from statistics import median

from moe_precision.layers import LayerShape
from moe_precision.plans.layer_plan import LayerPlan
from moe_precision.plans.plan import PrecisionPlan

_OURS = [sys.executable, "-m", "moe_precision"]
COMMANDS = {
    "`python -c pass`": [sys.executable, "-c", "pass"],
    "`import torch`": [sys.executable, "-c", "import torch"],
    "`import transformers`": [sys.executable, "-c", "import transformers"],
    "`transformers --help`": [sys.executable, "-m", "transformers.cli.transformers", "--help"],
    "`import moe_precision`": [sys.executable, "-c", "import moe_precision"],
    "`moe-precision --help`": [*_OURS, "--help"],
    "`moe-precision show PLAN`": [*_OURS, "show", "PLAN"],
    "`moe-precision plan --help`": [*_OURS, "plan", "--help"],
}
PEER = "`import transformers`"


def seconds(command: list[str]) -> float:
    """Wall time of a new process."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def made_plan(folder: Path) -> Path:
    """A plan of 48 layers of 128 experts, as a file."""
    shape = LayerShape("gate.weight", 128, {"gate_up_proj": (1536, 2048), "down_proj": (2048, 768)})
    bits = {"gate_up_proj": [2, 3] * 64, "down_proj": [3, 2] * 64}
    layers = {f"model.layers.{at}.mlp": LayerPlan(shape, bits) for at in range(48)}
    path = folder / "plan.json"
    PrecisionPlan("qwen3_moe", layers, 128, "uniform").save(path)
    return path


def main(runs: int) -> None:
    """Prints the table."""
    with tempfile.TemporaryDirectory() as folder:
        plan = str(made_plan(Path(folder)))
        print_table({name: [plan if word == "PLAN" else word for word in c] for name, c in COMMANDS.items()}, runs)


def print_table(commands: dict[str, list[str]], runs: int) -> None:
    """Runs the commands and prints a row for each."""
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(runs + 1):
        for name, command in commands.items():
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
