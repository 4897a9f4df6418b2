"""Distills scales: codes stay, and scales and offsets are trained until the packed experts do what the float ones did.

Rounding chooses the codes of one matrix at a time. What it leaves, scales and offsets can still make good together, for
all matrices of a layer at once: they are few, the file keeps its format and size, and a few hundred thousand tokens of
text suffice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.lr_scheduler import LinearLR
from tqdm import tqdm

from ..layers.module_tree import modes_kept, root_model
from ..layers.moe_layers import find_moe_layers
from ..recording.batches import run_batch
from ..recording.loads import not_counted
from ..recording.padding import Padding
from .trainable import DistillError, TrainableScales, check_routers

Through = Literal["layers", "logits"]
STEPS = 100
RATE = 5e-3  # of Adam, falling to 0 in a straight line; relative to each scale
_CHECKED = 8  # batches on which the result is measured, apart from those that are trained on


@dataclass(frozen=True)
class Distilled:
    """What distilling has changed.

    Attributes:
        errors: Layer name -> squared error of the layer's output as a share of its mean square, before and after; with
            ``through="logits"`` one entry ``logits`` with KL(float || packed) in nats per token.
        kept: Those of them whose scales were left as they were, because no better ones were found.

    Example:
        >>> Distilled({"model.layers.0.mlp": (0.04, 0.03), "model.layers.1.mlp": (0.06, 0.05)}, kept=[]).described()
        "error of the layers' output: 0.05000 -> 0.04000"
    """

    errors: dict[str, tuple[float, float]]
    kept: list[str]

    def described(self) -> str:
        """In words."""
        before, after = (sum(pair[i] for pair in self.errors.values()) / len(self.errors) for i in (0, 1))
        what = "KL to the float model" if list(self.errors) == ["logits"] else "error of the layers' output"
        text = f"{what}: {before:.5f} -> {after:.5f}"
        return text + (f"; left as they were: {', '.join(self.kept)}" if self.kept else "")


def distill_scales(
    packed: nn.Module,
    model: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int = STEPS,
    rate: float = RATE,
    through: Through = "layers",
    **patterns: Any,
) -> Distilled:
    """Trains the scales and offsets of a packed model's experts towards the float model; codes stay as they are.

    With ``through="layers"`` every layer of experts is trained towards the float layer's output for the same input,
    which is what the packed layers before it make; all layers advance together, in one forward pass for each batch. A
    layer's gradients end with it, so memory holds those of one layer at a time. With ``through="logits"`` all are
    trained together towards the float model's predictions, by KL divergence, which takes a backward pass through the
    whole model.

    Args:
        packed: A model that `quantize_model` has packed, or one loaded from a packed checkpoint; changed in place.
        model: The float model that it was made from, whole on this process; it is left as it was.
        batches: Keyword arguments of its forward pass, each a mapping; taken again where there are fewer than
            steps. The first 8, or a quarter of fewer than 32, only measure the result.
        steps: Batches to train on.
        rate: Of Adam, relative to each scale; it falls to 0 in a straight line.
        through: ``layers`` or ``logits``.
        patterns: ``router_pattern`` and ``expert_pattern``, as in `find_moe_layers`.

    Returns:
        What has changed. A layer that did not get better keeps its scales.

    Raises:
        DistillError: The packed model is of another float model, or there is no batch.

    Example:
        >>> import copy, torch
        >>> packed = quantize_model(copy.deepcopy(model), allocate(model, method="weight_error", group_size=64))
        >>> batches = [{"input_ids": torch.randint(0, 128, (4, 64))} for _ in range(4)]
        >>> distilled = distill_scales(packed, model, batches, steps=10)
        >>> distilled.errors["model.layers.0.mlp"][1] < distilled.errors["model.layers.0.mlp"][0]
        True
    """
    if steps < 1 or not rate > 0 or through not in ("layers", "logits"):
        raise DistillError(
            f"expected at least 1 step, a positive rate, and through='layers' or 'logits'; got {steps}, {rate} and "
            f"{through!r}"
        )
    layers = find_moe_layers(model, **patterns)
    scales = [TrainableScales(layer, packed) for layer in layers]
    check_routers(layers, packed)
    matrices = [matrix for one in scales for matrix in one.matrices]
    if not matrices:
        raise DistillError("no expert of the packed model is at 1 to 8 bits: there are no scales to distill")
    taken = list(islice(batches, _CHECKED + steps))
    if not taken:
        raise DistillError("there is no batch to distill on")
    checked = taken[: min(_CHECKED, len(taken) // 4)] or taken
    source = cycle(taken[len(checked) :] or taken)
    run = _through_layers if through == "layers" else _through_logits
    with modes_kept(model), _frozen(model), not_counted():
        model.eval()
        before = run(model, scales, checked, None)
        states = [one.state() for one in scales]
        optimizer = torch.optim.Adam([tensor for one in scales for tensor in one.parameters], lr=rate)
        falling = LinearLR(optimizer, 1.0, 1 / steps, max(steps - 1, 1))
        with tqdm(total=steps, desc="distilling", unit="batch", disable=None) as bar:
            for _ in range(steps):
                run(model, scales, [next(source)], optimizer)
                falling.step()
                bar.update()
        for matrix in matrices:
            matrix.store()
        after = run(model, scales, checked, None)
        kept = [name for name in before if not after[name] < before[name]]
        for one, state in zip(scales, states, strict=True):
            if one.unit in kept or "logits" in kept:
                one.go_back(state)
        if kept:  # what is put into the model is what is reported
            after = before if len(kept) == len(before) else run(model, scales, checked, None)
    for matrix in matrices:
        matrix.put()
    return Distilled({name: (before[name], after[name]) for name in before}, kept)


def _through_layers(
    model: nn.Module, scales: list[TrainableScales], batches: Iterable[Any], optimizer: torch.optim.Optimizer | None
) -> dict[str, float]:
    """Relative squared error of every layer's output on some batches; with an optimizer, each of them is a step."""
    errors = {one.unit: 0.0 for one in scales}
    squares = dict(errors)
    padding = Padding()
    inside = False  # of a hook, whose own call of the module must not be watched

    def watch(one: TrainableScales, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        nonlocal inside
        if inside:
            return None
        inside = True
        try:
            with torch.set_grad_enabled(optimizer is not None):
                prefix = f"{one.unit}." if one.unit else ""
                weights = {name.removeprefix(prefix): weight for name, weight in one.weights().items()}
                packed = functional_call(module, weights, args, kwargs)
                target, found = _rows(output), _rows(packed)
                real = padding.real(one.unit, len(target))
                if real is not None:
                    target, found = target[real], found[real]
                error = (found.float() - target.float()).square().sum()
                if optimizer is not None:
                    error.backward()
        finally:
            inside = False
        errors[one.unit] += float(error.detach())
        squares[one.unit] += float(target.float().square().sum())
        return _detached(packed)

    handles = [
        model.get_submodule(one.unit).register_forward_hook(partial(watch, one), with_kwargs=True) for one in scales
    ]
    try:
        with torch.no_grad():
            for batch in batches:
                padding.see(batch if isinstance(batch, Mapping) else {})
                run_batch(model, batch)
                if optimizer is not None:
                    optimizer.step()
                    optimizer.zero_grad()
    finally:
        for handle in handles:
            handle.remove()
    unseen = [name for name, square in squares.items() if square == 0]
    if unseen:
        raise DistillError(f"the output of {unseen} is not seen, or is 0: are these layers called by this model?")
    return {name: errors[name] / squares[name] for name in errors}


def _through_logits(
    model: nn.Module, scales: list[TrainableScales], batches: Iterable[Any], optimizer: torch.optim.Optimizer | None
) -> dict[str, float]:
    """Mean KL(float || packed) on some batches; with an optimizer, each of them is a step."""
    total, tokens = 0.0, 0
    for batch in batches:
        with torch.no_grad():
            target = _logits(model, run_batch(model, batch), batch)
        with torch.set_grad_enabled(optimizer is not None):
            weights = {name: weight for one in scales for name, weight in one.weights().items()}
            found = _logits(model, run_batch(model, batch, weights), batch)
            kl = F.kl_div(found.log_softmax(-1), target.log_softmax(-1), reduction="sum", log_target=True)
            if optimizer is not None:
                (kl / len(target)).backward()
                optimizer.step()
                optimizer.zero_grad()
        total, tokens = total + float(kl.detach()), tokens + len(target)
    return {"logits": total / tokens}


def _logits(model: nn.Module, output: Any, batch: Any) -> Tensor:
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


def _rows(output: Any) -> Tensor:
    """A module's output, or the first activations in it, ``(rows, width)``."""
    parts = (output,) if isinstance(output, Tensor) else output
    found = next((x for x in parts if isinstance(x, Tensor) and x.is_floating_point()), None)
    if found is None:
        raise DistillError(
            f"a layer returns {type(output).__name__}, expected a tensor or a tuple that begins with one"
        )
    return found.reshape(-1, found.shape[-1])


def _detached(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.detach()
    return tuple(_detached(one) for one in output) if isinstance(output, tuple) else output


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of the model takes gradients."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
