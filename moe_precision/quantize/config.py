"""The entry of config.json that describes how a checkpoint is packed, and what `from_pretrained` takes to pack one."""

from __future__ import annotations

import json
import os
import warnings
from typing import Any

import torch
import xxhash
from torch import nn
from transformers.quantizers import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import MoEPrecisionError
from ..layers.floats import QUANT_METHOD as QUANT_METHOD
from ..layers.moe_layers import MoELayer
from ..plans.beside import existing
from ..plans.document import Document
from ..plans.methods import reads
from ..plans.plan import PrecisionPlan, as_plan
from ..plans.widths import PlanError
from ..recording.curvature import Curvature, as_curvature
from ..recording.planned_weights import check_plan_is_for, norms_of_plan
from ..recording.statistics import ExpertStatistics, as_statistics
from .codec.grid import Grid

FORMAT_VERSION = 3  # of the packed checkpoint: docs/checkpoint-format.md; 1 had no checksums and no version field


class QuantizationError(MoEPrecisionError, ValueError):
    """A checkpoint whose experts could not all be read or quantized."""


@register_quantization_config(QUANT_METHOD)
class PlanQuantizationConfig(QuantizationConfigMixin):
    """Tells `from_pretrained` to quantize by a precision plan.

    Args:
        plan: A `PrecisionPlan`, its dict, or the path of its file. With a path, the curvature, grid and statistics
            that a run has left beside the plan are taken where none are given; with a plan they are not.
        non_expert_bits: 8 or 4 to quantize the other linear layers too; routers, embeddings, norms, the output head and
            what the family keeps in float32 always keep their precision. None, the default, quantizes experts only.
        curvature: `Curvature`, or the path of its file: errors in input columns where the loss is curved count more in
            the fit. It changes values, not sizes, and is not needed again for loading.
        grid: `Grid`, or the path of its file: scales and offsets that training with `PrecisionAnneal` ended on, or
            codes and distilled scales (``RouterNormMonitor(distill_steps=100)``); nothing is fitted then.
        statistics: `ExpertStatistics`, or the path of their file: the fit rounds under the second moments of the
            experts' inputs, which loses a fraction of what it loses without. They change values, not sizes, and are not
            needed again for loading.

    Raises:
        PlanError: The plan or ``non_expert_bits`` is not valid.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> config = PlanQuantizationConfig("precision_plan.json")
        >>> model = AutoModelForCausalLM.from_pretrained("checkpoint", quantization_config=config)
        >>> model.save_pretrained("packed")
    """

    def __init__(
        self,
        plan: PrecisionPlan | Document | str | os.PathLike[str],
        *,
        non_expert_bits: int | None = None,
        curvature: Curvature | str | os.PathLike[str] | None = None,
        grid: Grid | str | os.PathLike[str] | None = None,
        statistics: ExpertStatistics | str | os.PathLike[str] | None = None,
        quant_method: str = QUANT_METHOD,  # config.json names it; never another
        format_version: int = FORMAT_VERSION,
    ) -> None:
        if format_version != FORMAT_VERSION:
            raise PlanError(
                f"the packed checkpoint has format version {format_version}, this release of moe-precision reads "
                f"{FORMAT_VERSION}: install the release that wrote it, or quantize the float checkpoint again"
            )
        if non_expert_bits not in (None, 4, 8):
            raise PlanError(f"non_expert_bits must be 4, 8 or None, got {non_expert_bits!r}")
        self.quant_method = quant_method
        self.plan = as_plan(plan)
        if isinstance(plan, str | os.PathLike) and os.fspath(plan).endswith(".json"):
            curvature = existing("curvature", plan) if curvature is None else curvature
            grid = existing("grid", plan) if grid is None else grid
            statistics = existing("statistics", plan) if statistics is None and grid is None else statistics
        self.non_expert_bits = non_expert_bits
        self.curvature = None if curvature is None else as_curvature(curvature)
        self.grid = grid if grid is None or isinstance(grid, Grid) else Grid.load(grid)
        self.statistics = None if statistics is None else as_statistics(statistics)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Reads config.json's entry; one without a version is of version 1."""
        return super().from_dict({"format_version": 1, **config_dict}, return_unused_kwargs, **kwargs)

    def digest(self) -> str:
        """A hash of the widths: equal for configs that give every expert the same ones."""
        widths = {name: layer.projection_bits for name, layer in self.plan.layers.items()}
        said = json.dumps([widths, self.plan.group_size, self.non_expert_bits], sort_keys=True)
        return xxhash.xxh3_64(said.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds: the widths, without the signals that led to them."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "plan": self.plan.widths_only().to_dict(),
            "non_expert_bits": self.non_expert_bits,
        }

    @property
    def weights_matter(self) -> bool:
        """Whether something is given that belongs to certain weights."""
        files = self.curvature, self.grid, self.statistics
        return any(file is not None for file in files) or bool(norms_of_plan(self.plan))

    def warn_if_unweighted(self) -> None:
        """Warns where the plan was made for a fit by curvature or statistics, and they are not given."""
        if self.grid is not None:
            return
        for kind, consequence in (("curvature", "is unweighted"), ("statistics", "does not know the inputs")):
            if reads(self.plan.method, kind) and getattr(self, kind) is None:  # type: ignore[arg-type]
                warnings.warn(
                    f"the plan was made by {self.plan.method}, for a fit with {kind}: give {kind}= (or --{kind}), the "
                    f"file beside the run's plan; the fit {consequence} now",
                    stacklevel=3,
                )

    def in_names_of(self, model: nn.Module, layers: list[MoELayer]) -> None:
        """Takes on the names of a model's layers, which may be another class of the model that the plan was made for.

        Args:
            model: The float model, on any device.
            layers: Its layers, as found by `find_moe_layers` with the plan's patterns.

        Raises:
            PlanError: The plan is for another model.
            CurvatureError: The curvature is of another model.
            StatisticsError: The statistics are of another model.
            GridError: The grid belongs to another plan.
        """
        found = {layer.name: layer.shape for layer in layers}
        self.plan = self.plan.for_model(model, found)
        self.curvature = None if self.curvature is None else self.curvature.for_layers(found)
        self.statistics = None if self.statistics is None else self.statistics.for_layers(found)
        self.grid = None if self.grid is None else self.grid.for_plan(self.plan)

    @torch.no_grad()
    def check_weights(self, layers: list[MoELayer]) -> None:
        """Checks that plan, curvature, grid and statistics belong to these weights, by the norms of the routers.

        Routers stay as they are.

        Args:
            layers: The model's, as found by `find_moe_layers` while its experts were float.

        Raises:
            CurvatureError: The curvature belongs to other weights.
            GridError: The grid belongs to other weights.
            StatisticsError: The statistics belong to other weights.
            PlanError: The plan does, and there is no grid, which was fixed after it.
        """
        if not self.weights_matter:
            return
        norms = {layer.name: layer.row_norms() for layer in layers}
        if self.curvature is not None:
            self.curvature.check_router_norms(norms)
        if self.grid is not None:
            self.grid.check_router_norms(norms)
        if self.statistics is not None:
            self.statistics.check_router_norms(norms)
        if self.grid is None:
            check_plan_is_for(self.plan, norms)
