"""What a model's experts are: its module tree, the experts and routers in it, and the layers they make.

Names are imported when they are first asked for: plans need the shapes of layers, and no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .module_tree import MoELayerError, root_model
    from .moe_layers import MoELayer, find_moe_layers
    from .routers import CAVEATS
    from .shape import LayerShape

__all__ = ["CAVEATS", "LayerShape", "MoELayer", "MoELayerError", "find_moe_layers", "root_model"]

_MODULE_OF = {
    "CAVEATS": "routers",
    "LayerShape": "shape",
    "MoELayer": "moe_layers",
    "MoELayerError": "naming",
    "find_moe_layers": "moe_layers",
    "root_model": "roots",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = found
    return found
