"""The step after training: a plan and float weights in, a packed model out that saves, loads and runs.

Importing this package registers the quantizer with transformers.
"""

from .config import PlanQuantizationConfig, QuantizationError
from .hf import PlanHfQuantizer
from .live import quantize_model
from .plain import load_packed_state
from .replace import UnsupportedLayoutError

__all__ = [
    "PlanHfQuantizer",
    "PlanQuantizationConfig",
    "QuantizationError",
    "UnsupportedLayoutError",
    "load_packed_state",
    "quantize_model",
]
