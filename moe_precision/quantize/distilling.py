"""Distills scales: codes stay, and scales and offsets are trained until the packed experts do what the float ones did.

Rounding chooses the codes of one matrix at a time. What it leaves, scales and offsets can still make good together, for
all matrices of a layer at once: they are few, the file keeps its format and size, and a few hundred thousand tokens of
text suffice.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.optim.lr_scheduler import LinearLR
from tqdm import tqdm

from ..autocast import without_autocast
from ..layers.module_tree import modes_kept, root_model
from ..layers.moe_layers import MoELayer, find_moe_layers
from ..plans.plan import PrecisionPlan
from ..recording.batches import run_batch
from ..recording.curvature import Curvature
from ..recording.loads import not_counted
from ..recording.processes import run_together, taken_together
from ..recording.router_norms import norms_by_layer
from ..recording.statistics import ExpertStatistics
from .codec.grid import Grid
from .distances import Step, through_layers, through_logits
from .distillable import check_routers, check_same_plan, without_ddp
from .replace import find_targets
from .trainable import DistillError, TrainableScales

T = TypeVar("T")  # a batch, or its forward pass
Through = Literal["layers", "logits"]
STEPS = 100
RATE = 5e-3  # of Adam, falling to 0 in a straight line; relative to each scale
CHECKED = 8  # batches on which the result is measured, apart from those that are trained on


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


@without_autocast()
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
    check_steps(steps, rate)
    if through not in ("layers", "logits"):
        raise DistillError(f"expected through='layers' or 'logits', got {through!r}")
    layers = find_moe_layers(model, **patterns)
    scales = [TrainableScales.of_packed(layer, packed) for layer in layers]
    check_routers(layers, packed)
    if through == "layers":
        passes = (partial(run_batch, model, batch) for batch in batches)
        found = _trained(model, scales, passes, through_layers, steps, rate)
    else:
        found = _trained(model, scales, batches, through_logits, steps, rate)
    for matrix in (matrix for one in scales for matrix in one.matrices):
        matrix.put()
    return found


def distilled_grid(
    model: nn.Module,
    layers: list[MoELayer],
    plan: PrecisionPlan,
    passes: Iterable[Step],
    *,
    steps: int = STEPS,
    rate: float = RATE,
    curvature: Curvature | None = None,
    statistics: ExpertStatistics | None = None,
) -> tuple[Grid, Distilled]:
    """Quantizes experts and distills their scales by layer, without a second model and without changing this one.

    With several processes this is a collective: each gives batches of its own, a step is taken on those of all, and all
    get the same grid. Each has the whole model (DDP). They take as many batches as the one that has the fewest.

    What comes out is what `distill_scales` makes of a packed copy of the model, on the same batches. See `memory_bytes`
    for what it takes.

    Args:
        model: The float model, or what is around it.
        layers: Its layers.
        plan: The plan, in the layers' names.
        passes: Forward passes of batches through the model; of fewer than are needed, all are taken again.
        steps: As in `distill_scales`.
        rate: As in `distill_scales`.
        curvature: As in `quantize_model`.
        statistics: As in `quantize_model`.

    Returns:
        The grid, with codes, and what distilling has changed.

    Raises:
        DistillError: There is no batch, or no expert is below 16 bits, or a layer is not called.
    """
    model = without_ddp(model)
    listed = find_targets(root_model(model), layers, plan, None, curvature, None, statistics)
    targets = {target.parameter: target for target in listed}
    device = layers[0].router_is.parameter().device
    check_same_plan(plan, device)
    scales: list[TrainableScales] = []
    fits = (partial(TrainableScales.fitted, layer, targets, plan.group_size) for layer in layers)
    run_together([lambda: scales.extend(fit() for fit in fits)], device, DistillError)
    for matrix in (matrix for one in scales for matrix in one.matrices):
        matrix.take_first()
    batches = taken_together(passes, CHECKED + steps, device, DistillError)
    found = _trained(model, scales, batches, partial(through_layers, together=device), steps, rate)
    grid = Grid(plan, router_norms=norms_by_layer(layers))
    for one in scales:
        take_in(grid, one)
    return grid, found


def memory_bytes(layers: list[MoELayer], bits: int, group_size: int) -> int:
    """Bytes that `distilled_grid` takes beside the model where experts have ``bits`` bits.

    These are all codes, and for every group its scale and offset, before and now, a factor and a shift, their gradients
    and Adam's two means of each; and five float copies of the experts of one layer, gradients included.
    """
    weights = [layer.num_experts * sum(out * inp for out, inp in layer.projections.values()) for layer in layers]
    return sum(weights) * bits // 8 + sum(weights) // group_size * 12 * 4 + 5 * 4 * max(weights)


def take_in(grid: Grid, scales: TrainableScales) -> None:
    """Puts codes and scales of a layer into a grid."""
    held = {name: scales.held(name, grid.plan.group_size) for name in scales.layer.banks}
    for kind in ("scales", "offsets", "codes", "sums"):
        getattr(grid, kind)[scales.unit] = {name: one[kind] for name, one in held.items()}


def check_steps(steps: int, rate: float) -> None:
    """Raises `DistillError` for numbers that make no sense."""
    if steps < 1 or not rate > 0:
        raise DistillError(f"expected at least 1 step and a positive rate, got {steps} and {rate}")


def split(items: Iterable[T], steps: int) -> tuple[list[T], list[T]]:
    """What the result is measured on, and what is trained on; the same where there are fewer than four.

    Raises:
        DistillError: There is none.
    """
    taken = list(islice(items, CHECKED + steps))
    if not taken:
        raise DistillError("there is no batch to distill on")
    checked = taken[: min(CHECKED, len(taken) // 4)] or taken
    return checked, taken[len(checked) :] or taken


def train_scales(
    model: nn.Module,
    scales: list[TrainableScales],
    before: Iterable[T],
    trained: Collection[T],
    after: Iterable[T],
    run: Callable[[nn.Module, list[TrainableScales], Iterable[T], torch.optim.Optimizer | None], dict[str, float]],
    rate: float,
) -> Distilled:
    """Trains scales, and stores them unless nothing is better with them.

    Args:
        model: The float model.
        scales: Of its layers.
        before: What ``run`` measures first.
        trained: What it takes a step on, each.
        after: What it measures at the end.
        run: `through_layers` or `through_logits`.
        rate: At the first step.
    """
    matrices = [matrix for one in scales for matrix in one.matrices]
    with modes_kept(model), _frozen(model), not_counted():
        model.eval()
        errors = run(model, scales, before, None)
        states = [one.state() for one in scales]
        steps = len(trained)
        optimizer = torch.optim.Adam([tensor for one in scales for tensor in one.parameters], lr=rate)
        falling = LinearLR(optimizer, 1.0, 1 / steps, max(steps - 1, 1))
        what = f"distilling {scales[0].unit}" if len(scales) == 1 else "distilling"
        with tqdm(total=steps, desc=what, unit="batch", disable=None) as bar:
            for item in trained:
                run(model, scales, [item], optimizer)
                falling.step()
                bar.update()
        for matrix in matrices:
            matrix.store()
        found = run(model, scales, after, None)
    fixed = {one.unit for one in scales if not one.matrices}
    kept = [name for name in errors if not found[name] < errors[name] and name not in fixed]
    for one, state in zip(scales, states, strict=True):
        if one.unit in kept or "logits" in kept:
            one.go_back(state)
    return Distilled({name: (errors[name], found[name]) for name in errors}, kept)


def _trained(
    model: nn.Module, scales: list[TrainableScales], items: Iterable[T], run: Any, steps: int, rate: float
) -> Distilled:
    """`train_scales` on the first of the items, measured on others; layers that are put back count in the report."""
    scales = [one for one in scales if not one.is_float]
    if not any(one.matrices for one in scales):
        raise DistillError("no expert of the packed model is at 1 to 8 bits: there are no scales to distill")
    checked, trained = split(items, steps)
    found = train_scales(model, scales, checked, list(islice(cycle(trained), steps)), checked, run, rate)
    if not found.kept:
        return found
    before = {name: first for name, (first, _) in found.errors.items()}
    after = before  # what is put into the model is what is reported
    if len(found.kept) < len(before) - sum(not one.matrices for one in scales):
        with modes_kept(model), _frozen(model), not_counted():
            model.eval()
            after = run(model, scales, checked, None)
    return Distilled({name: (before[name], after[name]) for name in before}, found.kept)


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
