"""A short run with both callbacks and a teacher, on one process or on two; see test_two_processes.py."""

import os

import pytorch_lightning as pl
from pytorch_lightning.strategies import ModelParallelStrategy
from transformers import AutoModelForCausalLM

from moe_precision.callbacks import PrecisionAnneal, RouterNormMonitor, SavePretrained
from moe_precision.recipes import CausalLM, TextDataModule
from moe_precision.recipes.causal_lm import new_config
from tests.support.models import CONFIGS


def saved_teacher(folder: str, config: dict, data: TextDataModule) -> str:
    """A model of the same shapes as the trained one, with predictions far from even."""
    data.setup()
    pl.seed_everything(1)
    teacher = AutoModelForCausalLM.from_config(new_config(config, data.tokenizer))
    teacher.lm_head.weight.data *= 20
    path = f"{folder}/teacher_of_{os.environ.get('RANK', 0)}"
    teacher.save_pretrained(path)
    return path


def main(folder: str, strategy: str) -> None:
    config = {"model_type": "mixtral", **CONFIGS["mixtral"]}
    module = CausalLM(config=config, learning_rate=1e-2, warmup_steps=1)
    data = TextDataModule(dataset=f"{folder}/text.txt", vocab_size=300, sequence_length=32, batch_size=4)
    teacher = saved_teacher(folder, config, data)
    pl.seed_everything(0)
    fsdp2 = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=1 if strategy == "auto" else 2,
        strategy=fsdp2 if strategy == "fsdp2" else strategy,
        use_distributed_sampler=False,  # both processes see the same batches, as one process would
        max_steps=4,
        log_every_n_steps=2,
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[
            RouterNormMonitor(group_size=64, method="router_norm"),
            PrecisionAnneal(start=2, group_size=64, teacher=teacher, teacher_weight=0.5),
            SavePretrained(),
        ],
    ).fit(module, data)
