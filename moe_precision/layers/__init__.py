"""What a model's experts are: its module tree, the experts and routers in it, and the layers they make."""

from .module_tree import MoELayerError, root_model
from .moe_layers import MoELayer, find_moe_layers
from .routers import CAVEATS
from .shape import LayerShape

__all__ = ["CAVEATS", "LayerShape", "MoELayer", "MoELayerError", "find_moe_layers", "root_model"]
