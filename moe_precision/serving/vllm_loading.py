"""Gives vLLM's default loader the tensors of a packed checkpoint: those of experts to our modules, others to the model.

vLLM's own hook for names (``get_checkpoint_weight_mapper``) reaches only the families whose models load through
``AutoWeightsLoader``; the others walk the names by themselves and stop at the first that they do not know.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import wraps
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from .errors import ServingError
from .names import refuse_packed, refuse_packed_files, with_other_names
from .vllm_config import QUANT_METHOD

if TYPE_CHECKING:
    from .packed_model import ServedExperts
    from .vllm_method import PackedExpertsMethod


def hook_loading() -> None:
    """Wraps the loader's generator of weights, and its check of what was loaded; call it once."""
    stock, check = DefaultModelLoader.get_all_weights, DefaultModelLoader.track_weights_loading

    @wraps(stock)
    def get_all_weights(loader: Any, model_config: Any, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        tensors = stock(loader, model_config, model)
        if model_config.quantization != QUANT_METHOD:
            refuse_packed_files(str(model_config.model))
            yield from refuse_packed(tensors, repr(model_config.model))
            return
        if loader.enable_weights_track is None:
            loader.enable_weights_track = True  # vLLM's check that every parameter was loaded is for float models only
        layers = served_layers(model)
        packed = next(iter(layers.values()))[0].packed
        missing = [name for name in packed.layers if name not in layers]
        if missing and not _is_split_by_layers():
            raise ServingError(
                f"the plan of {model_config.model!r} names the layer {missing[0]!r}, which {type(model).__name__} of "
                "vLLM does not have: load the model with transformers"
            )
        yield from packed.distribute(tensors, {name: experts for name, (_, experts) in layers.items()})

    @wraps(check)
    def track_weights_loading(loader: Any, model: nn.Module, loaded: set[str] | None, **options: Any) -> None:
        if loaded is not None:  # vLLM compares names, and its transformers backend has routers under two
            loaded = with_other_names(model, loaded)
        check(loader, model, loaded, **options)

    DefaultModelLoader.get_all_weights = get_all_weights
    DefaultModelLoader.track_weights_loading = track_weights_loading


def served_layers(model: nn.Module) -> dict[str, tuple[PackedExpertsMethod, ServedExperts]]:
    """The packed layers of a model of vLLM by their names in the plan.

    Raises:
        ServingError: It has none.
    """
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    from .vllm_method import PackedExpertsMethod

    found = {}
    for module in model.modules():
        if isinstance(module, RoutedExperts):
            method = module.quant_method
            if not isinstance(method, PackedExpertsMethod):
                raise ServingError(f"the experts at {module.layer_name!r} got {type(method).__name__}, not packed ones")
            found[method.name] = method, module.packed_experts
    if not found:
        raise ServingError(
            f"{type(model).__name__} of vLLM has no layer of routed experts that a plugin can serve: load the model "
            "with transformers"
        )
    return found


def _is_split_by_layers() -> bool:
    config = get_current_vllm_config_or_none()
    return config is not None and config.parallel_config.pipeline_parallel_size > 1
