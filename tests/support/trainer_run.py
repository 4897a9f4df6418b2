"""transformers' Trainer on two CPU processes, with statistics in all ways; see test_statistics_processes.py."""

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from moe_precision.callbacks import PrecisionAnnealTrainerCallback, RouterNormTrainerCallback
from tests.support.models import build


def main(folder: str) -> None:
    for name, how in (("after", {"statistics_batches": 2, "distill_steps": 2}), ("during", {"statistics_from": 0.5})):
        recorder = RouterNormTrainerCallback(group_size=64, **how)
        rank, _ = train(f"{folder}/{name}", recorder)
        assert recorder.statistics is not None
        if recorder.grid is not None:
            recorder.grid.save(f"{folder}/grid_{rank}.safetensors")
        recorder.statistics.save(f"{folder}/{name}_{rank}.safetensors")
    anneal = PrecisionAnnealTrainerCallback(start=2, average_bits=2.0, group_size=64, statistics_steps=2)
    rank, model = train(f"{folder}/annealed", anneal)
    assert anneal.grid is not None
    anneal.grid.save(f"{folder}/annealed_{rank}.safetensors")
    torch.save(model.state_dict(), f"{folder}/annealed_{rank}.pt")


def train(folder: str, callback: TrainerCallback) -> tuple[int, PreTrainedModel]:
    ids = torch.randint(3, 128, (16, 10), generator=torch.Generator().manual_seed(0))
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=4,
        per_device_train_batch_size=2,
        ddp_backend="gloo",
        use_cpu=True,
        report_to="none",
        save_strategy="no",
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    model = build("mixtral").train()
    Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
    return arguments.process_index, model
