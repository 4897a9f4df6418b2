"""How far packed experts are from the float ones, by the layers' outputs or by the predictions, and steps to lessen it.

Either function goes through some batches. Without an optimizer it only measures; with one, each batch is a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from ..layers.module_tree import root_model
from ..recording.batches import run_batch
from ..recording.padding import Padding
from ..recording.processes import run_together, sum_gradients, summed
from .trainable import DistillError, TrainableScales, full

Step = Callable[[], object]  # the forward pass of one batch


def through_layers(
    model: nn.Module,
    scales: list[TrainableScales],
    steps: Iterable[Step],
    optimizer: Optimizer | None,
    padding: Padding | None = None,
    together: torch.device | None = None,
) -> dict[str, float]:
    """Relative squared error of every layer's output, for the input that the packed layers before it make.

    Args:
        model: The float model, or what is around it.
        scales: Of its layers.
        steps: Forward passes through the model.
        optimizer: Of the scales; each forward pass is then a step.
        padding: Which rows do not count, if a step itself says so to it; else it is seen when the model is called.
        together: What the processes of a run communicate from, where all of them take these steps together, each on
            batches of its own: a collective, as if the batches of all had been one. None for this process alone.
    """
    errors = {one.unit: 0.0 for one in scales}
    squares = dict(errors)
    seen = Padding() if padding is None else padding
    inside = False  # of a hook, whose own call of the module must not be watched

    def watch(one: TrainableScales, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        nonlocal inside
        if inside:
            return None
        inside = True
        try:
            target = _rows(output)
            autocast = torch.autocast(target.device.type, enabled=False)
            with torch.set_grad_enabled(optimizer is not None), autocast:
                packed = _in_full(one, module, args, kwargs)
                found = _rows(packed)
                real = seen.real(one.unit, len(target))
                if real is not None:
                    target, found = target[real], found[real]
                error = (found.float() - target.float()).square().sum()
                if error.requires_grad:  # else its experts are at 16 bits or dropped
                    error.backward()
        finally:
            inside = False
        errors[one.unit] += float(error.detach())
        squares[one.unit] += float(target.float().square().sum())
        return _detached(packed, target.dtype)

    def see(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.see(kwargs)

    root = root_model(model)
    handles = [] if padding is not None else [root.register_forward_pre_hook(see, with_kwargs=True)]
    handles += [
        root.get_submodule(one.unit).register_forward_hook(partial(watch, one), with_kwargs=True) for one in scales
    ]
    try:
        with torch.no_grad():
            for step in steps:
                if together is None:
                    step()
                else:
                    run_together([step], together, DistillError)
                if optimizer is not None:
                    if together is not None:
                        for one in scales:
                            sum_gradients(one.parameters)
                    optimizer.step()
                    optimizer.zero_grad()
    finally:
        for handle in handles:
            handle.remove()
    if together is not None:
        sums = torch.tensor([*errors.values(), *squares.values()], dtype=torch.float64, device=together)
        values = summed(sums).tolist()
        errors, squares = (
            dict(zip(errors, part, strict=True)) for part in (values[: len(errors)], values[len(errors) :])
        )
    unseen = [name for name, square in squares.items() if square == 0]
    if unseen:
        raise DistillError(f"the output of {unseen} is not seen, or is 0: are these layers called by this model?")
    return {name: errors[name] / squares[name] for name in errors}


def through_logits(
    model: nn.Module, scales: list[TrainableScales], batches: Iterable[Any], optimizer: Optimizer | None
) -> dict[str, float]:
    """Mean KL(float || packed); arguments as those of `through_layers`, with batches in place of forward passes."""
    total, tokens = 0.0, 0
    for batch in batches:
        with torch.no_grad():
            target = logits_of(model, run_batch(model, batch), batch)
        with torch.set_grad_enabled(optimizer is not None):
            weights = {name: weight for one in scales for name, weight in one.weights().items()}
            found = logits_of(model, run_batch(model, batch, weights), batch)
            kl = F.kl_div(found.log_softmax(-1), target.log_softmax(-1), reduction="sum", log_target=True)
            if optimizer is not None:
                (kl / len(target)).backward()
                optimizer.step()
                optimizer.zero_grad()
        total, tokens = total + float(kl.detach()), tokens + len(target)
    return {"logits": total / tokens}


def logits_of(model: nn.Module, output: Any, batch: Any) -> Tensor:
    """Of the tokens that count, ``(tokens, vocabulary)`` float32."""
    logits = output.logits if hasattr(output, "logits") else output
    if not isinstance(logits, Tensor):
        raise DistillError(f"the model returns {type(output).__name__}, expected logits or an output that has them")
    mask = None
    if isinstance(batch, Mapping):
        both = getattr(getattr(root_model(model), "config", None), "is_encoder_decoder", False)
        labels, mask = batch.get("labels"), batch.get("decoder_attention_mask" if both else "attention_mask")
        if mask is None or mask.shape != logits.shape[:-1]:  # an encoder's input is often of another length
            mask = None if labels is None else labels != -100
    flat = logits.flatten(0, -2).float()
    if mask is None or mask.numel() != len(flat):
        return flat
    return flat[mask.flatten().to(flat.device, torch.bool)]


def _in_full(one: TrainableScales, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """The output of a layer with its packed experts, in float32: half precision loses small changes of a scale."""
    prefix = f"{one.unit}." if one.unit else ""
    weights = {name.removeprefix(prefix): weight for name, weight in one.weights(in_full=True).items()}
    others = {name: full(tensor) for name, tensor in module.named_parameters() if name not in weights}
    cast = {name: full(value) for name, value in kwargs.items()}
    return functional_call(module, {**others, **weights}, tuple(map(full, args)), cast)


def _rows(output: Any) -> Tensor:
    """A module's output, or the first activations in it, ``(rows, width)``."""
    parts = (output,) if isinstance(output, Tensor) else output
    found = next((x for x in parts if isinstance(x, Tensor) and x.is_floating_point()), None)
    if found is None:
        raise DistillError(
            f"a layer returns {type(output).__name__}, expected a tensor or a tuple that begins with one"
        )
    return found.reshape(-1, found.shape[-1])


def _detached(output: Any, dtype: torch.dtype) -> Any:
    if isinstance(output, Tensor):
        return output.detach().to(dtype) if output.is_floating_point() else output
    return tuple(_detached(one, dtype) for one in output) if isinstance(output, tuple) else output
