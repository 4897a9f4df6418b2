"""When a recording callback distills scales: after the last step, once the plan is made, or never."""

from __future__ import annotations

from collections.abc import Iterable

from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from pytorch_lightning.utilities.seed import isolate_rng
from torch import nn

from moe_precision.annealing.covers import AnnealError
from moe_precision.callbacks.statistics_recorder import Step
from moe_precision.layers.module_tree import root_model
from moe_precision.layers.moe_layers import MoELayer
from moe_precision.plans.plan import PrecisionPlan
from moe_precision.quantize.codec.grid import Grid
from moe_precision.quantize.distillable import check_plain, without_ddp
from moe_precision.quantize.distilling import distilled_grid, memory_bytes
from moe_precision.quantize.replace import check_packable
from moe_precision.recording.curvature import Curvature
from moe_precision.recording.processes import world_size
from moe_precision.recording.statistics import ExpertStatistics


class ScaleDistiller:
    """Says before training what distilling will take, and does it; a failure leaves the run and its plan alone.

    Args:
        owner: Name of the callback, for messages.
        steps: Training batches to distill on; 0 for none.

    Raises:
        ValueError: It is negative.
    """

    def __init__(self, owner: str, steps: int) -> None:
        if steps < 0:
            raise ValueError(f"distill_steps must be at least 0, got {steps}")
        self._owner, self._asked = owner, steps
        self._steps = 0  # of this run

    @property
    def needs(self) -> str:
        """What needs expert statistics, for messages; empty if nothing does."""
        return f"distill_steps={self._asked}" if self._asked else ""

    def start(self, model: nn.Module, layers: list[MoELayer], bits: int, group_size: int, obstacle: str) -> None:
        """Before the first step.

        Args:
            model: The model, or what is around it.
            layers: Its layers.
            bits: The most that an expert may get.
            group_size: Weights that share a scale and an offset.
            obstacle: Why this run can run no batch without a step, if it cannot.

        Raises:
            ValueError: ``obstacle``.
            DistillError: The experts are sharded, or behind adapters or wrappers.
            UnsupportedLayoutError: The experts are in a layout that cannot be packed.
        """
        self.close()
        if not self._asked:
            return
        if obstacle:
            raise ValueError(f"{self.needs} {obstacle}")
        root = root_model(without_ddp(model))
        check_plain(root, layers)
        check_packable(root, layers)
        self._steps = self._asked
        rank_zero_info(
            f"{self._owner}: after the last step, experts are quantized and their scales distilled over "
            f"{_batches(self._steps)}, which takes up to {memory_bytes(layers, bits, group_size) / 1e6:,.1f} MB beside "
            "the model"
        )

    def start_late(self) -> None:
        """Instead of `start`, for a run that had ended before this start."""
        self.close()
        if self._asked:
            rank_zero_warn(
                f"{self._owner}: no scales are distilled, since no batch runs after a training that had ended before: "
                f"run `moe-precision quantize --distill-steps {self._asked}` on the checkpoint"
            )

    def finish(
        self,
        model: nn.Module,
        layers: list[MoELayer],
        plan: PrecisionPlan,
        curvature: Curvature | None,
        statistics: ExpertStatistics | None,
        steps: Iterable[Step],
    ) -> Grid | None:
        """After the last step, with the plan made; a collective.

        Args:
            model: The model, or what is around it; its weights stay as they are.
            layers: Its layers.
            plan: Their widths.
            curvature: Of the trained model, if it is known.
            statistics: Of the experts' inputs; None if collecting them has failed.
            steps: Forward passes of training batches, of this process.

        Returns:
            Codes and scales, or None, with the reason in a warning.
        """
        wanted = self._steps
        self.close()
        if not wanted:
            return None
        if statistics is None:
            rank_zero_warn(f"{self._owner}: no scales are distilled, since there are no statistics to round under")
            return None
        try:
            with isolate_rng():
                grid, found = distilled_grid(
                    model, layers, plan, steps, steps=wanted, curvature=curvature, statistics=statistics
                )
        except Exception as error:  # whatever a training step raises here, the plan is still to be written
            rank_zero_warn(f"{self._owner}: no scales are distilled: {type(error).__name__}: {error}")
            return None
        rank_zero_info(f"{self._owner}: distilled scales over {_batches(wanted)}; {found.described()}")
        return grid

    def close(self) -> None:
        """Nothing is distilled any more in this run."""
        self._steps = 0


def refuse_distilling(steps: int) -> None:
    """Raises `AnnealError` where a recording callback would distill scales of weights that are then moved."""
    if steps:
        raise AnnealError(
            f"distill_steps={steps} would distill scales for the float weights, and annealing moves those onto a grid "
            "of its own: leave one of the two out"
        )


def _batches(count: int) -> str:
    return f"{count} training batches" + (" of each process" if world_size() > 1 else "")
