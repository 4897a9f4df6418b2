"""What recording costs: one record against one vector_norm over the same bytes, one record per step in the recipe, and
the experts' statistics in the recipe, in its last steps and after them.

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
from torch import Tensor, nn

from moe_precision.layers.moe_layers import find_moe_layers
from moe_precision.recording import collector
from moe_precision.recording.history import RouterNormHistory
from moe_precision.recording.loads import LoadCounter
from moe_precision.recording.router_norms import router_norms

LAYERS, EXPERTS, WIDTH = 32, 64, 2048
STEPS = 60
WHOLE = 1400  # steps of the recipe


def routers_of_a_large_model() -> nn.Module:
    """Routers of the full width; the experts are tiny, since recording never reads them."""

    def layer() -> nn.Module:
        module = nn.Module()
        module.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        module.experts = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(EXPERTS))
        return module

    return nn.ModuleList(layer() for _ in range(LAYERS))


def medians(*functions: Callable[[], Any], rounds: int, flush: Tensor | None = None) -> list[float]:
    """Median milliseconds of each function, called in turn; a buffer to ``flush`` is rewritten before each call."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, spent in zip(functions, times, strict=True):
            if flush is not None:
                flush.add_(1)
            start = time.perf_counter()
            function()
            spent.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(spent[rounds // 10 :]) for spent in times]


def one_record() -> None:
    """Prints the cost of a record for 32 layers x 64 experts x 2048."""
    layers = find_moe_layers(routers_of_a_large_model())
    history = RouterNormHistory.of(layers, "benchmark")
    stacked = torch.randn(LAYERS * EXPERTS, WIDTH)
    for layer, rows in zip(layers, stacked.split(EXPERTS), strict=True):
        layer.router_weight().data = rows  # the same bytes
    steps = iter(range(10**9))

    def record() -> None:
        history.record(next(steps), router_norms(layers))

    def one_norm() -> Tensor:
        return torch.linalg.vector_norm(stacked)

    def row_norms() -> Tensor:
        return torch.linalg.vector_norm(stacked, dim=-1)

    def naive() -> list:
        return [[row.norm().item() for row in layer.router_weight().detach()] for layer in layers]

    print(f"one record, {LAYERS} layers x {EXPERTS} experts x {WIDTH}, float32, {torch.get_num_threads()} threads\n")
    print("| caches | one record, ms | one vector_norm of all, ms | ratio | row norms in one call, ms | ratio |")
    print("|---|---|---|---|---|---|")
    for name, flush in (("cold, as after a training step", torch.zeros(2**26)), ("warm", None)):
        ours, one, rows = medians(record, one_norm, row_norms, rounds=200, flush=flush)
        print(f"| {name} | {ours:.2f} | {one:.2f} | {ours / one:.2f} | {rows:.2f} | {ours / rows:.2f} |")
    (each,) = medians(naive, rounds=20)
    print(f"\ninstead, one norm and one .item() per expert: {each:.1f} ms")


def recipe(folder: str, steps: int, **changes: Any) -> tuple[Any, Any]:
    """The smallest recipe, ready to fit with our callback alone: Lightning's CLI object and the callback."""
    from pytorch_lightning.cli import LightningCLI

    from moe_precision.callbacks import RouterNormMonitor

    warnings.simplefilter("ignore")
    text = files("moe_precision.recipes").joinpath("pretrain_mixtral.yaml").read_text(encoding="utf-8")
    config = Path(folder, "recipe.yaml")
    config.write_text(text.replace("runs/pretrain_mixtral", folder), encoding="utf-8")
    arguments = ["--config", str(config), "--trainer.max_steps", str(steps), "--trainer.limit_val_batches", "0"]
    arguments += ["--trainer.enable_progress_bar", "false", "--trainer.num_sanity_val_steps", "0"]
    cli = LightningCLI(args=arguments, run=False, save_config_callback=None)
    monitor = RouterNormMonitor(group_size=64, **changes)
    cli.trainer.callbacks = [monitor]
    return cli, monitor


def a_record_every_step() -> None:
    """Prints the share of the step time of the smallest recipe, with offline wandb, at every step."""
    with tempfile.TemporaryDirectory() as folder:
        cli, monitor = recipe(folder, STEPS, every_n_steps=1, statistics_batches=0)
        hook, log = monitor.on_train_batch_end, cli.trainer.logger.log_metrics
        hooks: list[float] = []
        logs: list[float] = []
        ends: list[float] = []

        def timed_log(*args: Any, **kwargs: Any) -> None:
            start = time.perf_counter()
            log(*args, **kwargs)
            logs.append(time.perf_counter() - start)

        def timed_hook(*args: Any) -> None:
            cli.trainer.logger.log_metrics = timed_log
            start = time.perf_counter()
            hook(*args)
            ends.append(time.perf_counter())
            hooks.append(ends[-1] - start)
            cli.trainer.logger.log_metrics = log

        monitor.on_train_batch_end = timed_hook
        cli.trainer.fit(cli.model, cli.datamodule)
        step = statistics.median(b - a for a, b in pairwise(ends[5:]))
        record = statistics.median(a - b for a, b in zip(hooks[5:], logs[5:], strict=False))
        logging = statistics.median(logs[5:])
        layers = find_moe_layers(cli.model)
        counter, tokens = LoadCounter(layers, cli.model), cli.datamodule.hparams["batch_size"] * 128
        index, weights = torch.randint(8, (tokens, 2)), torch.rand(tokens, 2)

        def count() -> None:
            for layer in layers:
                counter.count((index, weights), layer)

        (counting,) = medians(count, rounds=200)
    print(f"\npretrain_mixtral, 4 layers x 8 experts, a record at every step, {STEPS} steps\n")
    print("| what | ms | share of the step |\n|---|---|---|")
    print(f"| step | {1e3 * step:.1f} | 100 % |")
    print(f"| record | {1e3 * record:.2f} | {100 * record / step:.2f} % |")
    print(f"| counting the load of all experts | {counting:.2f} | {counting / step / 10:.2f} % |")
    print(f"| WandbLogger.log_metrics, offline | {1e3 * logging:.2f} | {100 * logging / step:.2f} % |")


def statistics_of_the_experts() -> None:
    """Prints what statistics cost of the recipe's training time: all that is done in a run, beside its other steps."""
    recorded = WHOLE - int(0.95 * WHOLE)
    spent: dict[str, float] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] = spent.get(name, 0.0) + time.perf_counter() - start

        return wrapper

    print(f"\npretrain_mixtral, 4 layers x 8 experts, statistics; shares are of its {WHOLE:,} steps\n")
    print("| what | s | share of training | tokens per expert: least, median, most |\n|---|---|---|---|")
    ways = {f"in the last {recorded} steps": {"statistics_from": 0.5}, "32 batches after the last step": {}}
    for name, changes in ways.items():
        spent.clear()
        with tempfile.TemporaryDirectory() as folder:
            cli, monitor = recipe(folder, 2 * recorded, **changes)
            collecting, ends = monitor._collecting, []
            for method in ("before_batch", "after_batch", "finish"):
                setattr(collecting, method, timed("recorder", getattr(collecting, method)))
            hook, end = collector._Hook.__call__, monitor.on_train_batch_end
            inside = "hooks" if changes else "hooks, inside of the recorder"
            collector._Hook.__call__ = timed(inside, hook)  # type: ignore[method-assign]

            def ended(*args: Any, end: Any = end, ends: list[float] = ends) -> None:
                end(*args)
                ends.append(time.perf_counter())

            monitor.on_train_batch_end = ended
            try:
                cli.trainer.fit(cli.model, cli.datamodule)
            finally:
                collector._Hook.__call__ = hook  # type: ignore[method-assign]
            step = statistics.median(b - a for a, b in pairwise(ends[5:recorded]))
            tokens = torch.cat(list(monitor.statistics.tokens.values()))
        total = spent["recorder"] + spent.get("hooks", 0.0)
        share = 100 * total / (step * WHOLE)
        print(f"| {name} | {total:.2f} | {share:.2f} % | {tokens.min():,}, {tokens.median():,}, {tokens.max():,} |")


if __name__ == "__main__":
    one_record()
    a_record_every_step()
    statistics_of_the_experts()
