"""Fills a model on the meta device for one shard at a time, and writes the result."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_utils import LoadStateDictConfig

from ...checkpoints.checkpoint import Checkpoint
from ...checkpoints.headers import CheckpointError
from ...checkpoints.sources import check_all_float, sources_of
from ...compat import dtype_plan
from ...files import save_tensors
from ..checksums import metadata
from ..config import PlanQuantizationConfig
from ..hf import PlanHfQuantizer
from .parts import forget, read
from .shards import Shard


class Packer:
    """A float model on the meta device, whose weights are read, packed, written and dropped shard by shard.

    Args:
        checkpoint: The float checkpoint.
        quantization: What to do with it.

    Attributes:
        model: The model.
        quantizer: transformers' side of packing; knows the parameters that are yet to be packed.
    """

    def __init__(self, checkpoint: Checkpoint, quantization: PlanQuantizationConfig) -> None:
        self.checkpoint, self.quantization = checkpoint, quantization
        self.model: PreTrainedModel = checkpoint.meta_model()
        self.quantizer = PlanHfQuantizer(quantization, pre_quantized=False)
        self.quantizer.preprocess_model(self.model)
        self._load = LoadStateDictConfig(
            dtype=checkpoint.dtype,
            dtype_plan=dtype_plan(self.model, checkpoint.dtype),
            hf_quantizer=self.quantizer,
            weight_mapping=get_model_conversion_mapping(self.model, None, self.quantizer),
        )

    def check_weights(self) -> None:
        """Checks that all weights are float, and by the routers that what comes with the plan belongs to them."""
        made_of = sources_of(self.model, self.checkpoint.tensors)
        check_all_float(self.model, made_of, self.checkpoint.tensors)
        if not self.quantization.weights_matter:
            return
        routers = [layer.shape.router for layer in self.quantization.plan.layers.values()]
        self._read({source.name for router in routers for source in made_of.get(router, [])})
        lost = [router for router in routers if self.model.get_parameter(router).is_meta]
        if lost:
            raise CheckpointError(f"{str(self.checkpoint.folder)!r} lacks {lost}")
        self.quantization.check_weights(self.quantizer.layers)
        for router in routers:
            forget(self.model, router)

    def _read(self, names: set[str]) -> None:
        """Loads some tensors of the checkpoint into the model, converted and packed."""
        read(self.model, self.checkpoint, names, self._load, "quantized")

    def write(self, shard: Shard, folder: Path, job: str) -> None:
        """Reads, packs and writes one shard.

        Raises:
            CheckpointError: A weight is missing, or cannot be converted or packed.
        """
        self._read(set(shard.sources))
        whole = self.model.state_dict()
        packed = {name: whole[name] for name in shard.tensors}
        empty = [name for name, tensor in packed.items() if tensor.is_meta]
        if empty:
            raise CheckpointError(f"{str(self.checkpoint.folder)!r} lacks {empty}")
        save_tensors(packed, folder / shard.file, {"format": "pt", **metadata(packed, self.quantization.digest(), job)})
        for name in shard.tensors:
            forget(self.model, name)
