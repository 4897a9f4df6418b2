"""Distills scales from a float checkpoint that need not fit into memory, one of its layers after the other."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
from transformers import PreTrainedModel

from ...checkpoints.checkpoint import Checkpoint, opened
from ...layers.moe_layers import MoELayer, find_moe_layers
from ...plans.plan import PrecisionPlan
from ...recording.curvature import Curvature
from ...recording.padding import Padding
from ...recording.router_norms import norms_by_layer
from ...recording.statistics import ExpertStatistics
from ..codec.grid import Grid
from ..config import PlanQuantizationConfig
from ..distances import Step, through_layers
from ..distilling import RATE, STEPS, Distilled, check_steps, split, take_in, train_scales
from ..replace import check_packable, find_targets
from ..side_by_side import ForwardPass, Gates
from ..trainable import DistillError, TrainableScales
from .parts import PartlyLoaded

_ELSE = "distill with --distill-through logits, or with distill_scales, which take the whole model in memory"


def distill_streamed(
    checkpoint: Checkpoint | str | os.PathLike[str],
    plan: PrecisionPlan | str | os.PathLike[str],
    batches: Iterable[Any],
    *,
    steps: int = STEPS,
    rate: float = RATE,
    curvature: Curvature | str | os.PathLike[str] | None = None,
    statistics: ExpertStatistics | str | os.PathLike[str] | None = None,
) -> tuple[Grid, Distilled]:
    """Quantizes the experts of a checkpoint and distills their scales by layer, with one layer in memory at a time.

    All batches go through the first layer, then all through the second; the experts of a layer are trained on what the
    layers before it, quantized already, make of the batches. It is what `distill_scales` does with ``through="layers"``
    on the whole model, in another order. Runs on the CPU, in float32.

    Memory holds what is in no layer (embeddings), one layer and the gradients of its experts, the codes and scales of
    all layers (the size of the packed experts), and of every batch what goes from layer to layer:
    ``4 (steps + 16) tokens width`` bytes, and the attention's mask where the model makes one.

    Args:
        checkpoint: The float checkpoint.
        plan: The plan, or the path of its file.
        batches: As in `distill_scales`.
        steps: As in `distill_scales`.
        rate: As in `distill_scales`.
        curvature: `Curvature` or the path of its file.
        statistics: `ExpertStatistics` or the path of their file.

    Returns:
        A grid with codes, for `quantize_checkpoint`, and what distilling has changed.

    Raises:
        DistillError: There is no batch, or no expert is below 16 bits, or the model does not call its layers one after
            the other.
        CheckpointError: The checkpoint is incomplete, or a weight cannot be converted.
        PlanError: The plan is for another model.

    Example:
        >>> import torch
        >>> batches = [{"input_ids": torch.randint(0, 128, (4, 64))} for _ in range(4)]
        >>> grid, distilled = distill_streamed("checkpoint", "precision_plan.json", batches, steps=5)
        >>> quantize_checkpoint("checkpoint", "precision_plan.json", "packed", grid=grid)
    """
    check_steps(steps, rate)
    config = PlanQuantizationConfig(plan, curvature=curvature, statistics=statistics)
    if config.grid is not None:
        raise DistillError(
            f"a grid stands beside {os.fspath(plan)!r}, whose scales would change: give the plan itself "  # type: ignore[arg-type]
            "(PrecisionPlan.load), and the curvature and statistics beside it"
        )
    with opened(checkpoint) as source, torch.inference_mode(False), torch.autocast("cpu", enabled=False):
        parts = PartlyLoaded(source)
        layers = find_moe_layers(parts.model, **config.plan.patterns)
        check_packable(parts.model, layers)
        config.in_names_of(parts.model, layers)
        grid = Grid(config.plan)
        with parts.holding(layer.router for layer in layers):
            config.check_weights(layers)
            grid.router_norms = norms_by_layer(layers)
        return grid, _Streamed(parts, layers, config, grid, batches, steps, rate).run()


class _Streamed:
    """One run of `distill_streamed`."""

    def __init__(
        self,
        parts: PartlyLoaded,
        layers: list[MoELayer],
        config: PlanQuantizationConfig,
        grid: Grid,
        batches: Iterable[Any],
        steps: int,
        rate: float,
    ) -> None:
        self._parts, self._config, self._grid, self._rate = parts, config, grid, rate
        self._waiting = {layer.name: layer for layer in layers}
        self._done: set[str] = set()
        if outside := [name for name in self._waiting if not _inside(name, parts.layers)]:
            raise DistillError(f"{outside} are in no numbered layer of the model: {_ELSE}")
        checked, trained = split(batches, steps)
        self._padding = Padding()
        self._passes: list[ForwardPass] = []
        before, training, after = (
            [self._started(batch) for batch in group] for group in (checked, islice(cycle(trained), steps), checked)
        )
        self._before, self._training, self._after = ([step for step, _ in group] for group in (before, training, after))
        self._tried = [peek for _, peek in after]
        self._found = Distilled({}, [])

    def _started(self, batch: Any) -> tuple[Step, Step]:
        """Takes a batch through the layer where it waits, or runs that layer alone."""
        one = ForwardPass(partial(_run, self._parts.model, batch))
        self._passes.append(one)

        def seen(step: Step) -> None:
            self._padding.see(batch if isinstance(batch, Mapping) else {})
            step()

        return partial(seen, one.advance), partial(seen, one.peek)

    def run(self) -> Distilled:
        """Takes all batches through all layers up to the last with experts, and fills the grid."""
        gates = Gates(self._parts.layers)
        try:
            for one in self._passes:
                one.start()
            while self._waiting:
                self._through(self._next())
        except (RuntimeError, NotImplementedError) as error:
            if "meta" not in str(error):
                raise
            raise DistillError(
                f"{type(self._parts.model).__name__} reads weights of a layer without calling it: {_ELSE}"
            ) from error
        finally:
            for one in self._passes:
                one.stop()
            gates.close()
        if not self._found.errors:
            raise DistillError("no expert of the plan is at 1 to 8 bits: there are no scales to distill")
        return self._found

    def _next(self) -> str:
        """The layer that all batches wait at."""
        first, *others = (one.waits_at for one in self._passes)
        if first is None or first in self._done or any(other != first for other in others):
            raise DistillError(
                f"{type(self._parts.model).__name__} does not call its layers once each, one after the other, or not "
                f"those of {list(self._waiting)}: {_ELSE}"
            )
        self._done.add(first)
        return first

    def _through(self, name: str) -> None:
        """Takes all batches through one layer, whose experts are distilled if it has some."""
        own = [self._waiting.pop(one) for one in list(self._waiting) if _inside(one, [name])]
        self._parts.load(name)
        if own:
            self._distill(own)
        else:
            self._pass()
        self._parts.forget(name)

    def _distill(self, layers: list[MoELayer]) -> None:
        config, model = self._config, self._parts.model
        listed = find_targets(model, layers, config.plan, None, config.curvature, None, config.statistics)
        targets = {target.parameter: target for target in listed}
        scales = [TrainableScales.fitted(layer, targets, config.plan.group_size) for layer in layers]
        through = partial(through_layers, padding=self._padding)
        changed = [one for one in scales if not one.is_float]
        if any(one.matrices for one in changed):
            found = train_scales(model, changed, self._before, self._training, self._tried, through, self._rate)
            after = through(model, changed, self._after, None)  # with what is kept
            self._found.errors.update({name: (first, after[name]) for name, (first, _) in found.errors.items()})
            self._found.kept.extend(found.kept)
        elif changed:  # experts are dropped, and the others at 16 bits
            first, _, after = (through(model, changed, of, None) for of in (self._before, self._training, self._after))
            self._found.errors.update({name: (first[name], after[name]) for name in first})
        else:
            self._pass()
        for one in scales:
            take_in(self._grid, one)

    def _pass(self) -> None:
        for step in (*self._before, *self._training, *self._after):
            step()


def _run(model: PreTrainedModel, batch: Any) -> object:
    if isinstance(batch, Mapping):
        return model(**{**batch, "use_cache": False})
    return model(batch)


def _inside(name: str, layers: Iterable[str]) -> bool:
    """Whether a module is one of these layers, or in one."""
    return any(f"{name}.".startswith(f"{layer}.") for layer in layers)
