"""Lightning callbacks, one a file."""

from .router_norm_monitor import RouterNormMonitor
from .save_pretrained import SavePretrained

__all__ = ["RouterNormMonitor", "SavePretrained"]
