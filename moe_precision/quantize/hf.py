"""The quantizer that transformers knows as ``quant_method = "moe_precision"``, registered when this file is imported.

`from_pretrained` with a `PlanQuantizationConfig` quantizes a float checkpoint while it loads; a checkpoint that was
saved from such a model loads like any other. `quantize_model` does the same to a model that is already in memory.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from functools import partial
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import MoEPrecisionError
from ..plans.plan import PlanError, PrecisionPlan, as_plan
from ..recording.curvature import Curvature, as_curvature
from ..recording.router_norms import check_same_weights
from .checksums import check_files, metadata
from .codec.grid import Grid
from .modules import kernels_of, packed_experts_forward
from .replace import EXPERTS_IMPLEMENTATION, Target, find_targets, replace_weight

QUANT_METHOD = "moe_precision"
FORMAT_VERSION = 2  # of the packed checkpoint: docs/checkpoint-format.md; 1 had no checksums and did not say so


class QuantizationError(MoEPrecisionError, ValueError):
    """A checkpoint whose experts could not all be read or quantized."""


@register_quantization_config(QUANT_METHOD)
class PlanQuantizationConfig(QuantizationConfigMixin):
    """Tells `from_pretrained` to quantize by a precision plan.

    Args:
        plan: A `PrecisionPlan`, its dict, or the path of its file.
        non_expert_bits: 8 or 4 to quantize the other linear layers too; routers, embeddings, norms and the output
            head always keep their precision. None, the default, quantizes experts only.
        curvature: `Curvature`, or the path of its file: errors in input columns where the loss is curved count more in
            the fit. It changes values, not sizes, and is not needed again for loading.
        grid: `Grid`, or the path of its file: scales and offsets that training has ended on, by `PrecisionAnneal`;
            nothing is fitted then.

    Raises:
        PlanError: The plan or ``non_expert_bits`` is not valid.

    Example:
        >>> config = PlanQuantizationConfig("precision_plan.json")
        >>> model = AutoModelForCausalLM.from_pretrained("checkpoint", quantization_config=config)
        >>> model.save_pretrained("quantized")
    """

    def __init__(
        self,
        plan: PrecisionPlan | dict | str | os.PathLike,
        non_expert_bits: int | None = None,
        curvature: Curvature | str | os.PathLike | None = None,
        grid: Grid | str | os.PathLike | None = None,
        quant_method: str = QUANT_METHOD,  # config.json names it; never another
        format_version: int = FORMAT_VERSION,
    ) -> None:
        if format_version != FORMAT_VERSION:
            raise PlanError(
                f"the packed checkpoint has format version {format_version}, this release of moe-precision reads "
                f"{FORMAT_VERSION}: install the release that wrote it, or quantize the float checkpoint again"
            )
        if non_expert_bits not in (None, 4, 8):
            raise PlanError(f"non_expert_bits must be 4, 8 or None, got {non_expert_bits!r}")
        self.quant_method = quant_method
        self.plan = as_plan(plan)
        self.non_expert_bits = non_expert_bits
        self.curvature = None if curvature is None else as_curvature(curvature)
        self.grid = grid if grid is None or isinstance(grid, Grid) else Grid.load(grid)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Reads config.json's entry; without a version it is of the first one."""
        return super().from_dict({"format_version": 1, **config_dict}, return_unused_kwargs, **kwargs)

    def digest(self) -> str:
        """The same for configs that give every expert the same widths."""
        widths = {name: layer.projection_bits for name, layer in self.plan.layers.items()}
        said = json.dumps([widths, self.plan.group_size, self.non_expert_bits], sort_keys=True)
        return xxhash.xxh3_64(said.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds: the widths, without the signals that led to them."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "plan": self.plan.without_signals().to_dict(),
            "non_expert_bits": self.non_expert_bits,
        }


class _PackWeight(ConversionOps):
    """transformers hands it each float weight as it is read; the packed form goes straight into the model."""

    def __init__(self, quantizer: PlanHfQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        model, missing = kwargs["model"], kwargs["missing_keys"]
        waiting = {target.parameter for target in self.quantizer.waiting}
        left = {}
        for key, value in input_dict.items():
            name = kwargs["full_layer_name"] if len(input_dict) == 1 else key
            weight = value[0] if isinstance(value, list) else value
            if name not in waiting:  # made of the same tensors on disk as one that is packed
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
        self._waiting: dict[str, Target] = {}  # parameters of a float checkpoint not packed yet

    @property
    def waiting(self) -> list[Target]:
        """The float parameters that are still to be packed."""
        return list(self._waiting.values())

    @property
    def plan(self) -> PrecisionPlan:
        """The plan that this quantizer carries out."""
        return self.quantization_config.plan

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        if not self.pre_quantized:
            _warn_if_unweighted(self.quantization_config)
        elif checkpoint_files:
            check_files(checkpoint_files, self.quantization_config.digest())
        config = self.quantization_config
        targets = find_targets(model, self.plan, config.non_expert_bits, config.curvature, config.grid)
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

    def update_weight_conversions(self, weight_conversions: list, model: PreTrainedModel | None = None) -> list:
        # A packed checkpoint holds the names of the module tree, so nothing is renamed, merged or split.
        return [] if self.pre_quantized else weight_conversions

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self._waiting:
            raise QuantizationError(
                f"{len(self._waiting)} expert weights were not in the checkpoint, the first is "
                f"{next(iter(self._waiting))!r}; is the checkpoint complete and of this model?"
            )
        unread = [
            name
            for name, tensor in model.state_dict(keep_vars=True).items()
            if (self.pre_quantized or any(name.startswith(layer + ".") for layer in self.plan.layers))
            and not any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_missing or [])
            and not getattr(tensor, "_is_hf_initialized", False)  # transformers' mark of a tensor that was read
        ]
        if unread:
            raise QuantizationError(
                f"{len(unread)} tensors were not in the checkpoint, the first is {unread[0]!r}; is it complete?"
            )
        check_weights(model, self.quantization_config)
        _finish(model)
        model.moe_precision_kernels = partial(kernels_of, model)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What ``save_pretrained`` writes: a checksum for every tensor."""
        tensors = model.state_dict()
        return tensors, metadata(tensors, self.quantization_config.digest())

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # routers, adapters and whatever else is not packed: gradients pass through packed experts

    @property
    def is_qat_trainable(self) -> bool:
        return True  # transformers' Trainer takes a quantized model without adapters only then


def quantize_model(
    model: nn.Module,
    plan: PrecisionPlan | dict | str | os.PathLike,
    non_expert_bits: int | None = None,
    curvature: Curvature | str | os.PathLike | None = None,
    grid: Grid | str | os.PathLike | None = None,
) -> nn.Module:
    """Quantizes a model in memory, in place, by a precision plan.

    Args:
        model: A transformers model, or any module whose experts are lists of ``nn.Linear`` modules.
        plan: A `PrecisionPlan`, its dict, or the path of its file.
        non_expert_bits: 8 or 4 to quantize the other linear layers too.
        curvature: `Curvature` or its path, for the weights of the fit.
        grid: `Grid` or its path, in the place of a fit.

    Returns:
        The same model, in evaluation mode. A transformers model can be saved with ``save_pretrained``.

    Raises:
        PlanError: The plan is for another model.
        UnsupportedLayoutError: Experts in a layout that cannot be packed yet.
    """
    config = PlanQuantizationConfig(plan, non_expert_bits, curvature, grid)
    targets = find_targets(model, config.plan, non_expert_bits, config.curvature, config.grid)
    _warn_if_unweighted(config)
    check_weights(model, config)
    own = dict(model.named_parameters(remove_duplicate=False))
    for target in targets:  # before any change: a half packed model is of no use
        if target.parameter not in own:
            raise QuantizationError(
                f"{type(model).__name__} holds {target.parameter!r} behind a wrapper; give the plain model: unwrap it, "
                "and merge PEFT adapters with merge_and_unload()"
            )
        if not model.get_parameter(target.parameter).isfinite().all():
            raise QuantizationError(f"{target.parameter!r} holds values that are not finite; has training diverged?")
    for target in tqdm(targets, desc="Quantizing", unit="weight"):
        weight = model.get_parameter(target.parameter).detach()
        replace_weight(model, target, config.plan.group_size, weight)
    if isinstance(model, PreTrainedModel):
        if any(target.fused for target in targets):
            model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
        quantizer = PlanHfQuantizer(config, pre_quantized=False)
        model.hf_quantizer = quantizer
        model.is_quantized, model.quantization_method = True, QUANT_METHOD
        model.config.quantization_config = config
        model.config._is_quantized = True
        _finish(model)
    model.moe_precision_kernels = partial(kernels_of, model)  # type: ignore[assignment]
    return model.eval()


def _warn_if_unweighted(config: PlanQuantizationConfig) -> None:
    if config.plan.method == "curvature" and config.curvature is None and config.grid is None:
        warnings.warn(
            "the plan was made by curvature, for a fit that curvature weighs: give curvature= (or --curvature), the "
            "file beside the run's plan; the fit is unweighted now",
            stacklevel=3,
        )


def check_weights(model: nn.Module, config: PlanQuantizationConfig) -> None:
    """Whether curvature and grid are of these weights, by the norms of the routers, which stay as they are."""
    if config.curvature is None and config.grid is None:
        return
    norms = {}
    for name, layer in config.plan.layers.items():
        router, experts = model.get_parameter(layer.shape.router), layer.shape.num_experts
        rows = router if router.shape[0] >= experts else router.T
        norms[name] = torch.linalg.vector_norm(rows[:experts], dim=1, dtype=torch.float32)
    if config.curvature is not None:
        config.curvature.check_router_norms(norms)
    if config.grid is not None:
        check_same_weights(config.grid.router_norms, norms, "grid")


def _finish(model: PreTrainedModel) -> None:
    """What every packed transformers model needs, however it came about."""
    model._weight_conversions = []  # saved under the names of the module tree
    # Weights mapped from a file start at any address, and the last bits of a CPU matrix product depend on it. Copies at
    # torch's own alignment give the same logits before saving and after loading.
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.is_floating_point() and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, packed_experts_forward)
