"""Records a training loop of one's own: router norms, expert loads, and at the end curvature and statistics.

No trainer and no logger: the loop calls `after_step`, and logs what it returns if it wants to.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from ..compat import wrapped_in
from ..layers.module_tree import root_model
from ..layers.moe_layers import MoELayer, find_moe_layers
from ..layers.patterns import Patterns
from ..plans.beside import PlanFiles
from ..plans.plan import PrecisionPlan, model_type_of
from .batches import run_batch
from .collecting import MEMORY_GIB, Steps, collect_from_steps
from .curvature import Curvature
from .history import HistoryError, RouterNormHistory, load_metrics
from .loads import LoadCounter
from .router_norms import router_norms
from .second_moments import curvature_of
from .statistics import ExpertStatistics


class RunRecorder:
    """Records a training loop: what `RouterNormMonitor` records, where there is no Trainer.

    Tokens are counted in every forward pass until `close`, which the end of a ``with`` block calls. Under DDP and FSDP2
    all methods but `save` are collectives: call them on all ranks.

    Args:
        model: The model, or what is around it (Fabric, DDP, FSDP2, torch.compile).
        every_n_steps: Optimizer steps between two records.
        history: Of the run that this loop continues, with its baseline; None begins at step 0 with the weights as they
            are.
        router_pattern: As in `find_moe_layers`.
        expert_pattern: As in `find_moe_layers`.
        layout: As in `find_moe_layers`.

    Attributes:
        layers: As found by `find_moe_layers`.
        history: Norms and loads so far.

    Raises:
        MoELayerError: The model has no Mixture-of-Experts layer.
        HistoryError: The history is of another model.
        ValueError: ``every_n_steps`` is below 1.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.AdamW(model.train().parameters())
        >>> batch = {"input_ids": torch.arange(3, 100)[None], "labels": torch.arange(3, 100)[None]}
        >>> with RunRecorder(model) as recorder:
        ...     for step in (1, 2):
        ...         model(**batch).loss.backward()
        ...         optimizer.step()
        ...         metrics = recorder.after_step(step)
        >>> recorder.history.steps, int(recorder.history.loads["training"]["model.layers.0.mlp"][0].sum())
        ([0, 1, 2], 388)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every_n_steps: int = 1,
        history: RouterNormHistory | None = None,
        router_pattern: str | None = None,
        expert_pattern: str | None = None,
        layout: str | None = None,
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        given = {"router_pattern": router_pattern, "expert_pattern": expert_pattern, "layout": layout}
        patterns = Patterns(**{key: value for key, value in given.items() if value is not None})  # type: ignore[typeddict-item]
        self._model, self._every = model, every_n_steps
        self.layers: list[MoELayer] = find_moe_layers(model, **patterns)
        root = root_model(model)
        while (inner := wrapped_in(dict(root.named_children()))) is not None:
            root = inner
        fresh = RouterNormHistory.of(self.layers, model_type_of(root), patterns)
        if history is not None and history.layers != fresh.layers:
            raise HistoryError(
                f"the history is of other layers ({len(history.layers)} of {history.model_type!r}) than the model has "
                f"({len(fresh.layers)} of {fresh.model_type!r}): give the history of the run that this loop continues"
            )
        self.history = fresh if history is None else history
        if not self.history.steps:
            self.history.record(0, router_norms(self.layers))
        self._logged = dict(self.history.loads.get("training", {}))
        self._counter = LoadCounter(self.layers, model)

    def __enter__(self) -> RunRecorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def after_step(self, step: int, *, last: bool = False) -> dict[str, float]:
        """Takes a record if one is due: each time that a multiple of ``every_n_steps`` is crossed.

        Args:
            step: Optimizer steps taken so far.
            last: No step is to come: takes a record in any case.

        Returns:
            The record as flat keys for a logger (``router_norm/...``, ``router_norm_change/...``, ``expert_load/...``);
            empty if none was due.

        Raises:
            ValueError: There is a record of a later step, so that this one would not be recorded.
        """
        if step < self.history.steps[-1]:
            raise ValueError(
                f"got step {step}, and step {self.history.steps[-1]} is recorded already: count on from the history "
                "that the loop continues, or begin without history="
            )
        if last and step == self.history.steps[-1] and step > self.history.steps[0]:
            self.history.replace_last(router_norms(self.layers))  # weights averaged, or the best ones loaded
        due = step // self._every > self.history.steps[-1] // self._every
        if not due and not (last and step > self.history.steps[-1]):
            return {}
        self.history.add_load(self._counter.take(training=True))
        self.history.record(step, router_norms(self.layers))
        before, self._logged = self._logged, dict(self.history.loads.get("training", {}))
        return self.history.metrics() | load_metrics(before, self._logged, list(self.history.layers))

    @contextmanager
    def validation(self) -> Iterator[None]:
        """Forward passes inside are a validation: counted apart, in place of the validation before."""
        self._counter.training = False
        self._counter.forget_validation()
        try:
            yield
            if loads := self._counter.take(training=False):
                self.history.loads["validation"] = loads
        finally:
            self._counter.training = True

    def curvature(self, *optimizers: Any) -> Curvature:
        """Means of the second moments that the optimizers keep of the experts' gradients.

        Raises:
            CurvatureError: They keep none that can be read; the message says why.
        """
        return curvature_of(self.layers, optimizers)

    def statistics(
        self,
        batches: Iterable[Any],
        forward: Callable[[Any], object] | None = None,
        *,
        text: str = "",
        memory_gib: float = MEMORY_GIB,
    ) -> ExpertStatistics:
        """Second moments of the experts' inputs at the weights as they are; nothing of the model changes.

        Args:
            batches: Can be gone through more than once, such as a list or a data loader.
            forward: Runs the model on a batch; by default a mapping is its keyword arguments, anything else its only
                argument.
            text: What the text is, for the file.
            memory_gib: As in `collect_statistics`.

        Raises:
            StatisticsError: As `collect_statistics` does.
        """
        forward = forward or partial(run_batch, self._model)
        return collect_from_steps(self._model, self.layers, Steps(forward, batches), text=text, memory_gib=memory_gib)

    def save(
        self,
        path: str | os.PathLike[str],
        plan: PrecisionPlan,
        curvature: Curvature | None = None,
        statistics: ExpertStatistics | None = None,
    ) -> PlanFiles:
        """Writes a plan, the history, and what is given beside it, under the names that the other commands look for.

        What another run has left there is removed first: its statistics are of other weights.

        Args:
            path: Of the plan, ending in ``.json``. Call it on one process.
            plan: As `allocate` made it.
            curvature: Of the final weights.
            statistics: Of the final weights.

        Returns:
            The paths.

        Raises:
            ValueError: ``path`` does not end in ``.json``.
            OSError: A file cannot be written.
        """
        files = PlanFiles.of(path)
        for old in (files.plan, files.curvature, files.statistics, files.grid):
            old.unlink(missing_ok=True)
        self.history.save(files.history)
        for kept, target in ((curvature, files.curvature), (statistics, files.statistics)):
            if kept is not None:
                kept.save(target)
        plan.save(files.plan)
        return files

    def close(self) -> None:
        """Takes the hooks off the model; a second call does nothing."""
        self._counter.close()
