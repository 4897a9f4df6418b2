"""A causal language model as a LightningModule: a transformers model, its loss, AdamW and a cosine schedule.

The transformers model is the attribute `model`. The router's load-balancing loss is part of the training loss, never of
`val_loss`.
"""

import math
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from moe_precision.checkpoints.config import config_of
from moe_precision.compat import layer_classes
from moe_precision.layers.moe_layers import find_moe_layers
from moe_precision.plans.beside import existing
from moe_precision.quantize import PlanQuantizationConfig

FINAL_LR_FRACTION = 0.1


def warmup_cosine(step: int, warmup_steps: int, total_steps: int) -> float:
    """Return the factor of the learning rate at a step: a linear rise to 1, then a cosine fall to 0.1.

    Args:
        step: Optimizer steps taken, from 0.
        warmup_steps: The rise reaches 1 at this step.
        total_steps: The fall ends here; later steps keep 0.1.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return FINAL_LR_FRACTION + (1 - FINAL_LR_FRACTION) * 0.5 * (1 + math.cos(math.pi * progress))


def optimizer_and_schedule(
    module: pl.LightningModule, learning_rate: float, weight_decay: float, betas: tuple[float, float], warmup_steps: int
) -> OptimizerLRScheduler:
    """Build AdamW (no weight decay on vectors) with `warmup_cosine` over the steps that the Trainer will take."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=learning_rate, betas=betas)
    total_steps = int(module.trainer.estimated_stepping_batches)
    schedule = LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup_steps, total_steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def load_balancing_loss(router_logits: Sequence[Tensor], top_k: int) -> Tensor:
    """Return Switch's load-balancing loss (arXiv 2101.03961, equations 4-6), the mean over the layers.

    transformers' own pools the tokens of all layers first, so an expert that no token uses in one layer and that is
    overused in another goes unnoticed.

    Args:
        router_logits: For each layer, (..., E).
        top_k: Experts that a token uses.

    Returns:
        float32, (): `top_k` where every expert of every layer has its equal share, else more (transformers' scale).
    """
    losses = []
    for logits in router_logits:
        probabilities = logits.float().flatten(0, -2).softmax(-1)  # (N, E)
        chosen = torch.zeros_like(probabilities).scatter(1, probabilities.topk(top_k, dim=-1).indices, 1.0)
        losses.append(logits.shape[-1] * (chosen.mean(0) * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


def shard_layers(model: PreTrainedModel, device_mesh: Any) -> None:
    """Shard a model over the data-parallel dimension of Lightning's ModelParallelStrategy (FSDP2), layer by layer."""
    from torch.distributed.fsdp import fully_shard

    mesh = device_mesh["data_parallel"]
    classes = layer_classes(model)
    for module in list(model.modules()):
        if type(module).__name__ in classes:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def reach_all_experts(model: PreTrainedModel) -> None:
    """Give experts that got no token a gradient of zero, for models with one module per expert (Switch, NLLB).

    Without it processes disagree about which gradients exist, and DDP and FSDP2 wait for each other forever.
    """

    def add_nothing(module: nn.Module, args: Any, output: Any) -> Any:
        if not torch.is_grad_enabled():
            return output
        zero = sum(0.0 * parameter.sum() for parameter in module.get_submodule("experts").parameters())
        return (output[0] + zero, *output[1:]) if isinstance(output, tuple) else output + zero

    for layer in find_moe_layers(model):
        if layer.layout == "modules" and layer.experts == f"{layer.name}.experts":
            model.get_submodule(layer.name).register_forward_hook(add_nothing)


def check_config_or_checkpoint(config: dict[str, Any] | None, checkpoint: str | None) -> None:
    """Raise ValueError unless exactly one of the two is given and a config names its `model_type`."""
    if (config is None) == (checkpoint is None):
        raise ValueError(
            f"got config={config!r} and checkpoint={checkpoint!r}, expected exactly one: a config for a new model, or "
            "a checkpoint to start from (in YAML, set the other to null)"
        )
    if config is not None and "model_type" not in config:
        raise ValueError(f"config has the keys {sorted(config)}, expected 'model_type' among them, such as 'mixtral'")


def check_train(train: str, checkpoint: str | None, plan: str | None) -> None:
    """Raise ValueError unless `train` is known, and has a checkpoint and a plan if it is routers alone."""
    if train not in ("all", "routers"):
        raise ValueError(f"train must be 'all' or 'routers', got {train!r}")
    if train == "routers" and (checkpoint is None or plan is None):
        raise ValueError(
            f"train='routers' packs the experts of a finished model: it needs checkpoint and plan, got "
            f"checkpoint={checkpoint!r} and plan={plan!r}"
        )
    if train == "all" and plan is not None:
        raise ValueError("plan is for train='routers'; to train all weights at a plan's precision, use PrecisionAnneal")


def load_checkpoint(auto_class: Any, checkpoint: str, plan: str | None) -> PreTrainedModel:
    """Load a trained model in the dtype of training; with a plan its experts are packed, and all but routers frozen.

    Args:
        auto_class: Such as `AutoModelForCausalLM`.
        checkpoint: Folder or name.
        plan: Path of the plan by which experts are packed, with the curvature file beside it as weights of the fit;
            None for a float model, all of which learns.

    Raises:
        ValueError: A plan is given and the checkpoint is quantized already.
    """
    dtype = torch.get_default_dtype()  # transformers alone would take the dtype of the file, often bfloat16
    if plan is None:
        return auto_class.from_pretrained(checkpoint, dtype=dtype)
    if getattr(config_of(checkpoint), "quantization_config", None) is not None:
        raise ValueError(f"the checkpoint {checkpoint!r} is quantized already: give the float one that {plan!r} is for")
    config = PlanQuantizationConfig(plan, curvature=existing("curvature", plan))
    model = auto_class.from_pretrained(checkpoint, dtype=dtype, quantization_config=config)
    model.requires_grad_(False)
    for layer in config.plan.layers.values():
        model.get_parameter(layer.shape.router).requires_grad_(True)
    return model


def data_tokenizer(module: pl.LightningModule) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the Trainer's data module; raise ValueError if there is none."""
    tokenizer = getattr(getattr(module.trainer, "datamodule", None), "tokenizer", None)
    if tokenizer is None:
        raise ValueError(
            f"{type(module).__name__} got no data module with a tokenizer; call "
            "Trainer.fit(module, datamodule=...) with one of moe_precision.recipes, or one with a `tokenizer`"
        )
    return tokenizer


def new_config(config: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """Build a transformers config; the vocabulary's size and the special tokens are the tokenizer's."""
    from_tokenizer = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return AutoConfig.for_model(**{**config, **from_tokenizer})


class CausalLM(pl.LightningModule):
    """Train a transformers causal language model, from random weights or from a checkpoint.

    Logs `train_loss` (with the router's load-balancing loss), `val_loss` (cross-entropy alone, nats per token) and
    `val_perplexity`.

    Args:
        config: A new model: keyword arguments of `AutoConfig.for_model`, `model_type` among them. The vocabulary's size
            and the special tokens come from the data module's tokenizer.
        checkpoint: A trained model: folder or name for `from_pretrained`.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: AdamW's, on matrices only.
        warmup_steps: Optimizer steps of linear warmup, before the cosine fall to a tenth.
        betas: AdamW's.
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
        weight_decay: float = 0.1,
        warmup_steps: int = 100,
        betas: tuple[float, float] = (0.9, 0.95),
        train: str = "all",
        plan: str | None = None,
    ) -> None:
        super().__init__()
        check_config_or_checkpoint(config, checkpoint)
        check_train(train, checkpoint, plan)
        self.save_hyperparameters()
        self.model: PreTrainedModel | None = None
        self.val_mean = MeanMetric()

    def configure_model(self) -> None:
        """Build the model, once, in the dtype and on the device that the Trainer's precision and strategy ask for."""
        if self.model is not None:
            return
        checkpoint, config = self.hparams["checkpoint"], self.hparams["config"]
        train, plan = self.hparams["train"], self.hparams["plan"]
        if checkpoint is not None:
            self.model = load_checkpoint(AutoModelForCausalLM, checkpoint, plan)
        else:
            self.model = AutoModelForCausalLM.from_config(new_config(config, data_tokenizer(self)))
        self.model.train()
        if self.device_mesh is not None:
            shard_layers(self.model, self.device_mesh)
        if self.trainer.world_size > 1 and train == "all" and hasattr(self.model.config, "router_aux_loss_coef"):
            reach_all_experts(self.model)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return cross-entropy plus, in a mixture of experts, the weighted load-balancing loss."""
        assert self.model is not None
        if not hasattr(self.model.config, "router_aux_loss_coef"):
            loss = self.model(**batch, use_cache=False).loss  # ()
        else:
            # Requested in the call, not in the config: a saved config with it would put it into every later loss.
            out = self.model(**batch, use_cache=False, output_router_logits=True)
            balance = load_balancing_loss(out.router_logits, self.model.config.num_experts_per_tok)
            loss = out.loss + self.model.config.router_aux_loss_coef * (balance - out.aux_loss)
        self.log("train_loss", loss, prog_bar=True)
        total: Tensor = loss
        return total

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add a batch to the mean over tokens of the cross-entropy."""
        assert self.model is not None
        loss = self.model(**batch, use_cache=False).loss  # ()
        predicted = (batch["labels"][:, 1:] != -100).sum()  # the model shifts labels by one
        self.val_mean.update(loss, predicted)

    def on_validation_epoch_end(self) -> None:
        """Log the mean cross-entropy and its exponential."""
        loss = self.val_mean.compute()
        self.val_mean.reset()
        self.log("val_loss", loss, prog_bar=True, sync_dist=True)
        self.log("val_perplexity", loss.exp(), sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW and the schedule over the Trainer's steps."""
        args = self.hparams
        return optimizer_and_schedule(
            self, args["learning_rate"], args["weight_decay"], args["betas"], args["warmup_steps"]
        )
