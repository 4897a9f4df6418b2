"""transformers' Trainer on two CPU processes, with statistics in both ways; see test_statistics_processes.py."""

import torch
from transformers import Trainer, TrainingArguments

from moe_precision.callbacks import RouterNormTrainerCallback
from tests.support.models import build


def main(folder: str) -> None:
    ids = torch.randint(3, 128, (16, 10), generator=torch.Generator().manual_seed(0))
    for name, how in (("after", {"statistics_batches": 2, "distill_steps": 2}), ("during", {"statistics_from": 0.5})):
        callback = RouterNormTrainerCallback(group_size=64, **how)
        arguments = TrainingArguments(
            output_dir=f"{folder}/{name}",
            max_steps=4,
            per_device_train_batch_size=2,
            ddp_backend="gloo",
            use_cpu=True,
            report_to="none",
            save_strategy="no",
        )
        rows = [{"input_ids": row, "labels": row} for row in ids]
        Trainer(build("mixtral").train(), arguments, train_dataset=rows, callbacks=[callback]).train()
        assert callback.statistics is not None
        if callback.grid is not None:
            callback.grid.save(f"{folder}/grid_{arguments.process_index}.safetensors")
        callback.statistics.save(f"{folder}/{name}_{arguments.process_index}.safetensors")
