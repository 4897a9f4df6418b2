"""Rounding under a second moment: time on single matrices, beside the fit without statistics and GPTQModel's GPTQ.

    INSTALL_ONLY=1 tests/export/real_tools/run.sh gptqmodel   # the peer, in an environment of its own
    python -m benchmarks.rounding [--full] [--bits 2]

Two shapes: one of gate and up, and one of down, whose second moment is the larger. By default they are a quarter of
Mixtral's each way, which takes minutes; ``--full`` takes Mixtral's own. Without the peer its columns are empty. Every
one gets the same weight and the same second moment, which is not collected here.
"""

from __future__ import annotations

import argparse
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from moe_precision.quantize.codec import columns
from moe_precision.quantize.codec.fitting import quantize_matrix

SHAPES = (3584, 1024), (1024, 3584)
FULL = (14336, 4096), (4096, 14336)
GROUP = 64
PEER = Path(".venv-exports/gptqmodel/bin/python")


def matrix(out: int, inp: int) -> Tensor:
    """A weight ``(out, in)`` float32."""
    return torch.randn(out, inp, generator=torch.Generator().manual_seed(0)) * 0.02


def second_moment(inp: int) -> Tensor:
    """Of inputs that share a few directions beside a part of their own, in float32."""
    random = torch.Generator().manual_seed(1)
    shared = torch.randn(inp, 256, generator=random) * torch.logspace(0, -1, 256)
    moment = shared @ shared.T / 256
    moment.diagonal().add_(torch.rand(inp, generator=random) ** 4)
    return moment


def relative(difference: Tensor, weight: Tensor, moment: Tensor) -> float:
    """Change of the output, relative to the output: ``(q - v) H (q - v)^T / v H v^T``, summed over the rows."""
    return float(((difference @ moment) * difference).sum() / ((weight @ moment) * weight).sum())


def error(weight: Tensor, quantized: tuple[Tensor, Tensor, Tensor], moment: Tensor) -> float:
    """The change of the output by codes, scales and offsets."""
    codes, scale, offset = (one.float() for one in quantized)
    values = (codes.unflatten(1, (-1, GROUP)) * scale.unsqueeze(-1) + offset.unsqueeze(-1)).flatten(1)
    return relative(values - weight, weight, moment)


def seconds(function: Callable[[], object], rounds: int) -> float:
    """The least of several times."""
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        found.append(time.perf_counter() - start)
    return min(found)


def peer(out: int, inp: int, bits: int, rounds: int) -> tuple[float, float] | None:
    """Seconds and error of GPTQModel's GPTQ, in its own environment; None where it is not installed."""
    if not PEER.exists():
        return None
    command = [str(PEER), "-m", "benchmarks.rounding", "--peer", f"{out}x{inp}", "--bits", str(bits)]
    done = subprocess.run([*command, "--rounds", str(rounds)], check=True, capture_output=True, text=True)
    time_taken, wrong = done.stdout.split()[-2:]
    return float(time_taken), float(wrong)


def gptqmodel(out: int, inp: int, bits: int, rounds: int) -> tuple[float, float]:
    """Seconds and error of GPTQModel's GPTQ for one linear layer whose second moment it is given."""
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    weight, moment = matrix(out, inp), second_moment(inp)

    def prepared() -> GPTQ:
        layer = torch.nn.Linear(inp, out, bias=False)
        layer.weight.data = weight.clone()
        task = GPTQ(layer, QuantizeConfig(bits=bits, group_size=GROUP, desc_act=True, sym=False))
        task.quantizer.configure(perchannel=True)
        task.H, task.nsamples = moment.clone(), 16 * inp
        return task

    found = []
    for _ in range(rounds):
        task = prepared()
        start = time.perf_counter()
        quantized = task.quantize()[0]
        found.append(time.perf_counter() - start)
    return min(found), relative(quantized - weight, weight, moment)


def compare(bits: int, full: bool) -> None:
    """Prints the table."""
    rounds = 1 if full else 3
    columns.library()  # compiles it
    print(
        f"one matrix, {bits} bits, group {GROUP}, {torch.get_num_threads()} threads; seconds, in brackets as a ratio to"
    )
    print("the fit without statistics; errors are the change of the output, relative to it\n")
    print("| out x in | without | torch | C++ | GPTQModel | C++, times as fast | errors, in the same order |")
    print("|---|---|---|---|---|---|---|")
    for out, inp in FULL if full else SHAPES:
        weight, moment = matrix(out, inp), second_moment(inp)
        quantize_matrix(weight[:64], bits, GROUP, second_moment=moment[:inp, :inp])  # warms up
        results: list[tuple[Tensor, Tensor, Tensor]] = []

        def fit(second: Tensor | None, weight: Tensor = weight, results: list = results) -> None:  # type: ignore[type-arg]
            results.append(quantize_matrix(weight, bits, GROUP, second_moment=second))

        times, errors = [], []
        for compiled, second in ((True, None), (False, moment), (True, moment)):
            with patch.object(columns, "library", columns.library if compiled else lambda: None):
                times.append(seconds(lambda second=second: fit(second), rounds))  # type: ignore[misc]
            errors.append(error(weight, results[-1], moment))
        of_peer = peer(out, inp, bits, rounds)
        ratios = [f"{one:.2f} [{one / times[0]:.1f}]" for one in times[1:]]
        versus = ["", ""]
        if of_peer is not None:
            versus = [f"{of_peer[0]:.2f}", f"{of_peer[0] / times[2]:.1f}"]
            errors.append(of_peer[1])
        cells = [f"{out} x {inp}", f"{times[0]:.2f}", *ratios, *versus, ", ".join(f"{one:.4f}" for one in errors)]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="Mixtral's own shapes, 14336 x 4096 and 4096 x 14336")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("default")
    if options.peer:
        print(*gptqmodel(*map(int, options.peer.split("x")), options.bits, options.rounds))
    else:
        compare(options.bits, options.full)
