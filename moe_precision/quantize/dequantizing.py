"""The way back: a packed model becomes a float one, with the values that its packed matrices stand for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..checkpoints.checkpoint import Checkpoint, opened
from ..checkpoints.folders import folder_replaced_when_done
from ..checkpoints.headers import CheckpointError
from ..checkpoints.other_files import copy_other_files
from ..compat import forget_forward_pre_hook, mark_as_float, save_under_hub_names
from .card import restore_base_card
from .config import QUANT_METHOD, QuantizationError
from .modules import EXPERTS_IMPLEMENTATION, PackedLinear, check_implementation


@torch.no_grad()
def restore_floats(model: Any, dtype: torch.dtype | None = None) -> Any:
    """Puts float parameters in place of everything that is packed, under the names that they had.

    Args:
        model: A packed model, changed in place.
        dtype: Of the new parameters; None for the dtype that the float model had.

    Raises:
        QuantizationError: Nothing in it is packed.
    """
    fused = [module for module in model.modules() if isinstance(getattr(module, "packed", None), nn.ModuleDict)]
    linears = [(path, module) for path, module in model.named_modules() if isinstance(module, PackedLinear)]
    if not fused and not linears:
        raise QuantizationError(f"nothing in this {type(model).__name__} is packed: there is nothing to dequantize")
    for module in fused:
        for name, projection in module.packed.items():
            wanted = dtype or getattr(module, name).dtype
            experts = [projection.weight(expert).to(wanted) for expert in range(projection.num_experts)]
            delattr(module, name)  # the sentinel
            weight = torch.stack([matrix.T if module.is_transposed else matrix for matrix in experts])
            module.register_parameter(name, nn.Parameter(weight))
        del module.packed
        forget_forward_pre_hook(module, check_implementation)
    for path, module in linears:
        wanted = dtype or module.weight.dtype
        linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        linear.weight = nn.Parameter(module.packed.weight(0).to(wanted))
        linear.register_parameter("bias", module.bias)
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, linear.train(module.training))
    for name in ("moe_precision_kernels", "save_pretrained"):  # which `finish` has set
        vars(model).pop(name, None)
    if isinstance(model, PreTrainedModel):
        if EXPERTS_IMPLEMENTATION in model.get_experts_implementation().values():
            model.set_experts_implementation(model.get_correct_experts_implementation(None))
        mark_as_float(model)
        save_under_hub_names(model)
    return model


def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Turns a packed model into a float one, in place: every weight is what its packed matrix stands for.

    The float model computes what the packed one does, up to the rounding of its dtype, and needs no moe-precision.
    ``model.dequantize()`` of transformers does the same.

    Args:
        model: What `quantize_model` or ``from_pretrained`` of a packed checkpoint returned.
        dtype: Of the weights; None for the dtype that the float model had.

    Returns:
        The same model.

    Raises:
        QuantizationError: Nothing in it is packed.

    Example:
        >>> plan = allocate(model, method="uniform", average_bits=4, group_size=64)
        >>> dequantize_model(quantize_model(model, plan)).save_pretrained("float_again")
    """
    quantizer = getattr(model, "hf_quantizer", None)
    restored: nn.Module = restore_floats(model, dtype)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    return restored


def dequantize_checkpoint(
    packed: Checkpoint | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """`dequantize_model` of a packed checkpoint, written as a float one; the whole float model is in memory.

    Args:
        packed: Folder of a checkpoint that was packed here.
        out: Folder to write; it appears in one step, when it is complete.
        dtype: Of the weights; None for the dtype of the checkpoint.
        max_shard_size: Largest file, in bytes or as ``"5GB"``.

    Raises:
        CheckpointError: It is incomplete or damaged, or was not packed here, or ``out`` would replace it.

    Example:
        >>> quantize_checkpoint("checkpoint", "precision_plan.json", "packed")
        >>> dequantize_checkpoint("packed", "float_again")
        >>> load_model("float_again").dtype
        torch.float32
    """
    with opened(packed) as source:
        if source.quantizer != QUANT_METHOD:
            raise CheckpointError(
                f"{str(source.folder)!r} was not packed by moe-precision: it cannot be dequantized here"
            )
        inner, outer = source.folder.resolve(), Path(out).resolve()
        if outer.is_relative_to(inner) or inner.is_relative_to(outer):
            raise CheckpointError(f"{os.fspath(out)!r} would replace what is read; choose another folder")
        with folder_replaced_when_done(out) as folder:
            model = dequantize_model(source.load(**({} if dtype is None else {"dtype": dtype})))
            assert isinstance(model, PreTrainedModel)
            model.save_pretrained(folder, max_shard_size=max_shard_size)
            copy_other_files(source.folder, folder)
            restore_base_card(folder)
