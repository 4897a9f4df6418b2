"""Private names of torch, transformers and PEFT that this package relies on, each behind a name that says what it does.

No public API offers what they do. Each has a test in `tests/test_compat.py` or `tests/test_compat_transformers.py`, so
that a release that changes one of them fails there first, by name. Long because they all belong here.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps as ConversionOps  # what transformers hands weights to
from transformers.core_model_loading import PrefixChange, revert_weight_conversion
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _grouped_linear
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

# -- torch: modules ---------------------------------------------------------------------------------------------------

WRAPPED_AS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
"""Names of the only child of a wrapper: torch.compile, DDP, FSDP1, activation checkpointing, Fabric."""
_NAMED_AGAIN = "_original_module"  # Fabric's second name for what its strategy has wrapped


def wrapped_in(children: Mapping[str, nn.Module]) -> nn.Module | None:
    """What a wrapper with these children is around; None for a module that is no wrapper."""
    names = [name for name in WRAPPED_AS if name in children]
    return children[names[0]] if names and children.keys() <= {names[0], _NAMED_AGAIN} else None


FLAT_PARAMETER = "_flat_param"
"""Name of the parameter in which an FSDP1 unit holds all of its weights."""


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Parameters registered in a module itself, by name, as a dict that writes through.

    Unlike attributes it gives the parameter where a hook or a parametrization covers it, and it is fast.
    """
    return module._parameters


def forward_pre_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """The hooks that run before a module's forward pass."""
    return list(module._forward_pre_hooks.values())


def forget_forward_pre_hook(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Removes a hook that runs before a module's forward pass, also from a copy of the module that was hooked."""
    for key in [key for key, one in module._forward_pre_hooks.items() if one is hook]:
        del module._forward_pre_hooks[key]


def is_convolution(module: nn.Module) -> bool:
    """Whether a module is a convolution, whose 3-D weight is not a bank of experts."""
    return isinstance(module, nn.modules.conv._ConvNd)


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and no values, as torch traces models with them."""
    return isinstance(tensor, FakeTensor)


def inside(tensor: Tensor) -> list[Tensor]:
    """The tensors that a wrapper holds, such as codes and scales under one name; empty for a tensor that is none."""
    if not is_traceable_wrapper_subclass(tensor):
        return []
    names, _ = tensor.__tensor_flatten__()
    return [getattr(tensor, name) for name in names]


def forget_compiled_code() -> None:
    """Makes torch.compile compile again: compiled code does not see hooks that come or go."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


# -- torch: autograd and memory ---------------------------------------------------------------------------------------


def call_through(module: nn.Module, through: Callable[[Callable[[], Any]], Any]) -> None:
    """Lets calls of a module, its hooks included, go through a function, which is given the call to make."""
    module._compiled_call_impl = lambda *args, **kwargs: through(partial(module._call_impl, *args, **kwargs))


def called_as_before(module: nn.Module) -> None:
    """Takes back `call_through`."""
    module._compiled_call_impl = None


def version_of(tensor: Tensor) -> int:
    """A number that grows with every in-place change of a tensor or of its views."""
    return tensor._version


def storage_users(tensor: Tensor) -> int:
    """How many tensors and other holders share a tensor's memory now, the tensor itself included."""
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) - 1  # without the variable here


def in_backward_pass() -> bool:
    """Whether this code runs inside a backward pass: a forward pass here repeats an earlier one (checkpointing)."""
    return torch._C._current_graph_task_id() != -1


def run_first_in_backward(node: Node) -> None:
    """Makes a backward pass run a node as soon as its gradient is complete, before all others that are waiting."""
    node._set_sequence_nr(2**63 - 1)  # type: ignore[attr-defined]


def saved_tensors_hooks_are_set() -> bool:
    """Whether hooks currently handle what forward passes keep: activation checkpointing and offloading do so."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


# -- torch: the int4 kernel -------------------------------------------------------------------------------------------


def has_int4_kernel() -> bool:
    """Whether torch was built with its int4 kernel for CPUs."""
    return hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")


def pack_int4(codes: Tensor) -> Tensor:
    """torch's form of codes ``(out, in)`` int32 from 0 to 15: uint8, two codes per byte, in an order of its own."""
    found: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return found


def multiply_int4(x: Tensor, packed: Tensor, group_size: int, scales_and_zeros: Tensor) -> Tensor:
    """``x @ W.T`` for bfloat16 ``x`` ``(tokens, in)``, where W is ``(code - 8) * scale + zero``.

    Args:
        x: Activations.
        packed: Codes, as `pack_int4` gives them.
        group_size: Weights that share a scale and a zero.
        scales_and_zeros: ``(in / group, out, 2)`` bfloat16.
    """
    found: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group_size, scales_and_zeros)
    return found


# -- transformers -----------------------------------------------------------------------------------------------------


def register_experts_function(name: str, function: Callable[..., Tensor]) -> None:
    """Lets ``model.set_experts_implementation(name)`` run fused experts through a function."""
    ALL_EXPERTS_FUNCTIONS.register(name, function)


def runs_through_experts_interface(experts: nn.Module) -> bool:
    """Whether a module of fused experts calls the registered function, and has the flags that such a function reads."""
    return hasattr(experts, "has_gate") and hasattr(experts, "is_transposed")


def experts_implementation(experts: nn.Module) -> str | None:
    """Name of the function that a module of fused experts runs through."""
    config: Any = experts.config
    found: str | None = config._experts_implementation
    return found


def apply_gate(experts: Any, hidden: Tensor) -> Tensor:
    """Activation and gate of a module of fused experts, ``(tokens, 2 * neurons) -> (tokens, neurons)``."""
    found: Tensor = experts._apply_gate(hidden)
    return found


def grouped_linear(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """``x @ W.T`` with another matrix for each group of rows, in one launch.

    Args:
        x: ``(rows, in)``.
        weights: ``(groups, out, in)``.
        ends: ``(groups,)`` int32: where the rows of each group end.

    Returns:
        ``(rows, out)``.
    """
    found: Tensor = _grouped_linear(x, weights, ends)
    return found


def mark_as_read(tensors: Iterable[Tensor]) -> None:
    """Tells `from_pretrained` that tensors hold what a checkpoint says, and must not be initialized."""
    for tensor in tensors:
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]


def was_read(tensor: Tensor) -> bool:
    """Whether `from_pretrained` has filled a parameter or buffer from the checkpoint."""
    return getattr(tensor, "_is_hf_initialized", False)


def split_by(model: PreTrainedModel) -> dict[str, int]:
    """How transformers splits a model over processes: ``tp_size``, ``ep_size``, ... above 1; empty if it is whole."""
    config = getattr(model.config, "distributed_config", None)
    kinds = ("tp_size", "ep_size", "pp_size", "fsdp_size", "dp_replicate_size")
    sizes = {kind: getattr(config, kind, None) or 1 for kind in kinds}
    return {kind: size for kind, size in sizes.items() if size > 1}


def may_be_missing(model: PreTrainedModel, name: str) -> bool:
    """Whether a model can do without a tensor in its checkpoint, because it computes it."""
    return any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_missing or [])


def may_be_unused(model: PreTrainedModel, name: str) -> bool:
    """Whether a checkpoint may hold a tensor that a model does not have."""
    return any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_unexpected or [])


def dtype_plan(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Patterns of the names of weights that loading keeps in another dtype than ``dtype`` -> that dtype."""
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    return plan


def kept_in_float32(model: nn.Module) -> list[re.Pattern[str]]:
    """Patterns of the names of weights that a family keeps in float32 in a model of 16 bits, of either kind."""
    plan = dtype_plan(model, torch.float16) if isinstance(model, PreTrainedModel) else {}
    return [re.compile(pattern.replace("*", ".*")) for pattern in plan]


def model_of_config(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A new model of a class in the dtype of its config, which calling the class ignores."""
    return model_class._from_config(config)


def fill_buffers(model: PreTrainedModel) -> None:
    """Gives a model on the meta device the buffers that its family computes, as loading does; weights stay there."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta and name in module._non_persistent_buffers_set:
                module.register_buffer(name, torch.empty_like(buffer, device="cpu"), persistent=False)
    model.initialize_weights()


def tied_names(model: nn.Module) -> dict[str, str]:
    """Names of the parameters that a transformers model ties -> the name of what they are tied to."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def removes_a_prefix(conversion: Any) -> bool:
    """Whether a conversion only takes a part out of names, as where a text model is loaded from a larger one."""
    return isinstance(conversion, PrefixChange) and conversion.prefix_to_remove is not None


def save_under_module_names(model: PreTrainedModel) -> None:
    """Makes ``save_pretrained`` write the names of the module tree, without the conversions that loading noted."""
    model._weight_conversions = []


def mark_as_quantized(config: Any) -> None:
    """Tells transformers that the model of a config is quantized, as its own quantizers do."""
    config._is_quantized = True


class TrainerRun(NamedTuple):
    """What a callback of transformers' Trainer is not told.

    Attributes:
        folder: Where the checkpoints of the run go, in a hyperparameter search those of the trial.
        resumed_from: The checkpoint that the run has started from, if any.
    """

    folder: str | None
    resumed_from: str | None


def trainer_run() -> TrainerRun:
    """The run whose callback this is called from, read from the Trainer's loop; None where it is not found."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "_inner_training_loop" and isinstance(known := frame.f_locals, Mapping):
            trainer: Any = known.get("self")
            if hasattr(trainer, "_get_output_dir"):
                return TrainerRun(trainer._get_output_dir(known.get("trial")), known.get("resume_from_checkpoint"))
        frame = frame.f_back
    return TrainerRun(None, None)


def save_under_hub_names(model: PreTrainedModel) -> None:
    """Undoes `save_under_module_names`: ``save_pretrained`` writes the names that the family has on the Hub."""
    if hasattr(model, "_weight_conversions"):
        del model._weight_conversions


def under_hub_names(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model, by the names of its module tree, as the family has them on the Hub."""
    found: dict[str, Tensor] = revert_weight_conversion(model, dict(tensors))
    return found


def was_dequantized_on_loading(model: PreTrainedModel) -> bool:
    """Whether `from_pretrained` made a float model of another tool's packed weights, which saving would try to undo.

    From transformers 5.24 on it is never so: such a model forgets how it was read, and is saved as it is.
    """
    conversions = getattr(model, "_weight_conversions", None) or []
    operations = [operation for one in conversions for operation in getattr(one, "operations", ())]
    return any(getattr(operation, "hf_quantizer", None) is not None for operation in operations)


def mark_as_float(model: PreTrainedModel) -> None:
    """Undoes `mark_as_quantized` for a model and all models inside it."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and hasattr(module.config, "_is_quantized"):
            del module.config._is_quantized


def is_model_type(name: str) -> bool:
    """Whether transformers knows a model type of this name."""
    return name in CONFIG_MAPPING_NAMES


def parts_of_config(model_type: str) -> frozenset[str]:
    """The types of the models that transformers builds inside one of a type, such as the text model of a larger one."""
    if model_type not in CONFIG_MAPPING_NAMES:
        return frozenset()
    parts = CONFIG_MAPPING[model_type].sub_configs.values()
    return frozenset(part.model_type for part in parts if getattr(part, "model_type", ""))


def layer_classes(model: PreTrainedModel) -> set[str]:
    """Class names of the modules that hold one layer each, which sharding must not split."""
    return set(model._no_split_modules or [])


# -- PEFT and DeepSpeed -----------------------------------------------------------------------------------------------


def available_adapters(layer: Any) -> set[str]:
    """Names of the adapters that a PEFT layer holds; active ones may be missing from it."""
    names: set[str] = layer._get_available_adapters()
    return names


def is_zero3_parameter(parameter: Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 has sharded a parameter, so that only a placeholder is left."""
    return hasattr(parameter, "ds_id")


def held_by_deepspeed(parameter: Tensor) -> bool:
    """Whether DeepSpeed (ZeRO, bf16) trains a parameter through a float32 copy, and its optimizer state is there."""
    return hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping")


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """Shape of a parameter, that of the whole tensor for a placeholder of DeepSpeed ZeRO-3."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
