"""Mixed-precision plans for Mixture-of-Experts models, derived from training itself.

A callback records the L2 norm of every expert's router row during training and writes a precision plan at the end; a
quantize step turns plan and weights into a smaller model. Importing this package registers the quantizer with
transformers, so that packed checkpoints load with ``from_pretrained``: at once if transformers has loaded its modeling
code, else as soon as it does, before any model can be loaded.

Public names are imported when they are first asked for, so that importing the package alone takes no time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .registration import register_with_transformers
from .version import __version__

if TYPE_CHECKING:
    from .allocation.allocator import allocate
    from .allocation.orders import bits_from_order, rank_experts
    from .allocation.replanning import replan
    from .checkpoints import Checkpoint, CheckpointError, StreamingError, load_model
    from .errors import MoEPrecisionError
    from .layers import MoELayer, MoELayerError, find_moe_layers
    from .plans.numbers import AllocationError
    from .plans.plan import PrecisionPlan
    from .plans.settings import PlanSettings
    from .plans.widths import PlanError
    from .quantize import (
        PlanQuantizationConfig,
        QuantizationError,
        UnsupportedLayoutError,
        load_packed_state,
        quantize_model,
    )
    from .quantize.dequantizing import dequantize_checkpoint, dequantize_model
    from .quantize.distilling import Distilled, distill_scales
    from .quantize.modules import set_activations
    from .quantize.pruning import prune_checkpoint
    from .quantize.trainable import DistillError
    from .quantize.writer import RankError, all_ranks, distill_checkpoint, distill_streamed, quantize_checkpoint
    from .recording.collecting import collect_statistics
    from .recording.curvature import Curvature, CurvatureError
    from .recording.history import HistoryError, RouterNormHistory
    from .recording.router_norms import router_norms
    from .recording.run_recorder import RunRecorder
    from .recording.statistics import ExpertStatistics, StatisticsError

__all__ = [
    "AllocationError",
    "Checkpoint",
    "CheckpointError",
    "Curvature",
    "CurvatureError",
    "DistillError",
    "Distilled",
    "ExpertStatistics",
    "HistoryError",
    "MoELayer",
    "MoELayerError",
    "MoEPrecisionError",
    "PlanError",
    "PlanQuantizationConfig",
    "PlanSettings",
    "PrecisionPlan",
    "QuantizationError",
    "RankError",
    "RouterNormHistory",
    "RunRecorder",
    "StatisticsError",
    "StreamingError",
    "UnsupportedLayoutError",
    "__version__",
    "all_ranks",
    "allocate",
    "bits_from_order",
    "collect_statistics",
    "dequantize_checkpoint",
    "dequantize_model",
    "distill_checkpoint",
    "distill_scales",
    "distill_streamed",
    "find_moe_layers",
    "load_model",
    "load_packed_state",
    "prune_checkpoint",
    "quantize_checkpoint",
    "quantize_model",
    "rank_experts",
    "replan",
    "router_norms",
    "set_activations",
]

_DEFINED_IN = {
    ".allocation.allocator": ("allocate",),
    ".allocation.orders": ("bits_from_order", "rank_experts"),
    ".allocation.replanning": ("replan",),
    ".checkpoints": ("Checkpoint", "CheckpointError", "StreamingError", "load_model"),
    ".errors": ("MoEPrecisionError",),
    ".layers": ("MoELayer", "MoELayerError", "find_moe_layers"),
    ".plans.numbers": ("AllocationError",),
    ".plans.plan": ("PrecisionPlan",),
    ".plans.settings": ("PlanSettings",),
    ".plans.widths": ("PlanError",),
    ".quantize": (
        "PlanQuantizationConfig",
        "QuantizationError",
        "UnsupportedLayoutError",
        "load_packed_state",
        "quantize_model",
    ),
    ".quantize.dequantizing": ("dequantize_checkpoint", "dequantize_model"),
    ".quantize.modules": ("set_activations",),
    ".quantize.pruning": ("prune_checkpoint",),
    ".quantize.distilling": ("Distilled", "distill_scales"),
    ".quantize.trainable": ("DistillError",),
    ".quantize.writer": ("RankError", "all_ranks", "distill_checkpoint", "distill_streamed", "quantize_checkpoint"),
    ".recording.collecting": ("collect_statistics",),
    ".recording.curvature": ("Curvature", "CurvatureError"),
    ".recording.history": ("HistoryError", "RouterNormHistory"),
    ".recording.router_norms": ("router_norms",),
    ".recording.run_recorder": ("RunRecorder",),
    ".recording.statistics": ("ExpertStatistics", "StatisticsError"),
}
_MODULE_OF = {name: module for module, names in _DEFINED_IN.items() for name in names}
_SUBMODULES = ("allocation", "checkpoints", "compat", "errors", "files", "layers", "plans", "quantize", "recording")


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for (PEP 562)."""
    if name in _MODULE_OF:
        found = getattr(import_module(_MODULE_OF[name], __name__), name)
    elif name in _SUBMODULES:
        found = import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_transformers()
