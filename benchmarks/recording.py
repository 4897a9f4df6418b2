"""What recording costs: one record against one vector_norm over the same bytes, and a record a step in the recipe.

python -m benchmarks.recording
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_precision.moe_layers import find_moe_layers
from moe_precision.router_norms import RouterNormHistory, router_norms

LAYERS, EXPERTS, WIDTH = 32, 64, 2048
STEPS = 60


def routers_of_a_large_model() -> nn.Module:
    """Routers of the full width; the experts are tiny, since recording never reads them."""

    def layer() -> nn.Module:
        module = nn.Module()
        module.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        module.experts = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(EXPERTS))
        return module

    return nn.ModuleList(layer() for _ in range(LAYERS))


def medians(*functions: Callable[[], Any], rounds: int = 300) -> list[float]:
    """Median milliseconds of each function, called in turn."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, spent in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            spent.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(spent[rounds // 10 :]) for spent in times]


def one_record() -> None:
    """Prints the cost of a record for 32 layers x 64 experts x 2048."""
    layers = find_moe_layers(routers_of_a_large_model())
    history = RouterNormHistory.of(layers, "benchmark")
    stacked = torch.cat([layer.router_weight().detach() for layer in layers])  # (32 * 64, 2048): the same bytes
    steps = iter(range(10**9))
    ours, peer, each = medians(
        lambda: history.record(next(steps), router_norms(layers)),
        lambda: torch.linalg.vector_norm(stacked, dim=-1),
        lambda: [[row.norm().item() for row in layer.router_weight().detach()] for layer in layers[:1]],
    )
    print(f"one record, {LAYERS} layers x {EXPERTS} experts x {WIDTH}, float32, {torch.get_num_threads()} threads\n")
    print("| what | ms | ratio |\n|---|---|---|")
    print(f"| torch.linalg.vector_norm over the same bytes | {peer:.2f} | 1 |")
    print(f"| one record | {ours:.2f} | {ours / peer:.2f} |")
    print(f"| a norm and an .item() for each expert | {each * LAYERS:.1f} | {each * LAYERS / peer:.0f} |")


def a_record_every_step() -> None:
    """Prints the share of the step time of the smallest recipe, with offline wandb, at every step."""
    from pytorch_lightning.cli import LightningCLI

    from moe_precision.callbacks import RouterNormMonitor

    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        recipe = files("moe_precision.recipes").joinpath("pretrain_mixtral.yaml").read_text(encoding="utf-8")
        config = Path(folder, "recipe.yaml")
        config.write_text(recipe.replace("runs/pretrain_mixtral", folder), encoding="utf-8")
        arguments = ["--config", str(config), "--trainer.max_steps", str(STEPS), "--trainer.limit_val_batches", "0"]
        arguments += ["--trainer.enable_progress_bar", "false", "--trainer.num_sanity_val_steps", "0"]
        cli = LightningCLI(args=arguments, run=False, save_config_callback=None)
        (monitor,) = (c for c in cli.trainer.callbacks if isinstance(c, RouterNormMonitor))
        monitor.every_n_steps = 1
        spent: list[float] = []
        ends: list[float] = []
        hook = monitor.on_train_batch_end

        def timed(*args: Any) -> None:
            start = time.perf_counter()
            hook(*args)
            ends.append(time.perf_counter())
            spent.append(ends[-1] - start)

        monitor.on_train_batch_end = timed  # type: ignore[method-assign]
        cli.trainer.callbacks = [monitor]
        cli.trainer.fit(cli.model, cli.datamodule)
        step = statistics.median(b - a for a, b in pairwise(ends[5:]))
        record = statistics.median(spent[5:])
    print(f"\nrecord and log at every step of pretrain_mixtral (4 layers x 8 experts, offline wandb), {STEPS} steps\n")
    print("| step, ms | record and log, ms | share |\n|---|---|---|")
    print(f"| {1e3 * step:.1f} | {1e3 * record:.2f} | {100 * record / step:.2f} % |")


if __name__ == "__main__":
    one_record()
    a_record_every_step()
