"""What recording 64 layers of 256 experts costs over a month: time, bytes in checkpoints, bytes logged.

python -m benchmarks.scaling
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from moe_precision import RouterNormHistory
from moe_precision.layers.shape import LayerShape

LAYERS, EXPERTS = 64, 256
SECONDS_A_STEP = 5.0
MONTH = 30 * 24 * 3600
EVERY = 500  # steps between records


def history() -> RouterNormHistory:
    """An empty history of the whole model; its matrices do not matter here."""
    names = [f"model.layers.{n}.mlp" for n in range(LAYERS)]
    shapes = {"gate_up_proj": (4096, 7168), "down_proj": (7168, 2048)}
    return RouterNormHistory({name: LayerShape(f"{name}.gate.weight", EXPERTS, shapes) for name in names}, "budget")


def record() -> Tensor:
    """Norms as they come from a model."""
    return 1 + 0.1 * torch.rand(LAYERS * EXPERTS)


def logged(history: RouterNormHistory, experts: bool, records: int = 20) -> tuple[float, float, int]:
    """Median milliseconds and mean bytes of a record in Weights & Biases (offline), and its number of keys."""
    import wandb
    from pytorch_lightning.loggers import WandbLogger

    with tempfile.TemporaryDirectory() as folder:
        logger = WandbLogger(project="budget", offline=True, save_dir=folder)
        logger.log_metrics(history.metrics(experts), step=0)  # opens the run
        times = []
        for step in range(1, records + 1):
            start = time.perf_counter()
            logger.log_metrics(history.metrics(experts), step=step)
            times.append(1e3 * (time.perf_counter() - start))
        wandb.finish()
        wandb.teardown()
        (file,) = Path(folder).rglob("*.wandb")
        return statistics.median(times), file.stat().st_size / (records + 1), len(history.metrics(experts))


def main() -> None:
    """Prints the budget."""
    os.environ.setdefault("WANDB_SILENT", "true")
    steps = int(MONTH / SECONDS_A_STEP)
    records = steps // EVERY
    print(f"{LAYERS} layers x {EXPERTS} experts, {steps} steps of {SECONDS_A_STEP:g} s in 30 days, ", end="")
    print(f"a record every {EVERY} steps: {records} records")
    watched = history()
    for step in range(records):
        watched.record(step * EVERY, record())
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        torch.save(watched.state_dict(), Path(folder, "state.pt"))
        spent = time.perf_counter() - start
        size = Path(folder, "state.pt").stat().st_size
        print(f"in a checkpoint at the end: {size / 1e6:.1f} MB, {1e3 * spent:.0f} ms to write")
        file = Path(folder, "recorded.safetensors")
        watched.save(file)
        print(f"history file: {file.stat().st_size / 1e6:.1f} MB")
    for experts, what in ((False, "aggregates"), (True, "every expert")):
        spent, size, keys = logged(watched, experts)
        share = 1e-3 * spent / (EVERY * SECONDS_A_STEP)
        print(f"W&B, {what}: {keys} keys, {spent:.1f} ms and {size / 1e6:.3f} MB per record, ", end="")
        print(f"{size * records / 1e9:.2f} GB in the month, {share:.6%} of the run's time")


if __name__ == "__main__":
    main()
