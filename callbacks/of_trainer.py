"""What a callback needs of transformers' Trainer: its folders, the state of ours in them, its optimizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pytorch_lightning.utilities import rank_zero_warn
from transformers import PreTrainedModel, TrainerState, TrainingArguments

from moe_precision.compat import save_under_module_names, trainer_run, was_dequantized_on_loading


def run_folder(args: TrainingArguments) -> Path:
    """The folder of the run: ``output_dir``, or in a hyperparameter search that of the trial."""
    return Path(str(trainer_run().folder or args.output_dir))


def save_state(save: Callable[[Path], None], args: TrainingArguments, state: TrainerState, name: str) -> None:
    """Keeps a callback's state in the checkpoint that was just saved; warns if there is none."""
    folder = run_folder(args) / f"checkpoint-{state.global_step}"
    if folder.is_dir():
        save(folder / name)
    else:
        rank_zero_warn(
            f"{str(folder)!r} is not there, where transformers' Trainer keeps checkpoints: {name!r} is not saved, and "
            "a run that resumes from this step begins anew with its record"
        )


def saved_file(args: TrainingArguments, state: TrainerState, name: str) -> Path | None:
    """Path of that state in the checkpoint from which training resumes; None if it is not there, or training starts."""
    if state.global_step == 0:
        return None
    path = Path(trainer_run().resumed_from or run_folder(args) / f"checkpoint-{state.global_step}", name)
    return path if path.is_file() else None


def saves_as_float(model: Any) -> None:
    """Has the Trainer save a release that was dequantized on loading under its modules' names, not its packed ones."""
    if isinstance(model, PreTrainedModel) and was_dequantized_on_loading(model):
        save_under_module_names(model)


def optimizers_of(known: dict[str, Any]) -> list[Any]:
    """The optimizer among what a callback is given, if it is there yet."""
    return [known["optimizer"]] if known.get("optimizer") is not None else []
