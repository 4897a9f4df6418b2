"""Mixed-precision plans for Mixture-of-Experts models, derived from training itself.

A callback records the L2 norm of every expert's router row during training and writes a precision plan at the end; a
quantize step turns plan and weights into a smaller model. Importing this package registers the quantizer with
transformers, so that packed checkpoints load with ``from_pretrained``.
"""

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
from .quantize import PlanQuantizationConfig, QuantizationError, UnsupportedLayoutError, quantize_model
from .quantize.dequantizing import dequantize_checkpoint, dequantize_model
from .quantize.distilling import Distilled, distill_scales
from .quantize.trainable import DistillError
from .quantize.writer import distill_checkpoint, quantize_checkpoint
from .recording.collecting import collect_statistics
from .recording.curvature import Curvature, CurvatureError
from .recording.history import HistoryError, RouterNormHistory
from .recording.router_norms import router_norms
from .recording.statistics import ExpertStatistics, StatisticsError
from .version import __version__

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
    "RouterNormHistory",
    "StatisticsError",
    "StreamingError",
    "UnsupportedLayoutError",
    "__version__",
    "allocate",
    "bits_from_order",
    "collect_statistics",
    "dequantize_checkpoint",
    "dequantize_model",
    "distill_checkpoint",
    "distill_scales",
    "find_moe_layers",
    "load_model",
    "quantize_checkpoint",
    "quantize_model",
    "rank_experts",
    "replan",
    "router_norms",
]
