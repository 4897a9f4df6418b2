"""What annealing costs: a training step on the grid against a float step, and how much more memory it takes.

    python -m benchmarks.annealing

Runs the recipe's model with its batch, with a teacher too, and a layer of Mixtral's shape at half its width: time per
weight depends not on the width but on the tokens that an expert gets. Steps on and off the grid alternate; memory is
measured in a process of its own for each.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.resources import files

import torch
import yaml
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from moe_precision import allocate, find_moe_layers
from moe_precision.annealing.hooks import GridHooks
from moe_precision.annealing.teacher import Teacher
from moe_precision.annealing.teacher_weights import weights_now
from moe_precision.quantize.codec.grid import Grid

HIDDEN, INTERMEDIATE, TOKENS = 2048, 7168, 2048


def recipe() -> tuple[nn.Module, Callable[[], Tensor], int]:
    """The model of recipes/pretrain_mixtral.yaml, its loss on a batch of its size, and its group size."""
    settings = yaml.safe_load(files("moe_precision.recipes").joinpath("pretrain_mixtral.yaml").read_text("utf-8"))
    data = settings["data"]["init_args"]
    config = {**settings["model"]["init_args"]["config"], "vocab_size": data["vocab_size"]}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).train()
    ids = torch.randint(3, data["vocab_size"], (data["batch_size"], data["sequence_length"]))
    return model, lambda: model(input_ids=ids, labels=ids, use_cache=False).loss, 64


def block(
    dtype: torch.dtype = torch.float32, count: int = 1, tokens: int = TOKENS
) -> tuple[nn.Module, Callable[[], Tensor], int]:
    """MoE layers of Mixtral's shape at half its width, one after the other, and a loss on a number of tokens."""
    config = MixtralConfig(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, experts_implementation="grouped_mm")
    layers = nn.ModuleList(MixtralSparseMoeBlock(config) for _ in range(count)).to(dtype).train()
    for parameter in layers.parameters():
        nn.init.normal_(parameter, std=0.02)
    x = torch.randn(1, tokens, HIDDEN, dtype=dtype, requires_grad=True)  # as the layers below would give

    def loss() -> Tensor:
        hidden = x
        for layer in layers:
            hidden = hidden + layer(hidden)
        return hidden.float().square().mean()

    return layers, loss, 128


def in_turn(model: nn.Module, loss: Callable[[], Tensor], group_size: int, rounds: int) -> list[list[float]]:
    """Seconds of float steps, of steps on the grid that follow, and of a transformers model also with a teacher."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        return time.perf_counter() - start

    layers = find_moe_layers(model)
    plan = allocate(model, method="random", average_bits=2.0, bits=(1, 2, 3), group_size=group_size)
    hooks = GridHooks(layers, Grid.fit(layers, plan))
    weights = weights_now(model) if isinstance(model, PreTrainedModel) else {}
    found = []
    for _ in range(rounds + 1):
        with hooks.lifted():
            times = [step()]
        times.append(step())
        if weights:
            teacher = Teacher(model, weights, 1.0, hooks)
            times.append(step())
            teacher.close()
        found.append(times)
    return found[1:]  # the first ones allocate


def peak(on: bool, count: int = 4) -> None:
    """Prints the most bytes by which this process grows in steps of several layers, after their gradients exist."""
    model, loss, group_size = block(count=count, tokens=64)  # few, since weights are to be measured
    layers = find_moe_layers(model)
    plan = allocate(model, method="uniform", average_bits=2, group_size=group_size)
    grid = Grid.fit(layers, plan) if on else None
    loss().backward()
    before = _resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak
    if grid is not None:
        GridHooks(layers, grid)
    for _ in range(2):
        loss().backward()
    print(_resident("VmHWM") - before)


def _resident(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))


def main() -> None:
    """Prints both tables."""
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads, AdamW, one step\n")
    print("Medians over rounds of steps, and the quartiles of the ratios to the float step.\n")
    print("| model | float step, s | on the grid, s | ratio | with a teacher, s | ratio |\n|---|---|---|---|---|---|")
    shape = f"{HIDDEN} x {INTERMEDIATE}, 8 experts top-2, {TOKENS:,} tokens"
    cases = {
        "recipes/pretrain_mixtral.yaml": (recipe, 60),
        f"Mixtral layer, {shape}, float32": (block, 8),
        f"Mixtral layer, {shape}, bfloat16": (lambda: block(torch.bfloat16), 8),
    }
    for name, (build, rounds) in cases.items():
        off, *others = zip(*in_turn(*build(), rounds), strict=True)
        cells = [f"{statistics.median(off):.3f}"]
        for times in others:
            low, ratio, high = statistics.quantiles([on / base for on, base in zip(times, off, strict=True)], n=4)
            cells += [f"{statistics.median(times):.3f}", f"{ratio:.2f} [{low:.2f}, {high:.2f}]"]
        print(f"| {name} | {' | '.join(cells + [''] * (5 - len(cells)))} |", flush=True)
    command = [sys.executable, "-c", "import sys; from benchmarks.annealing import peak; peak(sys.argv[1] == 'on')"]
    grown = [int(subprocess.check_output([*command, which], text=True)) for which in ("off", "on")]
    layer = 3 * HIDDEN * INTERMEDIATE * 8 * 4
    print("\n| 4 layers of that shape, float32 | MB |\n|---|---|")
    for name, size in (("one layer's experts", layer), ("growth in a float step", grown[0]), ("on the grid", grown[1])):
        print(f"| {name} | {size / 1e6:.0f} |")
    print(f"| extra, in layers | {(grown[1] - grown[0]) / layer:.2f} |")


if __name__ == "__main__":
    main()
