"""The quantizer that transformers knows as ``quant_method = "moe_precision"``, registered when this file is imported.

`from_pretrained` with a `PlanQuantizationConfig` quantizes a float checkpoint while it loads; a checkpoint that was
saved from such a model loads like any other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantizer

from ..checkpoints.headers import StoredTensor, header
from ..checkpoints.sources import check_all_float, sources_of
from ..compat import (
    FLAT_PARAMETER,
    ConversionOps,
    is_zero3_parameter,
    may_be_missing,
    register_experts_function,
    removes_a_prefix,
    save_under_module_names,
    split_by,
    was_read,
)
from ..layers.moe_layers import MoELayer, find_moe_layers
from ..plans.plan import PrecisionPlan
from .checksums import check_files, metadata
from .config import QUANT_METHOD, PlanQuantizationConfig, QuantizationError
from .dequantizing import restore_floats
from .modules import EXPERTS_IMPLEMENTATION, kernels_of, packed_experts_forward
from .replace import Target, find_targets, replace_weight

_NO_DISK = (
    "the device map puts parts of the model on 'disk', from where packed experts cannot run: give devices with enough "
    "memory, or device_map='cpu'. `moe-precision quantize` packs a checkpoint that is larger than memory"
)


class _PackWeight(ConversionOps):
    """transformers hands it each float weight as it is read; the packed form goes straight into the model."""

    def __init__(self, quantizer: PlanHfQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        model, missing = kwargs["model"], kwargs["missing_keys"]
        left = {}
        for key, value in input_dict.items():
            name = kwargs["full_layer_name"] if len(input_dict) == 1 else key
            weight = value[0] if isinstance(value, list) else value
            if not self.quantizer.param_needs_quantization(
                model, name
            ):  # made from the same tensors on disk as one that is packed
                left[name] = weight
                continue
            self.quantizer.pack(model, name, weight)
            if missing is not None:
                missing.discard(name)
        return left


@register_quantizer(QUANT_METHOD)
class PlanHfQuantizer(HfQuantizer):
    """Packs experts by a plan, while a float checkpoint loads or before a packed one is read."""

    quantization_config: PlanQuantizationConfig

    def __init__(self, quantization_config: PlanQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.layers: list[MoELayer] = []  # while a checkpoint loads
        self._waiting: dict[str, Target] = {}  # parameters of a float checkpoint not packed yet
        self._given: dict[str, Tensor] | None = None  # to `save_pretrained`
        self._stored: set[str] = set()  # names of the tensors of a packed checkpoint

    @property
    def waiting(self) -> list[Target]:
        """The float parameters that are yet to be packed."""
        return list(self._waiting.values())

    @property
    def plan(self) -> PrecisionPlan:
        """The plan that this quantizer carries out."""
        return self.quantization_config.plan

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuses what cannot work before anything is read.

        Raises:
            QuantizationError: A device map with ``disk`` in it.
        """
        if device_map == "disk" or (isinstance(device_map, dict) and "disk" in device_map.values()):
            raise QuantizationError(_NO_DISK)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        check_not_split(model)
        if not self.pre_quantized:
            self.quantization_config.warn_if_unweighted()
            _check_files_float(model, checkpoint_files or [])
        elif checkpoint_files:
            self._stored = check_files(checkpoint_files, self.quantization_config.digest())
        config = self.quantization_config
        self.layers = find_moe_layers(model, **self.plan.patterns)
        config.in_names_of(model, self.layers)
        targets = find_targets(
            model,
            self.layers,
            self.plan,
            config.non_expert_bits,
            config.curvature,
            config.grid,
            config.statistics,
        )
        if self.pre_quantized:
            for target in targets:
                replace_weight(model, target, self.plan.group_size, weight=None)
        else:
            self._waiting = {target.parameter: target for target in targets}
        if any(target.fused for target in targets):
            model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
        return model

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return not self.pre_quantized and param_name in self._waiting

    def get_quantize_ops(self) -> ConversionOps:
        return _PackWeight(self)

    def pack(self, model: PreTrainedModel, name: str, weight: Tensor) -> None:
        """Quantizes one float weight into the model."""
        replace_weight(model, self._waiting[name], self.plan.group_size, weight)
        del self._waiting[name]

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: PreTrainedModel | None = None
    ) -> list[Any]:
        # A packed checkpoint holds the names of the module tree: nothing is merged or split, and names lose a part only
        # where the model is the text model of the one that was packed.
        return list(filter(removes_a_prefix, weight_conversions)) if self.pre_quantized else weight_conversions

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if "disk" in (getattr(model, "hf_device_map", None) or {}).values():  # as device_map="auto" turned out
            raise QuantizationError(_NO_DISK)
        if self._waiting:
            raise QuantizationError(
                f"{len(self._waiting)} expert weights were not in the checkpoint, the first is "
                f"{next(iter(self._waiting))!r}; is the checkpoint complete and of this model?"
            )
        layers = tuple(f"{layer}." for layer in self.plan.layers)
        unread = [
            name
            for name, tensor in model.state_dict(keep_vars=True).items()
            if not was_read(tensor)
            and not may_be_missing(model, name)
            and (name.startswith(layers) or (self.pre_quantized and not self._is_of_a_new_head(model, name)))
        ]
        if unread:
            raise QuantizationError(
                f"{len(unread)} tensors were not in the checkpoint, the first is {unread[0]!r}; is it complete?"
            )
        self.quantization_config.check_weights(self.layers)
        self.layers = []
        finish(model)
        return model

    def _is_of_a_new_head(self, model: PreTrainedModel, name: str) -> bool:
        """Whether a tensor is of a head that the checkpoint's class lacks, or has in another, ignored, size."""
        body, written_by = model.base_model_prefix, model.config.architectures or [type(model).__name__]
        outside = hasattr(model, body) and not name.startswith(f"{body}.")
        return outside and (type(model).__name__ not in written_by or name in self._stored)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What ``save_pretrained`` writes: a checksum for every tensor.

        Where FSDP2 has sharded the rest of the model it is a collective, unless the tensors were given.
        """
        tensors = self._given if self._given is not None else gathered(model.state_dict())
        return tensors, metadata(tensors, self.quantization_config.digest())

    @contextmanager
    def saving(self, state_dict: dict[str, Tensor] | None) -> Iterator[None]:
        """Inside, ``save_pretrained`` writes these tensors; transformers itself drops them for a quantized model."""
        self._given = None if state_dict is None else gathered(state_dict)
        try:
            yield
        finally:
            self._given = None

    def is_serializable(self) -> bool:
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: Any = None) -> PreTrainedModel:
        """What ``model.dequantize()`` calls."""
        named = isinstance(dtype, str)  # in the config, once the model has been saved
        return restore_floats(model, getattr(torch, dtype) if named else dtype)

    @property
    def is_trainable(self) -> bool:
        return True  # routers, adapters and whatever else is not packed: gradients pass through packed experts

    @property
    def is_qat_trainable(self) -> bool:
        return True  # transformers' Trainer accepts a quantized model without adapters only then


def check_not_split(model: nn.Module) -> None:
    """Raises `QuantizationError` for a model that is split over processes: packed experts are whole on each."""
    if sizes := (split_by(model) if isinstance(model, PreTrainedModel) else {}):
        said = ", ".join(f"{kind}={size}" for kind, size in sizes.items())
        raise QuantizationError(
            f"the model is to be split over processes ({said}), and packed experts cannot be: each process would hold "
            "all of them and their sum would be wrong. Load without tp_plan and distributed_config, to have the whole "
            "model on each process"
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) or is_zero3_parameter(parameter) or FLAT_PARAMETER in name:
            raise QuantizationError(
                f"{name!r} is split over processes (FSDP, DeepSpeed ZeRO-3, or tensor or expert parallelism), and a "
                "part of a matrix cannot be packed. Save the model with save_pretrained and quantize the checkpoint"
            )


def _check_files_float(model: PreTrainedModel, files: list[str]) -> None:
    """Raises `CheckpointError` where a file that will be read holds codes of a quantizer for a float weight."""
    stored: dict[str, StoredTensor] = {}
    for file in files:
        if file.endswith(".safetensors"):
            stored |= header(Path(file))
    check_all_float(model, sources_of(model, stored), stored)


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, each whole; a collective where one is sharded."""
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}


def _save_pretrained(
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    **kwargs: Any,
) -> None:
    """``save_pretrained`` that writes a given ``state_dict`` of a packed model too."""
    with model.hf_quantizer.saving(state_dict):
        type(model).save_pretrained(model, save_directory, is_main_process, state_dict, **kwargs)


def finish(model: PreTrainedModel) -> None:
    """What every packed transformers model needs, however it was made."""
    save_under_module_names(model)
    model.save_pretrained = partial(_save_pretrained, model)
    model.moe_precision_kernels = partial(kernels_of, model)
    # Weights mapped from a file start at any address, and the last bits of a CPU matrix product depend on it. Copies at
    # torch's own alignment give the same logits before saving and after loading.
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.is_floating_point() and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


register_experts_function(EXPERTS_IMPLEMENTATION, packed_experts_forward)
