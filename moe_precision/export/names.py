"""Where an expert's matrices are under the names of other tools; nothing else here knows them.

Three spellings of one matrix: the module after *unfusing*, which every quantizer of single experts does to a fused
layer (``model.layers.0.mlp.experts.3.gate_proj``); the name on the Hub, which transformers' conversion mapping gives
(``model.layers.0.block_sparse_moe.experts.3.w1``); and the tensor of all experts in GGUF (``blk.0.ffn_gate_exps``).
mlx-lm's are in `mlx_names`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

from ..layers.shape import LayerShape
from ..plans.plan import PrecisionPlan
from .exported import ExportError

_PLACE_OF_EXPERT = "{expert}"
_PARTS = {  # of a fused parameter, in the order in which they are joined
    "gate_up_proj": ("gate_proj", "up_proj"),
    "gate_proj": ("gate_proj",),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
}


@dataclass(frozen=True)
class Place:
    """One matrix of every expert of a layer, as other tools know it.

    Attributes:
        layer: Name of the layer in the plan.
        projection: Name of the matrix in the plan; gate and up share one where they are joined.
        part: Its own name after unfusing: ``gate_proj``, ``up_proj``, ``down_proj``, ``wi``, ...
        module: Path of the module after unfusing, with ``{expert}`` in place of the index.
        hub: Path of the module on the Hub; without ``{expert}`` where all experts are one tensor there too.
        mixed: Containers as on the Hub, matrices as after unfusing: this is how transformers saves an unfused model.
        fused: Name of the parameter that holds all experts in the model, empty where each has a module.
    """

    layer: str
    projection: str
    part: str
    module: str
    hub: str
    mixed: str
    fused: str

    @property
    def containers(self) -> list[str]:
        """Paths of the module that holds the layer's experts, after unfusing and on the Hub."""
        paths = [path for path in (self.module, self.hub) if _PLACE_OF_EXPERT in path]
        return list(dict.fromkeys(path.partition(_PLACE_OF_EXPERT)[0].rpartition(".")[0] for path in paths))

    def module_of(self, expert: int) -> str:
        """Path of one expert's module after unfusing."""
        return self.module.replace(_PLACE_OF_EXPERT, str(expert))

    def on_disk(self, expert: int) -> list[str]:
        """Names that one expert's matrix may have in a checkpoint, without ``.weight``."""
        spellings = dict.fromkeys((self.module, self.hub, self.mixed))
        return [name.replace(_PLACE_OF_EXPERT, str(expert)) for name in spellings]


def places(layer: str, shape: LayerShape, model_type: str) -> list[Place]:
    """The matrices of a layer's experts in the order of the forward pass, gate and up apart.

    Raises:
        ExportError: A plan that does not say where its experts are, or a layout that no known rule unfuses.
    """
    if not shape.experts:
        raise ExportError(
            f"the plan does not say where the experts of layer {layer!r} are. Either an earlier release made it: make "
            "it again from its model or checkpoint (moe-precision plan CHECKPOINT -o plan.json); or their weights are "
            "laid out in a way that no other tool has names for"
        )
    found = []
    for projection in shape.projections:
        if _PLACE_OF_EXPERT in shape.experts:
            module = f"{shape.experts}.{projection}"
            on_hub = _renamed(module, model_type)
            found.append(Place(layer, projection, projection, module, on_hub, on_hub, ""))
            continue
        if projection not in _PARTS:
            raise ExportError(
                f"layer {layer!r}: the matrices {list(shape.projections)} of all experts are one parameter each, and "
                f"no tool is known to take them apart; expected names among {sorted(_PARTS)}"
            )
        fused = f"{shape.experts}.{projection}"
        for part, hub in zip(_PARTS[projection], _hub_names(fused, model_type, len(_PARTS[projection])), strict=True):
            module = f"{shape.experts}.{_PLACE_OF_EXPERT}.{part}"
            found.append(Place(layer, projection, part, module, hub, _renamed(module, model_type), fused))
    return found


def all_places(plan: PrecisionPlan) -> Iterator[Place]:
    """`places` of every layer of a plan."""
    for name, layer in plan.layers.items():
        yield from places(name, layer.shape, plan.model_type)


@dataclass(frozen=True)
class Rule:
    """Experts and matrices of one layer that share a width.

    Attributes:
        bits: The width.
        modules: Regular expressions of the modules' whole names: after unfusing, and on the Hub if that differs.
        layers: Regular expressions for the module that holds all experts of the layer.
    """

    bits: int
    modules: tuple[str, ...]
    layers: tuple[str, ...]


def rules(plan: PrecisionPlan) -> list[Rule]:
    """The plan as few regular expressions: one for each layer, width and set of experts with that width."""
    found = []
    for name, layer in plan.layers.items():
        by_experts: dict[tuple[int, tuple[int, ...]], list[Place]] = {}
        for place in places(name, layer.shape, plan.model_type):
            widths = layer.projection_bits[place.projection]
            for bits in sorted(set(widths)):
                experts = tuple(e for e, width in enumerate(widths) if width == bits)
                by_experts.setdefault((bits, experts), []).append(place)
        for (bits, experts), of_rule in by_experts.items():
            chosen = None if len(experts) == layer.shape.num_experts else experts
            modules = [_pattern([place.module for place in of_rule], chosen)]
            if all(_PLACE_OF_EXPERT in place.hub for place in of_rule):
                modules.append(_pattern([place.hub for place in of_rule], chosen))
            layers = dict.fromkeys(re.escape(path) for place in of_rule for path in place.containers)
            found.append(Rule(bits, tuple(dict.fromkeys(modules)), tuple(layers)))
    return found


def all_but_experts(plan: PrecisionPlan) -> str:
    """A regular expression for modules outside the experts, by whole names and by names inside a block."""
    experts: dict[str, None] = {}
    for place in all_places(plan):
        for path in (place.module, place.hub):
            before, found, _ = path.partition(_PLACE_OF_EXPERT)
            if found:
                container, _, prefix = before.rpartition(".")
                name = re.escape(container.rpartition(".")[2])
                experts[f"{name}(\\.{re.escape(prefix)}\\d+\\..*)?"] = None  # an engine asks for the container itself
    return f"^(?!(.*\\.)?{_any(list(experts))}$).*"


def _pattern(templates: list[str], experts: tuple[int, ...] | None) -> str:
    """One regular expression for matrices that differ in their last part only; all experts for None."""
    before, _, after = templates[0].partition(_PLACE_OF_EXPERT)
    index = r"\d+" if experts is None else _any([str(expert) for expert in experts])
    parts = [re.escape(template.partition(_PLACE_OF_EXPERT)[2].removeprefix(".")) for template in templates]
    assert after.startswith(".")
    return f"^{re.escape(before)}{index}\\.{_any(parts)}$"


def _any(alternatives: list[str]) -> str:
    return alternatives[0] if len(alternatives) == 1 else f"({'|'.join(alternatives)})"


def block(layer: str) -> int:
    """Index of a decoder's block, for tools that number blocks.

    Raises:
        ExportError: The name has no single number, or is one of an encoder-decoder model.
    """
    numbers = [part for part in layer.split(".") if part.isdigit()]
    if len(numbers) != 1 or re.search(r"(^|\.)(encoder|decoder)\.", layer):
        raise ExportError(f"layer {layer!r} is not a block of a decoder-only model, which this target needs")
    return int(numbers[0])


def gguf_tensor(place: Place) -> str:
    """Name of the GGUF tensor that holds a matrix of all experts, without ``.weight``, as convert_hf_to_gguf writes it.

    Raises:
        ExportError: Not a decoder with gate, up and down matrices.
    """
    if place.part not in ("gate_proj", "up_proj", "down_proj"):
        raise ExportError(f"layer {place.layer!r}: GGUF has gate, up and down matrices of experts, not {place.part!r}")
    return f"blk.{block(place.layer)}.ffn_{place.part.removesuffix('_proj')}_exps"


@cache
def _mapping(model_type: str) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    transforms = get_checkpoint_conversion_mapping(model_type) or []
    renamings = [one for one in transforms if type(one) is WeightRenaming]
    return renamings, [one for one in transforms if isinstance(one, WeightConverter)]


def _renamed(name: str, model_type: str) -> str:
    """A name of the model as the Hub spells it."""
    name = f"{name}."  # the mapping's patterns end with a dot where a module's name ends
    for renaming in reversed(_mapping(model_type)[0]):
        name, _ = renaming.reverse_transform().rename_source_key(name)
    return name.removesuffix(".")


def _hub_names(parameter: str, model_type: str, parts: int) -> list[str]:
    """Names on the Hub of the matrices that make up a fused parameter; its own name where it is fused there too."""
    for converter in _mapping(model_type)[1]:
        (target, *others), sources = converter.target_patterns, converter.source_patterns
        if others or not parameter.endswith(target) or len(sources) != parts:
            continue
        if not {type(one) for one in converter.operations} <= {MergeModulelist, Concatenate}:
            continue
        names = [parameter.removesuffix(target) + one.replace("*", _PLACE_OF_EXPERT) for one in sources]
        return [_renamed(name.removesuffix(".weight"), model_type) for name in names]
    return [_renamed(parameter, model_type)] * parts
