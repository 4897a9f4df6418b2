"""A teacher for annealed steps: the float model's predictions take the place of a share of the labels.

The teacher is a model of the same class and shapes, and only its weights are held. They are put into the trained model
for one more forward pass, without gradients, before each of its own. So every strategy, dtype and kernel that trains
the model also runs its teacher.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from ..compat import forward_pre_hooks
from ..layers.module_tree import modes_kept, root_model
from ..recording.loads import not_counted
from .covers import AnnealError
from .hooks import GridHooks
from .soft_labels import IGNORED, divergence_less_cross_entropy, next_tokens


def taught(model: nn.Module) -> PreTrainedModel:
    """The transformers model that a teacher can be given to.

    Raises:
        AnnealError: There is none, or FSDP2 shards it together with what is around it.
    """
    root = root_model(model)
    if not isinstance(root, PreTrainedModel):
        raise AnnealError(
            f"a teacher needs a transformers model, which returns loss and logits; got {type(root).__name__}"
        )
    if any(isinstance(parameter, DTensor) for parameter in root.parameters()) and not isinstance(root, FSDPModule):
        raise AnnealError(
            f"a teacher needs {type(root).__name__} to be a unit of FSDP2 itself: call fully_shard on the transformers "
            "model, not only on what is around it"
        )
    return root


def saved_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """What a teacher has of its own, by name: parameters, and buffers that are saved, such as a router's biases."""
    saved = model.state_dict(keep_vars=True)
    return {**dict(model.named_parameters()), **{name: one for name, one in model.named_buffers() if name in saved}}


class Teacher:
    """Shifts a share of a model's loss from its labels to the predictions of a teacher, wherever gradients are on.

    Args:
        model: The model, or what is around it; its training step uses the ``loss`` that it returns.
        weights: The teacher's weights, whole, by their names in the transformers model; not copied where they are on
            the model's device already.
        share: Of the cross-entropy, that KL(teacher || model) takes the place of: above 0, at most 1.
        hooks: The grid, which the teacher's forward pass leaves out.

    Attributes:
        kl: Mean KL(teacher || model) of the last training batch, ``()``, where ``measures`` was set.
        measures: Whether to compute it.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor], share: float, hooks: GridHooks) -> None:
        self.measures = False
        self.kl: Tensor | None = None
        self._root, self._share, self._hooks = taught(model), share, hooks
        self._sharded = [module for module in self._root.modules() if isinstance(module, FSDPModule)]
        tensors = saved_tensors(self._root)
        self._tensors = list(tensors.values())
        self._weights = [_placed(weights[name], tensor) for name, tensor in tensors.items()]
        self._own: list[Tensor] = []  # the model's, while the teacher is in charge
        self._logits: Tensor | None = None
        self._busy = self._learned = self._checked = False
        self._handles = [
            self._root.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True),
            self._root.register_forward_hook(self._after, with_kwargs=True),
            self._root.register_state_dict_post_hook(partial(self._save_own)),  # which must take an attribute
        ]

    def close(self) -> None:
        """Removes the hooks and the teacher's weights, even in the middle of its forward pass."""
        for handle in self._handles:
            handle.remove()
        self._give_back()
        self._handles, self._weights, self._logits = [], [], None

    @contextmanager
    def in_charge(self) -> Iterator[None]:
        """Forward passes inside are the teacher's: its weights, in float, in evaluation mode, without gradients."""
        with torch.no_grad(), modes_kept(self._root), not_counted(), self._hooks.lifted():
            try:
                self._busy = True
                self._root.eval()
                self._own = [_held(tensor) for tensor in self._tensors]
                self._put(self._weights)
                yield
            finally:
                self._give_back()
                self._busy = False

    def check_used(self) -> None:
        """After a training step: raises `AnnealError` if the model has learned nothing from its teacher."""
        if not self._learned:
            raise AnnealError(
                f"no gradient has come from the teacher: the training step does not use the loss that "
                f"{type(self._root).__name__} returns for its labels, which are given by keyword. Use it, or leave the "
                "teacher out"
            )

    def _put(self, weights: Sequence[Tensor]) -> None:
        """Gives the model other values, without a trace in the graphs of forward passes before."""
        for tensor, weight in zip(self._tensors, weights, strict=True):
            if isinstance(tensor, DTensor):
                tensor.to_local().copy_(weight)  # the memory that FSDP2 gathers from
            else:
                tensor.data = weight
        torch.clear_autocast_cache()  # it holds the values of before in half precision
        for module in self._sharded:
            module.reshard()  # what was gathered has the values of before

    @torch.no_grad()
    def _give_back(self) -> None:
        """Gives the model its weights, if it has not got them; also after an interruption anywhere."""
        if self._own:
            self._put(self._own)
            self._own = []

    def _save_own(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        """A checkpoint that a signal's handler saves in the teacher's pass (Lightning under SLURM) holds the model."""
        own = dict(zip(map(id, self._tensors), self._own, strict=False))  # none outside of that pass
        for named in (module.named_parameters, module.named_buffers):
            for name, tensor in named(remove_duplicate=False):
                if id(tensor) in own and prefix + name in state:
                    state[prefix + name] = _as_held(own[id(tensor)], tensor)

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self._busy:
            return
        self._logits = None
        if not torch.is_grad_enabled() or kwargs.get("labels") is None:  # in any mode: Lightning keeps the model's
            return
        both = self._root.config.is_encoder_decoder  # which makes its decoder's input of the labels
        given = {name: value for name, value in kwargs.items() if both or name != "labels"}
        with self.in_charge():
            self._logits = _logits(module, module(*args, **given)).detach()

    def _after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if self._busy or self._logits is None:
            return None
        teacher, self._logits = self._logits, None
        loss, logits = output.loss, _logits(module, output)
        labels = next_tokens(module, kwargs).flatten().to(logits.device)
        counts = labels != IGNORED
        tokens = None if self._root.config.is_encoder_decoder else kwargs.get("num_items_in_batch")
        if tokens is None:  # else of all micro-batches, where transformers' Trainer accumulates
            tokens = counts.sum().clamp(min=1)
        tokens = torch.as_tensor(tokens, device=logits.device)
        if not self._checked and not self._sharded and not torch.compiler.is_compiling():
            self._checked = self._check_loss(loss, logits, labels, tokens)
        change = divergence_less_cross_entropy(logits.flatten(0, -2), teacher.flatten(0, -2), labels).sum()
        if self.measures:
            with torch.no_grad():
                entropy = F.cross_entropy(logits.flatten(0, -2).float(), labels, ignore_index=IGNORED, reduction="sum")
                self.kl = (change + entropy) / counts.sum().clamp(min=1)
        if change.requires_grad:
            change.register_hook(self._see)
        output.loss = loss + self._share * (change / tokens).to(loss.dtype)
        return output

    def _check_loss(self, loss: Tensor, logits: Tensor, labels: Tensor, tokens: Tensor) -> bool:
        """Raises `AnnealError` unless what the loss makes of the logits is the labels' mean cross-entropy.

        Its gradient shows that, to which the terms that a model adds (load balancing) give nothing.

        Returns:
            Whether it could be seen: some token has a label, and the logits are those that the loss was made of.
        """
        rows = (labels != IGNORED).nonzero().flatten()[:64]
        if not len(rows) or not logits.requires_grad or logits.dtype == torch.float16:  # whose gradients need a scale
            return False
        (found,) = torch.autograd.grad(loss, logits, retain_graph=True, allow_unused=True)
        if found is None:  # accelerate returns a copy in float32
            return True
        expected = logits.detach().flatten(0, -2)[rows].float().softmax(-1)
        expected -= F.one_hot(labels[rows], expected.shape[-1])
        error = found.flatten(0, -2)[rows].float() * tokens - expected
        if not bool(error.norm() <= 0.05 * expected.norm() + 1e-3 * len(rows)):
            raise AnnealError(
                f"the loss of {type(self._root).__name__} is not the mean cross-entropy of its labels, which a teacher "
                "takes the place of: leave out what changes it (a loss function, ignore_index), or the teacher"
            )
        return True

    def _see(self, gradient: Tensor) -> None:
        self._learned = True


def dismiss_left(model: nn.Module) -> None:
    """Takes away the teacher that an interrupted run left, if any."""
    for hook in forward_pre_hooks(root_model(model)):
        if isinstance(teacher := getattr(hook, "__self__", None), Teacher):
            teacher.close()


def _logits(model: nn.Module, output: Any) -> Tensor:
    found = getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise AnnealError(
            f"{type(model).__name__} returns {type(output).__name__} without logits, which a teacher needs: leave out "
            "what changes its output (return_dict=False, a fused loss), or the teacher"
        )
    return found


def _placed(weight: Tensor, tensor: Tensor) -> Tensor:
    """A whole weight on the device of a tensor; the part of it that this rank holds."""
    weight = weight.detach().to(tensor.device, tensor.dtype)
    if isinstance(tensor, DTensor):
        return distribute_tensor(weight, tensor.device_mesh, tensor.placements).to_local()
    return weight


def _held(tensor: Tensor) -> Tensor:
    """The values of a tensor on this rank, which stay as they are when it is given others."""
    return tensor.to_local().detach().clone() if isinstance(tensor, DTensor) else tensor.data


def _as_held(values: Tensor, tensor: Tensor) -> Tensor:
    """Undoes `_held`: values of this rank as a tensor like the one that they are of."""
    if not isinstance(tensor, DTensor):
        return values
    return DTensor.from_local(
        values, tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride(), run_check=False
    )
