"""A Switch Transformer as a LightningModule: pretrained by span corruption if need be, then trained to summarize.

The Trainer's own fit is the summarization. The pretraining is a nested Trainer in `prepare_data`, so that whatever
watches the fit sees only the summarization; its result stays in the run's folder and is reused.
"""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.seed import isolate_rng
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from torchmetrics.text.rouge import ROUGEScore
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerBase

from moe_precision.recipes.causal_lm import (
    check_config_or_checkpoint,
    check_train,
    data_tokenizer,
    load_balancing_loss,
    load_checkpoint,
    new_config,
    optimizer_and_schedule,
    reach_all_experts,
    shard_layers,
)
from moe_precision.recipes.seq2seq_data import SummarizationDataModule, corrupt_spans, random_span_mask

ROUGE_KEYS = ("rouge1", "rouge2", "rougeL")
SETTINGS_FILE = "pretraining.json"


def training_loss(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Return the cross-entropy, () in nats per token, plus a mixture's router z-loss and load-balancing loss.

    The load-balancing loss is that of `load_balancing_loss`, with the config's own coefficient.
    """
    if not hasattr(model.config, "router_aux_loss_coef"):
        plain: Tensor = model(**batch, use_cache=False).loss
        return plain
    out = model(**batch, use_cache=False, output_router_logits=True)
    balance = load_balancing_loss(out.encoder_router_logits, top_k=1) - out.encoder_aux_loss
    balance = balance + load_balancing_loss(out.decoder_router_logits, top_k=1) - out.decoder_aux_loss
    loss: Tensor = out.loss + model.config.router_aux_loss_coef * balance
    return loss


def add_summaries(
    score: ROUGEScore, model: PreTrainedModel, batch: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, **more: Any
) -> None:
    """Summarize the documents of a batch greedily, as long as its labels are, and add them to a ROUGE score."""
    labels = batch["labels"]
    generated = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=labels.shape[1],
        do_sample=False,
        **more,
    )
    wanted = labels.masked_fill(labels == -100, tokenizer.pad_token_id)
    score.update(
        tokenizer.batch_decode(generated, skip_special_tokens=True),
        tokenizer.batch_decode(wanted, skip_special_tokens=True),
    )


class SpanCorruption(pl.LightningModule):
    """Pretrain a sequence-to-sequence model on blocks of tokens, int64, (batch, sequence), by T5's span corruption.

    Args:
        model: The transformers model.
        sentinel_ids: int64, (sentinels,).
        learning_rate: Peak learning rate of AdamW.
        weight_decay: AdamW's, on matrices only.
        warmup_steps: Optimizer steps of linear warmup.
    """

    sentinel_ids: Tensor

    def __init__(
        self, model: PreTrainedModel, sentinel_ids: Tensor, learning_rate: float, weight_decay: float, warmup_steps: int
    ) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("sentinel_ids", sentinel_ids)
        self.optimizer_args = (learning_rate, weight_decay, (0.9, 0.95), warmup_steps)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Corrupt the blocks and return the loss of restoring them."""
        mask = random_span_mask(*batch.shape).to(batch.device)  # (B, T)
        inputs, labels = corrupt_spans(batch, mask, self.sentinel_ids, self.model.config.eos_token_id)
        loss = training_loss(self.model, {"input_ids": inputs, "labels": labels})
        self.log("pretrain_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW and the schedule over the pretraining's steps."""
        return optimizer_and_schedule(self, *self.optimizer_args)


class Seq2SeqLM(pl.LightningModule):
    """Train a transformers sequence-to-sequence model, such as a Switch Transformer, to summarize.

    A new model (`config`) is first pretrained by span corruption on the data module's training text and left in
    `pretrained` under the Trainer's default_root_dir, where a later run with the same settings finds it. On several
    nodes that folder must be one that all of them see. Logs `train_loss` (with the routers' losses), `val_loss`
    (cross-entropy alone, nats per token) and the F-measures `val_rouge1`, `val_rouge2`, `val_rougeL`.

    Args:
        config: A new model: keyword arguments of `AutoConfig.for_model`, `model_type` among them. The vocabulary's size
            and the special tokens come from the data module's tokenizer.
        checkpoint: A trained model, folder or name for `from_pretrained`; it is not pretrained again.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: AdamW's, on matrices only.
        warmup_steps: Optimizer steps of linear warmup, before the cosine fall to a tenth.
        betas: AdamW's.
        pretrain_steps: Optimizer steps of span corruption; 0 leaves the pretraining out.
        pretrain_batch_size: Blocks in a batch of the pretraining.
        pretrain_sequence_length: Tokens in such a block.
        pretrain_learning_rate: Peak learning rate of the pretraining.
        rouge_examples: Validation documents, on each device, that are summarized for ROUGE.
        train: ``all``, or ``routers``: the checkpoint's experts are packed by `plan` and nothing but routers learns.
        plan: Path of the precision plan for ``routers``.

    Raises:
        ValueError: Not exactly one of `config` and `checkpoint` is given, `config` has no `model_type`, or `train` does
            not fit the other arguments.
    """

    def __init__(
        self,
        config: dict[str, Any] | None = None,
        checkpoint: str | None = None,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        warmup_steps: int = 50,
        betas: tuple[float, float] = (0.9, 0.95),
        pretrain_steps: int = 1000,
        pretrain_batch_size: int = 16,
        pretrain_sequence_length: int = 128,
        pretrain_learning_rate: float = 2e-3,
        rouge_examples: int = 64,
        train: str = "all",
        plan: str | None = None,
    ) -> None:
        super().__init__()
        check_config_or_checkpoint(config, checkpoint)
        check_train(train, checkpoint, plan)
        self.save_hyperparameters()
        self.prepare_data_per_node = False  # one pretraining for all nodes: two would give two different models
        self.model: PreTrainedModel | None = None
        self.val_mean = MeanMetric()
        self.rouge = ROUGEScore(rouge_keys=ROUGE_KEYS)

    def prepare_data(self) -> None:
        """Pretrain a new model, on the first process alone and before any `setup`, unless it was done before."""
        args = self.hparams
        if args["checkpoint"] is not None or args["pretrain_steps"] == 0:
            return
        data: SummarizationDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        data.setup("fit")
        written = self._pretraining_settings(data)
        folder = self._pretrained_folder()
        if (folder / SETTINGS_FILE).is_file() and (folder / SETTINGS_FILE).read_text(encoding="utf-8") == written:
            rank_zero_info(f"found the pretrained model in {folder}")
            return
        with isolate_rng():  # the fine-tuning draws the same numbers whether the model was found or trained
            model = self._pretrain(data)
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix="pretrained-unfinished-"))
        model.save_pretrained(unfinished)
        (unfinished / SETTINGS_FILE).write_text(written, encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)

    def _pretraining_settings(self, data: SummarizationDataModule) -> str:
        """Return, as JSON, all that the pretrained model depends on; a model with other settings is not reused."""
        own = {"config", "weight_decay", "warmup_steps", *(key for key in self.hparams if key.startswith("pretrain_"))}
        text = ("dataset", "dataset_config", "document_column", "seed")
        vocabulary = json.dumps(data_tokenizer(self).get_vocab(), sort_keys=True)
        settings = {key: self.hparams[key] for key in own} | {key: data.hparams[key] for key in text}
        settings["vocabulary_sha256"] = hashlib.sha256(vocabulary.encode()).hexdigest()
        return json.dumps(settings, indent=2, sort_keys=True)

    def _pretrained_folder(self) -> Path:
        return Path(self.trainer.default_root_dir) / "pretrained"

    def _new_model(self) -> PreTrainedModel:
        tokenizer = data_tokenizer(self)
        config = new_config(self.hparams["config"], tokenizer)
        config.decoder_start_token_id = tokenizer.pad_token_id
        return AutoModelForSeq2SeqLM.from_config(config)

    def _pretrain(self, data: SummarizationDataModule) -> PreTrainedModel:
        args = self.hparams
        steps, batch_size, length = (args[f"pretrain_{key}"] for key in ("steps", "batch_size", "sequence_length"))
        blocks = data.pretraining_blocks(length, max_tokens=steps * batch_size * length)  # (N, T)
        module = SpanCorruption(
            self._new_model(),
            data.sentinel_ids(),
            args["pretrain_learning_rate"],
            args["weight_decay"],
            args["warmup_steps"],
        )
        trainer = pl.Trainer(
            accelerator=self.trainer.accelerator,
            devices=1,
            precision=self.trainer.precision,
            max_steps=steps,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            default_root_dir=self.trainer.default_root_dir,
        )
        trainer.fit(module, DataLoader(blocks, batch_size=batch_size, shuffle=True))  # type: ignore[arg-type]
        return module.model

    def configure_model(self) -> None:
        """Load or build the model, once, in the dtype and on the device that precision and strategy ask for."""
        if self.model is not None:
            return
        source = self.hparams["checkpoint"]
        if source is None and self.hparams["pretrain_steps"] > 0:
            source = self._pretrained_folder()
        if source is None:
            self.model = self._new_model()
        else:
            self.model = load_checkpoint(AutoModelForSeq2SeqLM, source, self.hparams["plan"])
        self.model.train()
        if self.device_mesh is not None:
            shard_layers(self.model, self.device_mesh)
        trains_experts = self.hparams["train"] == "all"
        if self.trainer.world_size > 1 and trains_experts and hasattr(self.model.config, "num_experts"):
            reach_all_experts(self.model)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return cross-entropy plus the routers' losses."""
        assert self.model is not None
        loss = training_loss(self.model, batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add a batch to the mean cross-entropy, and to ROUGE if it is among the first documents."""
        assert self.model is not None
        labels = batch["labels"]  # (B, T)
        self.val_mean.update(self.model(**batch, use_cache=False).loss, (labels != -100).sum())
        left = self.hparams["rouge_examples"] - batch_idx * len(labels)
        if left > 0:
            first = {key: value[:left] for key, value in batch.items()}
            # shards are gathered together, however long each text is
            sharded = self.device_mesh is not None
            add_summaries(self.rouge, self.model, first, data_tokenizer(self), synced_gpus=sharded)

    def on_validation_epoch_end(self) -> None:
        """Log the mean cross-entropy and the F-measures of ROUGE."""
        self.log("val_loss", self.val_mean.compute(), prog_bar=True, sync_dist=True)
        self.val_mean.reset()
        if self.hparams["rouge_examples"] > 0:
            scores = self.rouge.compute()
            self.log_dict({f"val_{key}": scores[f"{key}_fmeasure"] for key in ROUGE_KEYS}, sync_dist=True)
        self.rouge.reset()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW and the schedule over the Trainer's steps."""
        args = self.hparams
        return optimizer_and_schedule(
            self, args["learning_rate"], args["weight_decay"], args["betas"], args["warmup_steps"]
        )
