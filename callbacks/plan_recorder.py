"""What the callbacks share: finding the layers, recording their router norms, and the plan at the end. No trainer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from moe_precision.allocation import AllocationError, allocate, caveat_text, levels_of
from moe_precision.files import check_writable
from moe_precision.moe_layers import MoELayer, find_moe_layers, root_model
from moe_precision.plan import PrecisionPlan, check_group_size, model_type_of
from moe_precision.router_norms import HistoryError, RouterNormHistory, router_norms
from moe_precision.tables import as_text, layers_table

EXPERT_KEYS = 4096  # more curves than this are left out unless asked for: W&B slows down at 10,000 keys


class PlanRecorder:
    """Records router norms during a run and writes the plan and the history at its end.

    Reading is a collective under FSDP and ZeRO-3: call `start`, `record` and `finish` on all ranks.

    Args:
        owner: Name of the callback, for messages.
        average_bits: See `RouterNormMonitor`, as for the others.
        log_experts: None logs every expert's norm up to `EXPERT_KEYS` experts.

    Attributes:
        history: The recorded norms.
        plan: The plan, once training has ended.
        path: Where it is written, None where nothing is.
    """

    def __init__(
        self,
        owner: str,
        average_bits: float,
        bits: Sequence[int],
        method: str,
        group_size: int,
        every_n_steps: int | None,
        export_to: str,
        log_experts: bool | None,
        patterns: dict[str, str | None],
    ) -> None:
        levels_of(method, average_bits, bits)
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1 or None, got {every_n_steps}")
        if Path(export_to).suffix != ".json":
            raise ValueError(f"export_to must end in .json, got {export_to!r}")
        self.owner, self.every_n_steps, self.export_to, self.log_experts = owner, every_n_steps, export_to, log_experts
        self.settings: dict[str, Any] = {
            "average_bits": average_bits,
            "bits": tuple(bits),
            "method": method,
            "group_size": group_size,
        }
        self.patterns: dict[str, Any] = {key: pattern for key, pattern in patterns.items() if pattern is not None}
        self.history = RouterNormHistory()
        self.plan: PrecisionPlan | None = None
        self.path: Path | None = None
        self.layers: list[MoELayer] = []
        self.write_error: OSError | None = None
        self._warned = False

    def prepare(self, folder: str | None, anew: bool) -> None:
        """Before training: where the plan goes, checked to be writable; None for a run that writes nothing.

        Args:
            folder: What ``export_to`` is relative to.
            anew: Training starts at step 0, so that what another run has recorded does not count.
        """
        self.path, self.layers, self.plan, self.write_error, self._warned = None, [], None, None, False
        if anew:
            self.history = RouterNormHistory()
        if folder is not None:
            self.path = Path(folder, self.export_to)
            check_writable(self.path)

    def start(self, model: nn.Module, step: int) -> None:
        """Finds the layers, says what was found, and takes the baseline unless a checkpoint has brought one."""
        self.layers = find_moe_layers(model, **self.patterns)
        fresh = RouterNormHistory.of(self.layers, model_type_of(root_model(model)), self.patterns)
        for name, layer in fresh.layers.items():
            check_group_size(self.settings["group_size"], name, layer.projections)
        rank_zero_info(f"{self.owner}: recording\n{as_text(layers_table(self.layers))}")
        if fresh.caveats:
            rank_zero_warn(f"{self.owner}: {caveat_text(fresh.caveats)}.")
        if self.history.steps:
            if self.history.layers != fresh.layers:
                raise HistoryError(
                    f"the checkpoint's router norms are of layers {list(self.history.layers)}, this model has "
                    f"{list(fresh.layers)}, or their shapes differ"
                )
            self._check_restored(step)
        else:
            self.history = fresh
            self.record(step)
            if step > 0:
                rank_zero_warn(
                    f"{self.owner}: training resumes at step {step} from a checkpoint without router norms for "
                    f"export_to={self.export_to!r}. The change is measured from here, not from the start of training; "
                    f'the plan will say "baseline": {{"step": {step}}}.'
                )

    def _check_restored(self, step: int) -> None:
        """A resumed run whose routers are not those of the checkpoint would go on with a wrong model."""
        if self.history.steps[-1] != step:
            return
        recorded = torch.cat(list(self.history.last.values()))
        now = router_norms(self.layers).to("cpu")
        single = all(layer.router_is.dtype == torch.float32 for layer in self.layers)
        difference = float(((now - recorded).abs() / recorded.clamp(min=1e-30)).max())
        if difference > (1e-5 if single else 1e-2):  # a float32 run may go on in bfloat16
            raise HistoryError(
                f"{self.owner}: the routers of this model are not those whose norms were recorded at step {step} (a "
                f"norm differs by {difference:.2%}): the checkpoint was not restored into the model. transformers' "
                "Trainer leaves out routers and experts whose names on disk differ from the model's (transformers "
                "issue 48805): load the model with from_pretrained(checkpoint) before you resume from it"
            )

    def due(self, step: int, default_every: int) -> bool:
        """Whether a multiple of the interval was crossed since the last record.

        Crossed, not hit: with two optimizers Lightning's ``global_step`` rises by two a batch.
        """
        every = self.every_n_steps or default_every
        return bool(every) and step // every > self.history.steps[-1] // every

    def record(self, step: int) -> bool:
        """Reads all norms, unless this step has them already; returns whether it did."""
        if self.history.steps and step <= self.history.steps[-1]:
            return False
        self.history.record(step, router_norms(self.layers))
        if not self._warned and (broken := self.history.not_finite(last_only=True)):
            self._warned = True
            rank_zero_warn(f"{self.owner}: {broken}. Has training diverged? No plan can be made of this.")
        return True

    def metrics(self) -> dict[str, float]:
        """The last record for a logger, experts included up to `EXPERT_KEYS` of them."""
        experts = sum(layer.num_experts for layer in self.layers)
        return self.history.metrics(experts <= EXPERT_KEYS if self.log_experts is None else self.log_experts)

    def finish(self, step: int, writes: bool) -> PrecisionPlan | None:
        """The last record, then plan and history; returns the plan if it was written.

        A full disk does not stop the run, whose other callbacks may still save the model: see `raise_write_error`.

        Args:
            step: Optimizer step.
            writes: Whether this rank writes files.
        """
        self.record(step)
        if len(self.history.steps) < 2:
            rank_zero_warn(f"{self.owner}: no plan is written, because no optimizer step was taken.")
            return None
        writes = writes and self.path is not None
        if writes:
            self.save_history()  # whatever happens below, the record is kept
        self.history.measure_variance(self.layers)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self.plan = allocate(history=self.history, **self.settings)
        except AllocationError as error:  # of norms that are not finite
            rank_zero_warn(f"{self.owner}: no plan is written: {error}")
            return None
        for warning in caught:
            rank_zero_warn(f"{self.owner}: {warning.message}")
        if not writes or not self.save_history():
            return None
        assert self.path is not None
        try:
            self.plan.save(self.path)
        except OSError as error:
            self._remember(error, self.path)
            return None
        rank_zero_info(f"{self.owner}: wrote {self.path} ({self.plan.average_bits:.3g} bits on average)")
        return self.plan

    def save_history(self) -> bool:
        """Writes what was recorded, without any collective; returns whether that worked."""
        if self.path is None or not self.history.steps:
            return False
        path = self.path.with_suffix(".history.safetensors")
        try:
            self.history.save(path)
        except OSError as error:
            self._remember(error, path)
            return False
        return True

    def _remember(self, error: OSError, path: Path) -> None:
        self.write_error = type(error)(
            error.errno,
            f"{self.owner} could not write {str(path)!r}: {error.strerror or error}. The router norms are still in "
            "callback.history (history.save(path) writes them) and in checkpoints that were written",
        )
        rank_zero_warn(str(self.write_error))

    def raise_write_error(self) -> None:
        """Raises what `finish` could not write.

        Raises:
            OSError: The path and the reason.
        """
        if self.write_error is not None:
            raise self.write_error
