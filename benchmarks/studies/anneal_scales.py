"""Other treatments of the scales during annealing, for comparison: `PrecisionAnneal` fixes them at its start."""

from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor

from moe_precision.callbacks import PrecisionAnneal
from moe_precision.layers.moe_layers import find_moe_layers
from moe_precision.quantize.codec.grid import Grid
from moe_precision.recording.second_moments import curvature_of

_BETAS = (0.9, 0.95)


class RefittedScales(PrecisionAnneal):
    """Refits scales and offsets to the float weights, every ``refit_every`` steps."""

    def __init__(self, refit_every: int = 10, **settings: Any) -> None:
        super().__init__(**settings)
        self.refit_every = refit_every

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        if self.grid is None or self.plan is None or trainer.global_step % self.refit_every:
            return
        layers = find_moe_layers(pl_module)
        fitted = Grid.fit(layers, self.plan, curvature_of(layers, trainer.optimizers))
        for mine, new in ((self.grid.scales, fitted.scales), (self.grid.offsets, fitted.offsets)):
            for layer, projections in new.items():
                for name, values in projections.items():
                    mine[layer][name].copy_(values)


class LearnedScales(PrecisionAnneal):
    """Learns scales and offsets by Adam, with the gradients of learned step size quantization (arXiv 1902.08153).

    Args:
        rate: Their learning rate as a multiple of the optimizer's.
        settings: `PrecisionAnneal`'s.
    """

    def __init__(self, rate: float = 0.1, **settings: Any) -> None:
        super().__init__(**settings)
        self.rate = rate
        self._learned: list[tuple[Any, Tensor, Tensor]] = []  # place, scale and offset in float32

    def _begin(self, *args: Any) -> None:
        super()._begin(*args)
        assert self._hooks is not None
        for place in self._hooks._places:
            scale, offset = place.scale.float().clone(), place.offset.float().clone()
            gradients = torch.zeros_like(scale), torch.zeros_like(offset)
            scale.grad, offset.grad = gradients
            self._learned.append((place, scale, offset))
            hook = self._watch(place, (scale, offset), gradients)
            place.module.register_forward_pre_hook(hook)  # after the grid's own
        values = [tensor for _, *pair in self._learned for tensor in pair]
        self._adam = torch.optim.Adam(values, betas=_BETAS)

    def _watch(self, place: Any, grid: tuple[Tensor, Tensor], gradients: tuple[Tensor, Tensor]) -> Any:
        scale, offset = grid

        def add(gradient: Tensor) -> None:
            weight, gradient = place._bank(place.weight().detach()), place._bank(gradient)
            for e, bits in enumerate(place.bits):
                shape = (scale.shape[-1], -1)
                x = weight[e].unflatten(-1, shape).sub(offset[e].unsqueeze(-1)).div_(scale[e].unsqueeze(-1))
                codes = x.round().clamp_(0, 2**bits - 1)
                inside = (x > -0.5) & (x < 2**bits - 0.5)
                of_groups = gradient[e].unflatten(-1, shape)
                gradients[0][e] += (of_groups * torch.where(inside, codes - x, codes)).sum(-1)
                gradients[1][e] += (of_groups * ~inside).sum(-1)

        def watch(module: Any, args: Any) -> None:
            values = module.__dict__.get(place.name)
            if values is not None and values.requires_grad:
                values.register_hook(add)

        return watch

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if not self._learned:
            return
        self._adam.param_groups[0]["lr"] = self.rate * optimizer.param_groups[0]["lr"]
        self._adam.step()
        self._adam.zero_grad(set_to_none=False)
        for place, scale, offset in self._learned:
            place.scale.copy_(scale.clamp_(min=1e-5))
            place.offset.copy_(offset)
