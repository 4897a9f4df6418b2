"""Packed experts against llama.cpp on a CPU, side by side in one run on the same shapes.

    python -m benchmarks.llama_cpp [--rounds 3] [--threads 1 2] [--only experts | models]

llama.cpp is that of llama-cpp-python 0.3.36, which the command builds for this CPU in an environment of its own (once;
it needs a C++ compiler, and takes many minutes).

*experts*: the products of one layer (8 experts of 2048 x 4096, top 2; gate and up in one), from the router's choice on:
ours by `PackedProjection`, as in a model, and ggml's `mul_mat_id`. *models*: two such layers with attention and head in
bfloat16, or attention in 4 bits too, ours in transformers, and a GGUF of the same sizes in llama.cpp.

Each side is a process of its own; they take turns. Seconds are the processes' CPU time over all threads, so that what
else runs on the machine counts little; threads that wait for each other sleep. A ratio is of one round, with a routing
of its own; the table has the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.llama_sides import CHECKED, GROUP
from benchmarks.llama_tools import STORED

ENVIRONMENT = Path(".venv-exports/llama_cpp")
NEEDS = ["llama-cpp-python==0.3.36", "gguf==0.19.0"]
SCALES = 18 / GROUP  # bits that a weight takes for its group's scale and offset, as they are stored


class Pair(NamedTuple):
    """What is compared: widths of ours, which experts have in turn, and a type of ggml's."""

    widths: tuple[int, ...]
    kind: str

    @property
    def stored(self) -> float:
        """Stored bits of a weight of ours."""
        return sum(self.widths) / len(self.widths) + SCALES

    @property
    def name(self) -> str:
        """The widths in words."""
        return " and ".join(map(str, self.widths)) + " bits"


PAIRS = [Pair((2,), "iq2_xs"), Pair((2, 3), "q2_K"), Pair((3,), "q3_K"), Pair((4,), "q4_0")]
TOKENS = {"decode, batch 1": 1, "decode, batch 8": 8, "prefill, 32": 32, "prefill, 512": 512}
BF16 = Pair((16,), "bf16")
MODELS = [(BF16, BF16), (PAIRS[1], BF16), (PAIRS[3], BF16), (PAIRS[1], PAIRS[3])]  # of experts, and of attention


class Side:
    """A side in a process of its own, which answers with seconds."""

    def __init__(self, python: str, *arguments: str) -> None:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [python, "-m", "benchmarks.llama_sides", *arguments]
        # threads that wait sleep: waiting, which on a busy machine is long, is not counted
        environment = os.environ | {"OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(command, env=environment, **pipes)

    def seconds(self, **asked: Any) -> float:
        """Asks and waits."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("SECONDS "):
                return float(line.split()[1])
        raise RuntimeError(f"a side ended with status {self.process.wait()}; its messages are above")


@contextmanager
def sides(*commands: list[str]) -> Iterator[list[Side]]:
    """Processes, ended at the end."""
    found = [Side(*command) for command in commands]
    try:
        yield found
    finally:
        for side in found:
            side.process.kill()


class Cell(NamedTuple):
    """Milliseconds of ours and llama.cpp's, and how many times as fast ours is: medians over rounds.

    The ratio is the median of the rounds' ratios, so it need not be that of the other two.
    """

    ours: float
    theirs: float
    ratio: float

    @classmethod
    def of(cls, rounds: list[tuple[float, ...]]) -> Cell:
        """From the seconds of each round."""
        ours, theirs = (1e3 * statistics.median(side) for side in zip(*rounds, strict=True))
        return cls(ours, theirs, statistics.median(their / our for our, their in rounds))

    def __str__(self) -> str:
        return f"{self.ours:.1f}, {self.theirs:.1f}: {self.ratio:.2f}"


def print_head() -> None:
    """The head of both tables."""
    print(f"| ours, stored bits | llama.cpp, stored bits | threads | {' | '.join(TOKENS)} |")
    print("|---" * (3 + len(TOKENS)) + "|", flush=True)


def print_row(ours: str, theirs: str, threads: int, cells: list[Cell]) -> None:
    """One row of both tables."""
    print(f"| {ours} | {theirs} | {threads} | {' | '.join(map(str, cells))} |", flush=True)


def compare_experts(python: str, rounds: int, threads: list[int]) -> None:
    """Prints the table of one layer's products."""
    print("Experts of one layer; ms of ours, ms of llama.cpp: how many times as fast ours is\n")
    print_head()
    with sides([sys.executable, "our_experts"], [python, "their_experts"]) as (ours, theirs):
        for pair in PAIRS:
            for number in threads:
                cells = []
                for tokens in TOKENS.values():
                    found = []
                    for turn in range(rounds):
                        asked = {"threads": number, "tokens": tokens, "turn": turn}
                        our = ours.seconds(widths=pair.widths, **asked)
                        found.append((our, theirs.seconds(kind=pair.kind, **asked)))
                    cells.append(Cell.of(found))
                kind = f"{pair.kind}, {STORED[pair.kind]:.2f}"
                print_row(f"{pair.name}, {pair.stored:.2f}", kind, number, cells)


def compare_models(python: str, rounds: int, threads: list[int]) -> None:
    """Prints the table of models."""
    from benchmarks.inference import make, quantize_ours

    print("\nModels of two layers, experts in these bits; ms of a step or a prefill, and the ratio, as above\n")
    print_head()
    with tempfile.TemporaryDirectory() as temporary:
        source, packed, gguf = (Path(temporary, name) for name in ("source", "packed", "model.gguf"))
        make(source)
        for pair, attention in MODELS:
            if pair is BF16:
                names, checked = ("bf16", "bf16"), [save_logits(source)]
            else:
                names, checked = (f"{pair.name}, {pair.stored:.2f}", f"{pair.kind}, {STORED[pair.kind]:.2f}"), []
                quantize_ours(source, packed, pair.name, None if attention is BF16 else attention.widths[0])
            if attention is not BF16:
                names = names[0] + f"; attention {attention.name}", names[1] + f"; {attention.kind}"
            write = [python, "-m", "benchmarks.llama_models", str(source), pair.kind, attention.kind, str(gguf)]
            subprocess.run(write, check=True)
            ours = [sys.executable, "our_model", str(source if pair is BF16 else packed)]
            with sides(ours, [python, "their_model", str(gguf), *checked]) as both:
                for number in threads:
                    print_row(*names, number, [model_cell(*both, what, number, rounds) for what in TOKENS])
            shutil.rmtree(packed, ignore_errors=True)


def save_logits(source: Path) -> str:
    """Saves the float model's logits of `CHECKED`, with which the GGUF is compared, and returns the file's name."""
    import torch

    from benchmarks.inference import load_bf16

    with torch.inference_mode():
        logits = load_bf16(source, "")(input_ids=torch.tensor([CHECKED])).logits[0, -1]
    np.save(source / "logits.npy", logits.float().numpy())
    return str(source / "logits.npy")


def model_cell(ours: Side, theirs: Side, what: str, threads: int, rounds: int) -> Cell:
    """Rounds of one column, after one that is not counted."""
    tokens = TOKENS[what]
    shape = {"requests": tokens, "tokens": 0} if what.startswith("decode") else {"requests": 1, "tokens": tokens}
    found = [tuple(side.seconds(threads=threads, **shape) for side in (ours, theirs)) for _ in range(rounds + 1)]
    return Cell.of(found[1:])


def installed() -> str:
    """The Python of the environment with llama.cpp, which is made if it is not there."""
    python = ENVIRONMENT / "bin" / "python"
    if not (ENVIRONMENT / "installed").exists():
        print(f"building llama.cpp in {ENVIRONMENT}, which takes many minutes", file=sys.stderr, flush=True)
        venv.create(ENVIRONMENT, with_pip=True)
        settings = os.environ | {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"}
        command = [str(python), "-m", "pip", "install", "-q", "-c", "constraints.txt"]
        command += ["--no-binary", "llama-cpp-python", *NEEDS]
        subprocess.run(command, check=True, env=settings)
        (ENVIRONMENT / "installed").touch()
    return str(python)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="default 1 2")
    parser.add_argument("--only", choices=["experts", "models"], help="one of the two tables")
    parser.add_argument("--python", help="of an environment that holds llama.cpp already")
    options = parser.parse_args()
    python = options.python or installed()
    if options.only != "models":
        compare_experts(python, options.rounds, options.threads)
    if options.only != "experts":
        compare_models(python, options.rounds, options.threads)


if __name__ == "__main__":
    main()
