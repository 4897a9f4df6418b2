"""Samples of the experts in the checkpoints of transformers' Trainer, which may restore one without its experts."""

from __future__ import annotations

from pathlib import Path

from pytorch_lightning.utilities import rank_zero_warn
from transformers import TrainerState, TrainingArguments

from moe_precision.callbacks.of_trainer import run_folder, save_state, saved_file
from moe_precision.layers.moe_layers import MoELayer
from moe_precision.recording.expert_samples import ExpertSamples

_STATE = "expert_samples.safetensors"


def save_experts(layers: list[MoELayer], args: TrainingArguments, state: TrainerState) -> None:
    """Keeps samples of the experts in the checkpoint that was just saved, where the Trainer keeps them."""
    if (run_folder(args) / f"checkpoint-{state.global_step}").is_dir():
        save_state(ExpertSamples.of(layers).save, args, state, _STATE)


def saved_experts(args: TrainingArguments, state: TrainerState) -> ExpertSamples:
    """Those of the checkpoint from which training resumes; empty where it has none."""
    path = saved_file(args, state, _STATE)
    return ExpertSamples() if path is None else ExpertSamples.load(path)


def warn_unless_best(layers: list[MoELayer], args: TrainingArguments, state: TrainerState, owner: str) -> None:
    """At the end: warns if ``load_best_model_at_end`` has left experts of another step in the model."""
    best = state.best_model_checkpoint if args.load_best_model_at_end else None
    if best is None or not (path := Path(best, _STATE)).is_file():
        return
    if others := ExpertSamples.load(path).others(layers):
        rank_zero_warn(
            f"{owner}: load_best_model_at_end has not restored the experts of {best!r} ({len(others)} matrices differ, "
            f"{others[0]} the first): transformers' Trainer leaves out weights whose names on disk differ from the "
            "model's (transformers issue 48805), and the model is now a mixture of two steps. Do not save or evaluate "
            f"it: load the model with from_pretrained({best!r}). The plan is of the mixture too; make that of the best "
            f"checkpoint with `moe-precision plan HISTORY --final {best} -o PLAN`, with the history beside the plan"
        )
