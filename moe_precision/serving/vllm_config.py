"""What vLLM makes of config.json's ``quantization_config``, and the checks that come before any weight is read.

It is imported in every process of vLLM, whatever is served there, so it imports the rest of this package only where a
packed checkpoint asks for it.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from .errors import ServingError

if TYPE_CHECKING:
    from .packed_model import PackedModel

QUANT_METHOD = "moe_precision"
_CHECKED = "MOE_PRECISION_CHECKED"  # an environment variable, so that worker processes need not read all files again


class VllmPackedConfig(QuantizationConfig):
    """The packing of one checkpoint, as vLLM hands it to every layer.

    Args:
        entry: The ``quantization_config`` of config.json; None where it has none and ``--quantization`` was given.

    Raises:
        PlanError: Another format version, or a damaged plan.
        ServingError: Not packed, or packed in a way that is not served.
    """

    def __init__(self, entry: dict[str, Any] | None = None) -> None:
        super().__init__()
        from .packed_model import packing_of

        packing_of(entry, "the checkpoint")  # its errors come while vLLM's configuration is built
        self.entry = entry or {}
        self.folder = ""
        self._packed: PackedModel | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # a process builds its own

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> VllmPackedConfig:
        return cls(config)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Checks plan, model and every tensor, while vLLM's configuration is built: in each process, files once."""
        from .packed_model import same_packing

        if revision is not None and not Path(model_name).is_dir():
            raise ServingError(
                f"revision {revision!r} of {model_name!r}: only files of the default revision are verified. Run "
                f"`hf download {model_name} --revision {revision} --local-dir FOLDER` and serve FOLDER"
            )
        self.folder = str(model_name)
        packed = self.packed_model(torch.float32)
        same_packing(self.entry, packed.checkpoint)
        files = packed.checkpoint.files
        stats = [(str(file), (found := file.stat()).st_size, found.st_mtime_ns) for file in files]
        mark = hashlib.sha256(repr((stats, packed.config.digest())).encode()).hexdigest()
        if os.environ.get(_CHECKED) != mark:
            packed.check_files()
            os.environ[_CHECKED] = mark

    def packed_model(self, dtype: torch.dtype) -> PackedModel:
        """The checkpoint, laid out for activations of a dtype."""
        if self._packed is None or self._packed.model.dtype != dtype:
            from .packed_model import PackedModel

            self._packed = PackedModel(self.folder, dtype)
        return self._packed

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Our method for every layer of experts, vLLM's float one for linear layers, None (float) for all else."""
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        from .vllm_method import PackedExpertsMethod

        if isinstance(layer, RoutedExperts):
            return PackedExpertsMethod(self.packed_model, layer, prefix)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
