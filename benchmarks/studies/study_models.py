"""The models of the studies: trained with the callback by the settings in study.yaml, one folder per model and seed."""

import argparse
import copy
import logging
import multiprocessing
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from torch import Tensor
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from moe_precision import recipes
from moe_precision.callbacks import RouterNormMonitor, SavePretrained
from moe_precision.files import replaced_when_done

REFERENCE = "language-reference"

Batch = dict[str, Tensor]
Setting = dict[str, Any]


def settings_of(path: Path | None) -> Setting:
    """The study's settings, from a file or the ones in this folder."""
    text = Path(__file__).with_name("study.yaml") if path is None else path
    return yaml.safe_load(text.read_text(encoding="utf-8"))


def language_reference(folder: Path) -> str:
    """Write the language reference that ``help()`` prints, one file per topic, and return the folder."""
    from pydoc_data.topics import topics

    folder.mkdir(parents=True, exist_ok=True)
    for topic, text in topics.items():
        with replaced_when_done(folder / f"{topic}.txt") as temporary:
            temporary.write_text(text, encoding="utf-8")
    return str(folder)


def data_of(study: Setting, name: str, seed: int, root: Path) -> Any:
    """The data module of a model, set up."""
    model = study["models"][name]
    arguments = dict(model["data_args"], seed=seed)
    if arguments.get("dataset") == REFERENCE:
        arguments["dataset"] = language_reference(root / "language_reference")
    if "from" in model:
        arguments["tokenizer"] = str(folder_of(model["from"], seed, root) / "checkpoint")
    data = getattr(recipes, model["data"])(**arguments)
    data.setup()
    return data


def folder_of(name: str, seed: int, root: Path) -> Path:
    """The folder of one model and seed."""
    return root / name / f"seed_{seed}"


class _SaveAt(pl.Callback):
    """Saves whole checkpoints, optimizer included, at given steps."""

    def __init__(self, folder: Path, steps: Sequence[int]) -> None:
        self._folder, self._steps = folder, steps

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step in self._steps:
            trainer.save_checkpoint(checkpoint_at(self._folder, trainer.global_step))


def checkpoint_at(folder: Path, step: int) -> Path:
    """The whole checkpoint that `train` saved at a step."""
    return folder / f"step_{step}.ckpt"


def trainer_of(
    study: Setting, name: str, folder: Path, callbacks: Sequence[pl.Callback], max_steps: int | None = None
) -> pl.Trainer:
    """A quiet Trainer with a model's number of steps, or another number."""
    return pl.Trainer(
        default_root_dir=str(folder),
        max_steps=study["models"][name]["max_steps"] if max_steps is None else max_steps,
        gradient_clip_val=1.0,
        callbacks=list(callbacks),
        accelerator="auto",
        devices=1,
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )


class ConstantRateLM(recipes.CausalLM):
    """A causal language model that is trained at one learning rate from the first step to the last."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW alone."""
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["learning_rate"], betas=self.hparams["betas"])


def module_of(study: Setting, name: str, seed: int, root: Path) -> Any:
    """A model's LightningModule, which starts from random weights or from those of another model."""
    model = study["models"][name]
    arguments = copy.deepcopy(model["module_args"])
    if "from" in model:
        arguments["checkpoint"] = str(folder_of(model["from"], seed, root) / "checkpoint")
    kind = ConstantRateLM if model["module"] == "ConstantRateLM" else getattr(recipes, model["module"])
    return kind(**arguments)


def monitor_of(study: Setting, name: str) -> RouterNormMonitor:
    """The callback that records a model's router norms."""
    group_size = study["models"][name]["group_size"]
    recorded = {"every_n_steps": study["record_every"], "statistics_batches": 0}
    return RouterNormMonitor(method="router_norm", group_size=group_size, **recorded)  # the study makes its own plans


def train(study: Setting, name: str, seed: int, root: Path, save_at: Sequence[int] = ()) -> Any:
    """Train one model with the callback, unless its files exist; return its data module.

    Args:
        study: The settings.
        name: The model's key in them.
        seed: Its seed.
        root: Folder of the study.
        save_at: Steps at which to save what `checkpoint_at` returns.
    """
    model, folder = study["models"][name], folder_of(name, seed, root)
    if "from" in model:
        train(study, model["from"], seed, root)
    data = data_of(study, name, seed, root)
    if (folder / "checkpoint" / "config.json").is_file() and all(checkpoint_at(folder, s).is_file() for s in save_at):
        return data
    pl.seed_everything(seed, verbose=False)
    callbacks = [monitor_of(study, name), SavePretrained(), _SaveAt(folder, save_at)]
    trainer_of(study, name, folder, callbacks).fit(module_of(study, name, seed, root), datamodule=data)
    return data


def rows_of(batches: Iterable[Batch], count: int, size: int = 1) -> Iterator[Batch]:
    """The first ``count`` rows of some batches, in batches of ``size``."""
    done = 0
    for batch in batches:
        for start in range(0, len(batch["labels"]), size):
            if done >= count:
                return
            part = {key: value[start : start + size] for key, value in batch.items()}
            done += len(part["labels"])
            yield part


def merged(batches: Iterable[Batch], rows: int = 64) -> list[Batch]:
    """Batches of the same shape joined up to a number of rows, which are evaluated faster."""
    found: list[Batch] = []
    for batch in batches:
        last = found[-1] if found else {}
        alike = all(key in last and last[key].shape[1:] == value.shape[1:] for key, value in batch.items())
        if alike and len(last["labels"]) + len(batch["labels"]) <= rows:
            found[-1] = {key: torch.cat([last[key], value]) for key, value in batch.items()}
        else:
            found.append(batch)
    return found


def run(
    arguments: Sequence[str] | None,
    description: str | None,
    output: str,
    models_of: Callable[[Setting], Iterable[str]],
    measure: Callable[[Setting, str, int, Path], str],
    report: Callable[[Setting, Path], str],
) -> None:
    """The command line of a study: measures every model and seed in worker processes, or prints the tables.

    Args:
        arguments: Those of the command; None for the process's own.
        description: What ``--help`` begins with.
        output: Folder, unless another is named.
        models_of: The models of the settings.
        measure: Measures a model with a seed into a folder and returns what was done; a module-level function.
        report: The tables of a folder.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(output), help=f"folder (default {output})")
    parser.add_argument("--config", type=Path, help="settings (default: benchmarks/studies/study.yaml)")
    parser.add_argument("--models", nargs="+", help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these")
    parser.add_argument("--workers", type=int, default=1, help="processes, of --threads threads each (default 1)")
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    parser.add_argument("--report", action="store_true", help="print the tables of the results that exist")
    options = parser.parse_args(arguments)
    study = settings_of(options.config)
    if options.report:
        print(report(study, options.output))
        return
    work = [(m, s) for m in options.models or models_of(study) for s in options.seeds or study["seeds"]]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, context, _quiet, (options.threads,)) as pool:
        tasks = [pool.submit(measure, study, name, seed, options.output) for name, seed in work]
        for task in tqdm(as_completed(tasks), total=len(tasks), desc="study", unit="model"):
            tqdm.write(task.result())


def _quiet(threads: int) -> None:
    """Sets up a worker process, once."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    disable_progress_bar()
