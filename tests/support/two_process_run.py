"""A short run with both callbacks, on one process or on two; see test_two_processes.py."""

import pytorch_lightning as pl
from pytorch_lightning.strategies import ModelParallelStrategy

from moe_precision.callbacks import PrecisionAnneal, RouterNormMonitor, SavePretrained
from moe_precision.recipes import CausalLM, TextDataModule
from tests.support.models import CONFIGS


def main(folder: str, strategy: str) -> None:
    pl.seed_everything(0)
    config = {"model_type": "mixtral", **CONFIGS["mixtral"]}
    module = CausalLM(config=config, learning_rate=1e-2, warmup_steps=1)
    data = TextDataModule(dataset=f"{folder}/text.txt", vocab_size=300, sequence_length=32, batch_size=4)
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
            PrecisionAnneal(start=2, group_size=64),
            SavePretrained(),
        ],
    ).fit(module, data)
