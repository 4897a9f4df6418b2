"""A packed checkpoint as an engine needs it: which of its layers are packed, their modules, and everything else.

The model is laid out on the meta device, as `from_pretrained` does it. Nothing here knows an engine.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..checkpoints import Checkpoint
from ..checkpoints.dtypes import meta_model_of
from ..checkpoints.hub import how_to_download, is_hub_name, local_folder
from ..compat import under_hub_names
from ..layers.moe_layers import MoELayer, find_moe_layers
from ..quantize.checksums import check_files
from ..quantize.config import QUANT_METHOD, PlanQuantizationConfig
from ..quantize.replace import Target, find_targets
from .errors import ServingError
from .names import is_packed, not_packed
from .served_experts import ServedExperts

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class PackedLayer:
    """One layer of packed experts.

    Attributes:
        found: The layer in the float model, which is on the meta device.
        targets: Its packed parameters.
    """

    found: MoELayer
    targets: tuple[Target, ...]

    @property
    def width(self) -> int:
        """Width of what the experts are given."""
        return self.targets[0].shape[1]

    @property
    def neurons(self) -> int:
        """Hidden neurons of one expert."""
        return self.targets[-1].shape[1]


class PackedModel:
    """A packed checkpoint, checked when it is made: its plan is that of its model, and its experts can be served.

    Args:
        folder: The folder that `moe-precision quantize` or ``save_pretrained`` wrote.
        dtype: Of the activations, and of what is not packed.

    Attributes:
        checkpoint: The checkpoint.
        layers: Its layers by name, in the order of the model.

    Raises:
        CheckpointError: There is no such checkpoint, or transformers lacks its model.
        PlanError: The format version, or the plan, is not one of this release and model.
        ServingError: It is not packed, or packed in a way that is not served.

    Example:
        >>> packed = PackedModel("packed", torch.float32)
        >>> [layer.found.num_experts for layer in packed.layers.values()]
        [8, 8]
    """

    def __init__(self, folder: str | os.PathLike[str], dtype: torch.dtype) -> None:
        if dtype not in _DTYPES:
            raise ServingError(
                f"packed experts multiply activations of {', '.join(map(str, _DTYPES))}, got {dtype}: start the engine "
                "with --dtype bfloat16"
            )
        self.checkpoint = checkpoint = opened(folder)
        self.config = packing_of(checkpoint.quantization, str(checkpoint.folder))
        self.model = meta_model_of(checkpoint.model_class(), config_of_transformers(checkpoint), dtype)
        layers = find_moe_layers(self.model, **self.config.plan.patterns)
        self.config.in_names_of(self.model, layers)
        targets = find_targets(self.model, layers, self.config.plan, None)
        self.layers = {layer.name: _served(layer, targets) for layer in layers}
        self._by_place = {_place(name): name for name in self.layers}
        if len(self._by_place) < len(self.layers):
            raise ServingError(
                f"the layers {', '.join(self.layers)} of {str(checkpoint.folder)!r} cannot be told apart by their "
                "numbers, by which an engine's layers are matched: load the model with transformers"
            )

    def check_files(self) -> None:
        """Reads every tensor and compares it with its checksum; raises `DamagedCheckpointError`."""
        check_files(self.checkpoint.files, self.config.digest())

    def layer_at(self, path: str) -> str:
        """The layer that an engine has at a module path, found by the numbers in it: engines rename the rest.

        Raises:
            ServingError: The plan has no layer there.
        """
        name = self._by_place.get(_place(path))
        if name is None:
            raise ServingError(
                f"the engine has experts at {path!r}, and the plan of {str(self.checkpoint.folder)!r} names no layer "
                f"there; it names {', '.join(self.layers)}. These experts would run on weights that nobody packed: "
                "start the engine without draft layers (speculative decoding), or load the model with transformers"
            )
        return name

    def experts(self, layer: str, held: Sequence[int], device: Any) -> ServedExperts:
        """Empty modules for some experts of a layer."""
        packed = self.layers[layer]
        return ServedExperts(packed.found.container(), packed.targets, self.config.plan.group_size, held, device)

    def distribute(
        self, tensors: Iterable[tuple[str, Tensor]], experts: Mapping[str, ServedExperts]
    ) -> Iterator[tuple[str, Tensor]]:
        """Fills expert modules from a checkpoint's tensors, and yields all others under the names of the Hub.

        Args:
            tensors: All tensors of the checkpoint, in any order.
            experts: Layer -> the module to fill; layers of other processes may be missing.

        Raises:
            ServingError: A packed tensor belongs to no layer of the plan, a layer's tensors are incomplete, or a
                tensor comes twice.
        """
        roots = {f"{packed.found.experts}.": name for name, packed in self.layers.items()}
        others: dict[str, Tensor] = {}
        for name, tensor in tensors:
            root = next((root for root in roots if name.startswith(root)), None)
            if root is not None:
                if roots[root] in experts:
                    experts[roots[root]].take(name.removeprefix(root), tensor)
            elif is_packed(name):
                raise ServingError(f"{name!r} is packed, and the plan has no such layer: config.json is of another one")
            else:
                if name in others:
                    raise ServingError(
                        f"{name!r} is in the checkpoint twice: another checkpoint lies beside it; delete its files"
                    )
                others[name] = tensor
        for name, module in experts.items():
            module.check_complete(name)
        yield from under_hub_names(self.model, others).items()


def opened(folder: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint in a folder, or of a model whose files are in the Hub's cache.

    Raises:
        CheckpointError: The folder or a file is missing or damaged.
        ServingError: It is the name of a model on the Hub that is not there.
    """
    if is_hub_name(folder) and local_folder(folder) == Path(folder):
        raise ServingError(
            f"{os.fspath(folder)!r} is not on this machine, and checksums are verified before an engine starts: "
            + how_to_download(os.fspath(folder))
        )
    return Checkpoint(folder)


def config_of_transformers(checkpoint: Checkpoint) -> PreTrainedConfig:
    """The config as transformers' model class reads it: an engine may have registered a class of its own for the type.

    Raises:
        CheckpointError: transformers lacks the model.
    """
    own = checkpoint.model_class().config_class
    if own is None or type(checkpoint.config) is own:
        return checkpoint.config
    found: PreTrainedConfig = own.from_pretrained(checkpoint.folder)
    return found


def packing_of(entry: Mapping[str, Any] | None, source: str) -> PlanQuantizationConfig:
    """What config.json says of packing.

    Args:
        entry: Its ``quantization_config``.
        source: Where it is from, for messages.

    Raises:
        PlanError: Another format version, or a damaged plan.
        ServingError: It is not packed by moe-precision, or other layers than experts are.
    """
    if entry is None or entry.get("quant_method") != QUANT_METHOD:
        raise not_packed(source)
    config: PlanQuantizationConfig = PlanQuantizationConfig.from_dict(dict(entry))
    if config.non_expert_bits is not None:
        raise ServingError(
            f"{source} was quantized with non_expert_bits={config.non_expert_bits}: engines are given packed experts "
            "only. Quantize without it to serve, or load the model with transformers"
        )
    return config


def same_packing(entry: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Raises `ServingError` if an engine was given other widths than the config.json of the checkpoint has.

    Args:
        entry: The ``quantization_config`` that the engine was given.
        checkpoint: The checkpoint whose files are verified.
    """
    theirs, ours = packing_of(entry, "the engine's config"), packing_of(checkpoint.quantization, str(checkpoint.folder))
    if theirs.digest() != ours.digest():
        raise ServingError(
            f"the engine was given other bit-widths than the config.json of {str(checkpoint.folder)!r} has: start it "
            "without overrides of quantization_config"
        )


def _served(layer: MoELayer, targets: Iterable[Target]) -> PackedLayer:
    own = tuple(target for target in targets if target.module == layer.experts and target.fused)
    if {target.name for target in own} != {*layer.projections}:
        raise ServingError(
            f"layer {layer.name!r}: its experts ({type(layer.container()).__name__}, {layer.layout}) are not fused "
            "matrices of all experts, and only those are served: load the model with transformers"
        )
    return PackedLayer(layer, own)


def _place(path: str) -> tuple[int, ...]:
    return tuple(int(part) for part in path.split(".") if part.isdecimal())
