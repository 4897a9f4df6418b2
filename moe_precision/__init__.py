"""Mixed-precision plans for Mixture-of-Experts models, derived from training itself.

A callback records the L2 norm of every expert's router row during training and writes a precision plan at the end; a
quantize step turns plan and weights into a smaller model. Importing this package registers the quantizer with
transformers, so that packed checkpoints load with ``from_pretrained``.
"""

from .allocation.allocator import allocate
from .allocation.orders import bits_from_order, rank_experts
from .errors import MoEPrecisionError
from .layers.module_tree import MoELayerError
from .layers.moe_layers import MoELayer, find_moe_layers
from .plans.plan import PrecisionPlan
from .plans.settings import AllocationError
from .plans.widths import PlanError
from .quantize import PlanQuantizationConfig, QuantizationError, UnsupportedLayoutError, quantize_model
from .recording.history import HistoryError, RouterNormHistory
from .version import __version__

__all__ = [
    "AllocationError",
    "HistoryError",
    "MoELayer",
    "MoELayerError",
    "MoEPrecisionError",
    "PlanError",
    "PlanQuantizationConfig",
    "PrecisionPlan",
    "QuantizationError",
    "RouterNormHistory",
    "UnsupportedLayoutError",
    "__version__",
    "allocate",
    "bits_from_order",
    "find_moe_layers",
    "quantize_model",
    "rank_experts",
]
