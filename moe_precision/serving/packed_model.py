"""A packed checkpoint as an engine needs it: which of its layers are packed, their modules, and everything else.

The modules are transformers' own expert modules with our packed matrices in them, made as `from_pretrained` makes
them, so layout, activation and biases have one source. Nothing here knows an engine, and no float expert is ever made.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints import Checkpoint
from ..checkpoints.dtypes import meta_model_of
from ..checkpoints.hub import how_to_download, is_hub_name, local_folder
from ..compat import under_hub_names
from ..layers.moe_layers import MoELayer, find_moe_layers
from ..quantize.checksums import check_files
from ..quantize.config import QUANT_METHOD, PlanQuantizationConfig
from ..quantize.modules import packed_experts_forward
from ..quantize.replace import Target, find_targets, replace_weight
from .errors import ServingError
from .names import is_packed, not_packed

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class ServedExperts(nn.Module):
    """The packed experts of one layer that this process holds, empty until `take` has got their tensors.

    Args:
        module: The layer's expert module, on the meta device; a copy is taken.
        targets: Its packed parameters.
        group_size: Weights that share a scale and an offset.
        held: Which experts this process holds, rising.
        device: Where they go.
    """

    def __init__(
        self, module: nn.Module, targets: Sequence[Target], group_size: int, held: Sequence[int], device: Any
    ) -> None:
        super().__init__()
        if unsaved := [name for name, _ in module.named_buffers()]:
            raise ServingError(f"{type(module).__name__} has the buffers {unsaved}, which would be left unset here")
        count = len(targets[0].bits)
        self.all_bits = {target.name: target.bits for target in targets}
        parent = nn.Module()
        parent.experts = copy.deepcopy(module)
        for target in targets:
            own = replace(target, parameter=f"experts.{target.name}", bits=[target.bits[expert] for expert in held])
            replace_weight(parent, own, group_size, weight=None)
        experts: Any = parent.experts
        experts.num_experts = len(held)
        self._whole = {name: tuple(p.shape) for name, p in experts.named_parameters()}  # biases, norms
        self._by_expert = {name for name, shape in self._whole.items() if shape[0] == count and name.endswith("_bias")}
        for name in self._whole:  # as buffers: an engine looks for parameters in the files by itself
            *path, leaf = name.split(".")
            owner, own = experts.get_submodule(".".join(path)), experts.get_parameter(name).detach()
            delattr(owner, leaf)
            owner.register_buffer(leaf, own[list(held)] if name in self._by_expert else own)
        self.experts = experts.to_empty(device=device)
        places = torch.full((count,), -1, dtype=torch.int64)
        places[list(held)] = torch.arange(len(held))
        self.register_buffer("places", places.to(device), persistent=False)  # of each expert, -1: not in this process
        self.held = list(held)
        self._taken: set[str] = set()
        self._filled = False

    @torch.no_grad()
    def take(self, name: str, tensor: Tensor) -> None:
        """Takes one tensor of the layer's experts, for all processes; keeps what belongs to the experts held here.

        Args:
            name: Its name below the expert module, for example ``packed.down_proj.bits_3.codes``.
            tensor: The tensor as the checkpoint holds it.

        Raises:
            ServingError: The plan has no such tensor, or one of another shape or dtype.
        """
        if name in self.all_bits:
            self._check(name, tensor, (1,), None)  # the sentinel
        elif name in self._whole:
            self._check(name, tensor, self._whole[name], None)
            rows = tensor[self.held] if name in self._by_expert else tensor
            self.experts.get_buffer(name).copy_(rows)
        else:
            self._take_packed(name, tensor)
        self._taken.add(name)

    def _take_packed(self, name: str, tensor: Tensor) -> None:
        found = re.fullmatch(r"packed\.(\w+)\.bits_(\d+)\.(\w+)", name)
        widths = self.all_bits.get(found[1], []) if found else []
        width = int(found[2]) if found else -1
        experts = [expert for expert, bits in enumerate(widths) if bits == width]
        if found is None or not experts:
            raise ServingError(
                f"the checkpoint has a tensor {name!r} of packed experts, and its plan has no expert of this width and "
                "projection: config.json and weights are of different checkpoints; copy the folder again"
            )
        rows = [row for row, expert in enumerate(experts) if expert in self.held]
        if not rows:
            return
        bucket = self.experts.get_submodule(f"packed.{found[1]}.bits_{width}")
        if hasattr(bucket, "leave_kernel"):
            bucket.leave_kernel()
        own = dict(bucket.named_buffers(recurse=False)).get(found[3])
        if own is None:
            raise ServingError(f"a bucket of {width} bits has no {found[3]!r}: {name!r} is of another format")
        self._check(name, tensor, (len(experts), *own.shape[1:]), None if width == 16 else own.dtype)
        own.copy_(tensor[rows] if len(rows) < len(experts) else tensor)

    def _check(self, name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
        as_expected = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
        if tuple(tensor.shape) != shape or not as_expected:
            raise ServingError(
                f"{name!r} is {tuple(tensor.shape)} of {tensor.dtype}, expected {shape} of {dtype or 'a float dtype'}: "
                "config.json and weights are of different checkpoints; copy the folder again"
            )

    def check_complete(self, layer: str) -> None:
        """Raises `ServingError` unless every tensor that the plan asks for was taken since the last check."""
        expected = {*self.all_bits, *self._whole}
        for projection, widths in self.all_bits.items():
            for width in {*widths} - {0}:
                kinds = ("matrices",) if width == 16 else ("codes", "scale", "offset", "ends")
                expected |= {f"packed.{projection}.bits_{width}.{kind}" for kind in kinds}
        missing = sorted(expected - self._taken)
        if missing:
            raise ServingError(
                f"layer {layer!r}: {len(missing)} tensors of its packed experts did not arrive, {missing[0]!r} the "
                "first. The checkpoint is incomplete, or the engine reads weights in a way that passes the plugin by: "
                "use its default load format"
            )
        self._taken, self._filled = set(), True

    def check_filled(self, layer: str) -> None:
        """Raises `ServingError` unless `check_complete` has passed once."""
        if not self._filled:
            self.check_complete(layer)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of what the experts that are held here make of each token; 0 for those held elsewhere.

        Args:
            x: ``(S, H)``.
            ids: ``(S, k)`` of any integer dtype: experts of the layer, below 0 for none.
            weights: ``(S, k)``.

        Returns:
            ``(S, H)`` in the dtype of ``x``.
        """
        places = self.places[ids.clamp(min=0).long()].masked_fill(ids < 0, -1)
        found: Tensor = packed_experts_forward(self.experts, x, places, weights)
        return found


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
        self.model = meta_model_of(checkpoint.model_class(), checkpoint.config, dtype)
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
            ServingError: A packed tensor belongs to no layer of the plan, or a layer's tensors are incomplete.
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
