"""Kills a short run with ``kill -9`` at random moments, resumes it, and compares it with an undisturbed one.

python -m tests.support.interrupted_run --points 30
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from moe_precision import RouterNormHistory
from moe_precision.callbacks import RouterNormMonitor
from tests.support.models import build
from tests.support.processes import finish, start

STEPS = 60
STARTED, ENDED = "started.txt", "ended.txt"


class Module(pl.LightningModule):
    """A small Mixtral whose batches depend only on the step, so that a resumed run sees the same data."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.model = build("mixtral", hidden_size=32, intermediate_size=32).train()

    def on_train_start(self) -> None:
        (self.folder / STARTED).touch()

    def on_train_end(self) -> None:
        (self.folder / ENDED).touch()

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        ids = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(self.global_step))
        return self.model(input_ids=ids, labels=ids, output_router_logits=True).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def train(folder: Path) -> None:
    """Trains to the end, from the newest checkpoint in the folder if there is one."""
    checkpoints = sorted(folder.glob("step=*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=")))
    pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=1,
        max_steps=STEPS,
        max_epochs=-1,
        log_every_n_steps=4,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            RouterNormMonitor(group_size=32),
            ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1),
        ],
    ).fit(Module(folder), DataLoader(range(25)), ckpt_path=checkpoints[-1] if checkpoints else None)


def _start(folder: Path) -> BaseProcess:
    return start(train, folder, log=folder / "log.txt")


def _until(file: Path, process: BaseProcess) -> None:
    while not file.exists():
        if not process.is_alive():
            raise RuntimeError(f"no {file.name}, exit code {process.exitcode}: {file.with_name('log.txt').read_text()}")
        time.sleep(0.001)


def _outcome(folder: Path) -> tuple[list[int], torch.Tensor, bytes]:
    history = RouterNormHistory.load(folder / "precision_plan.history.safetensors")
    return history.steps, torch.cat(list(history.norms.values()), 1), (folder / "precision_plan.json").read_bytes()


def compare(points: int, seed: int = 0) -> list[int]:
    """Interrupts ``points`` runs, each once, at a random moment between the first step and the last.

    Returns:
        The step of the checkpoint from which each resumed; 0 where it was killed before the first.

    Raises:
        AssertionError: A resumed run has other steps, norms or plan bytes than the uninterrupted one.
    """
    draw = random.Random(seed)
    resumed_from: list[int] = []
    with tempfile.TemporaryDirectory() as base:
        reference = Path(base, "reference")
        reference.mkdir()
        process = _start(reference)
        _until(reference / STARTED, process)
        begin = time.perf_counter()
        _until(reference / ENDED, process)
        length = time.perf_counter() - begin
        finish(process, logs=[reference / "log.txt"])
        steps, norms, plan = _outcome(reference)
        assert steps == list(range(0, STEPS + 1, 4)), steps
        while len(resumed_from) < points:
            folder = Path(base, f"run{len(resumed_from)}")
            folder.mkdir(exist_ok=True)
            process = _start(folder)
            _until(folder / STARTED, process)
            time.sleep(draw.uniform(0, length))
            process.kill()
            process.join()
            written = [int(path.stem.removeprefix("step=")) for path in folder.glob("step=*.ckpt")]
            if process.exitcode == 0 or (folder / "precision_plan.json").exists() or STEPS in written:
                for file in folder.iterdir():  # quicker than the reference, and past its last step: draw again
                    file.unlink()
                continue
            finish(_start(folder), logs=[folder / "log.txt"])
            again, again_norms, again_plan = _outcome(folder)
            assert again == steps, (again, steps)
            assert torch.equal(again_norms, norms)
            assert again_plan == plan
            resumed_from.append(max(written, default=0))
    return resumed_from


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=30, help="how many runs to interrupt (default 30)")
    options = parser.parse_args()
    resumed_from = compare(options.points)
    print(f"{len(resumed_from)} runs killed, resumed from steps {sorted(resumed_from)} of {STEPS}:")
    print("every history has the steps and norms, and every plan the bytes, of the run that was left alone")


if __name__ == "__main__":
    main()
