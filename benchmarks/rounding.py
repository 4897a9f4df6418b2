"""Rounding under a second moment: time on single matrices, beside the fit without statistics and GPTQModel's GPTQ.

    INSTALL_ONLY=1 tests/export/real_tools/run.sh gptqmodel   # the peer, in an environment of its own
    python -m benchmarks.rounding [--full] [--bits 2] [--cpu] [--no-torch]
    python -m benchmarks.rounding --deepseek-v3 [--bits 2] [--cores 32]   # hours for all of its experts

Two shapes: one of gate and up, and one of down, whose second moment is the larger. By default they are a quarter of
Mixtral's each way, which takes minutes; ``--full`` takes Mixtral's own. ``--cpu`` measures the CPU time of one thread,
which tells more than wall time while others use the machine. Without the peer its columns are empty. Every
one gets the same weight and the same second moment, which is not collected here.

``--deepseek-v3`` measures one expert of DeepSeek-V3 in CPU time of one thread, with and without a second moment, and
multiplies. Not in it: reading, packing and writing, and what threads lose that share a matrix.
"""

from __future__ import annotations

import argparse
import subprocess
import time
from collections.abc import Callable
from functools import partial
from math import isnan, nan
from pathlib import Path
from typing import TypeVar
from unittest.mock import patch

import torch
from torch import Tensor

from moe_precision.quantize.codec import columns
from moe_precision.quantize.codec.fitting import quantize_matrix

SHAPES = (3584, 1024), (1024, 3584)
FULL = (14336, 4096), (4096, 14336)
DEEPSEEK_V3 = (4096, 7168), (7168, 2048)  # gate and up, which have the same inputs, and down
LAYERS, EXPERTS, MACHINES = 58, 256, (1, 4, 16, 58)
GROUP = 64
T = TypeVar("T")
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


class Clock:
    """Seconds of wall time, or of CPU time of one thread."""

    def __init__(self, cpu: bool, rounds: int) -> None:
        self.cpu, self.rounds, self.now = cpu, rounds, time.process_time if cpu else time.perf_counter
        if cpu:
            torch.set_num_threads(1)

    def least(self, prepare: Callable[[], Callable[[], T]]) -> tuple[float, T]:
        """The least of several times of what is prepared, and what it returns."""
        found = []
        for _ in range(self.rounds):
            function = prepare()
            start = self.now()
            result = function()
            found.append(self.now() - start)
        return min(found), result


def peer(out: int, inp: int, bits: int, clock: Clock) -> tuple[float, float] | None:
    """Seconds and error of GPTQModel's GPTQ, in its own environment; None where it is not installed."""
    if not PEER.exists():
        return None
    command = [str(PEER), "-m", "benchmarks.rounding", "--peer", f"{out}x{inp}", "--bits", str(bits)]
    command += ["--rounds", str(clock.rounds), *(["--cpu"] if clock.cpu else [])]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    time_taken, wrong = done.stdout.split()[-2:]
    return float(time_taken), float(wrong)


def gptqmodel(out: int, inp: int, bits: int, clock: Clock) -> tuple[float, float]:
    """Seconds and error of GPTQModel's GPTQ for one linear layer whose second moment it is given."""
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    weight, moment = matrix(out, inp), second_moment(inp)

    def prepare() -> Callable[[], tuple[Tensor, ...]]:
        layer = torch.nn.Linear(inp, out, bias=False)
        layer.weight.data = weight.clone()
        task = GPTQ(layer, QuantizeConfig(bits=bits, group_size=GROUP, desc_act=True, sym=False))
        task.quantizer.configure(perchannel=True)
        task.H, task.nsamples = moment.clone(), 16 * inp
        return partial(task.quantize)

    spent, quantized = clock.least(prepare)
    return spent, relative(quantized[0] - weight, weight, moment)


def compare(bits: int, shapes: tuple[tuple[int, int], ...], clock: Clock, torch_too: bool = True) -> None:
    """Prints the table; without torch its cells hold a dash."""
    compiled = columns.library()
    kind = "CPU seconds of one thread" if clock.cpu else f"seconds, {torch.get_num_threads()} threads"
    print(f"one matrix, {bits} bits, group {GROUP}: {kind}, in brackets as a ratio to the fit without statistics;")
    print("errors are the change of the output, relative to it\n")
    print("| out x in | without | torch | C++ | GPTQModel | C++, times as fast | errors, in the same order |")
    print("|---|---|---|---|---|---|---|")
    for out, inp in shapes:
        weight, moment = matrix(out, inp), second_moment(inp)
        quantize_matrix(weight[:64], bits, GROUP, second_moment=moment)  # warms up
        times, errors = [], []
        for library, second in ((compiled, None), (None, moment), (compiled, moment)):
            if second is not None and library is None and not torch_too:
                times.append(nan)
                errors.append(nan)
                continue
            fit = partial(quantize_matrix, weight, bits, GROUP, second_moment=second)
            with patch.object(columns, "library", partial(_given, library)):
                spent, quantized = clock.least(partial(_given, fit))
            times.append(spent)
            errors.append(error(weight, quantized, moment))
        ratios = ["-" if isnan(one) else f"{one:.2f} [{one / times[0]:.1f}]" for one in times[1:]]
        versus = ["", ""]
        of_peer = peer(out, inp, bits, clock)
        if of_peer is not None:
            versus = [f"{of_peer[0]:.2f}", f"{of_peer[0] / times[2]:.1f}"]
            errors.append(of_peer[1])
        cells = [
            f"{out} x {inp}",
            f"{times[0]:.2f}",
            *ratios,
            *versus,
            ", ".join("-" if isnan(one) else f"{one:.4f}" for one in errors),
        ]
        print("| " + " | ".join(cells) + " |", flush=True)


def hours(bits: int, cores: int, clock: Clock) -> None:
    """Prints what all experts of DeepSeek-V3 take, in core hours and on several machines that get whole layers."""
    print(f"DeepSeek-V3: {LAYERS} layers of {EXPERTS} experts, {3 * LAYERS * EXPERTS:,} matrices, {bits} bits;")
    print(f"group {GROUP}, CPU seconds of one thread, and hours on machines with {cores} cores\n")
    quantize_matrix(matrix(64, 128), bits, GROUP, second_moment=second_moment(128))  # warms up
    heads = ["statistics", *(f"{out} x {inp}" for out, inp in DEEPSEEK_V3), "core hours"]
    heads += [f"{count} machine{'s' * (count > 1)}" for count in MACHINES]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for name in ("without", "with"):
        seconds = []
        for out, inp in DEEPSEEK_V3:
            moment = second_moment(inp) if name == "with" else None
            fit = partial(quantize_matrix, matrix(out, inp), bits, GROUP, second_moment=moment)
            seconds.append(clock.least(partial(_given, fit))[0])
        layer = EXPERTS * sum(seconds) / 3600
        cells = [name, *(f"{one:.1f}" for one in seconds), f"{LAYERS * layer:,.0f}"]
        cells += [f"{-(-LAYERS // count) * layer / cores:.1f}" for count in MACHINES]
        print("| " + " | ".join(cells) + " |", flush=True)


def _given(value: T) -> T:
    return value


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="Mixtral's own shapes, 14336 x 4096 and 4096 x 14336")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="CPU time of one thread")
    parser.add_argument("--no-torch", action="store_true", help="leave out torch, which takes the longest")
    parser.add_argument("--deepseek-v3", action="store_true", help="hours for all experts of DeepSeek-V3 instead")
    parser.add_argument("--cores", type=int, default=32, help="of each machine, for --deepseek-v3 (default 32)")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    long = options.full or options.deepseek_v3
    clock = Clock(options.cpu or options.deepseek_v3, options.rounds or (1 if long else 3))
    if options.peer:
        out, inp = map(int, options.peer.split("x"))
        print(*gptqmodel(out, inp, options.bits, clock))
    elif options.deepseek_v3:
        hours(options.bits, options.cores, clock)
    else:
        compare(options.bits, FULL if options.full else SHAPES, clock, not options.no_torch)
