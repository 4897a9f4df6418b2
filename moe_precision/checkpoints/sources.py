"""Which tensors on disk make up each parameter of a model, by transformers' own conversion mapping."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from ..errors import MoEPrecisionError
from .headers import CheckpointError, StoredTensor, check_float


class StreamingError(MoEPrecisionError, NotImplementedError):
    """A checkpoint whose tensors are converted in a way that cannot be followed one tensor at a time."""


@dataclass(frozen=True)
class Source:
    """One tensor on disk that goes into a parameter, and what transformers does with it on the way.

    Attributes:
        name: Its name on disk.
        pattern: The source pattern of the conversion that its name matches; None if it is renamed at most.
        converter: That conversion.
    """

    name: str
    pattern: str | None
    converter: WeightConverter | None

    def results(self, parameter: str) -> list[str]:
        """Everything that the conversion makes of it, of which ``parameter`` is the first."""
        if self.converter is None:
            return [parameter]
        first, *others = self.converter.target_patterns
        return [parameter, *(parameter.replace(first, other) for other in others)]


Sources = dict[str, list[Source]]  # parameter -> what it is made of


def sources_of(model: PreTrainedModel, names: Iterable[str]) -> Sources:
    """Parameter of the model -> the tensors on disk that make it up, in transformers' order.

    Tensors that are not parameters of the model are listed under the name that they would have.

    Args:
        model: The float model, on any device.
        names: Names of all tensors on disk.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    own, prefix = model.state_dict(), model.base_model_prefix
    found: Sources = defaultdict(list)
    for name in sorted(names, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, own)
        if renamed not in own and name in own:
            renamed, pattern = name, None
        found[renamed].append(Source(name, pattern, by_pattern[pattern] if pattern is not None else None))
    return dict(found)


def check_all_float(model: PreTrainedModel, made_of: Sources, tensors: Mapping[str, StoredTensor]) -> None:
    """Checks that every float tensor of a model is stored as floats: loading would cast codes without their scales.

    Args:
        model: The float model, on any device.
        made_of: Its `sources_of` these tensors.
        tensors: All tensors on disk.

    Raises:
        CheckpointError: One is stored as a quantizer's codes.
    """
    for name, own in model.state_dict().items():
        if own.is_floating_point():
            check_float((source.name for source in made_of.get(name, [])), tensors)


def with_aliases(model: PreTrainedModel, sources: Sources) -> Sources:
    """Adds the other names of parameters that several modules share and that are stored under one of them."""
    aliases: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases[id(parameter)].append(name)
    found = dict(sources)
    for shared in aliases.values():
        stored = [name for name in shared if name in sources]
        found |= {name: sources[stored[0]] for name in shared if stored and name not in sources}
    return found


def only_source(parameter: str, sources: Mapping[str, list[Source]]) -> str:
    """Name of the tensor on disk that is a parameter unchanged, renamed at most.

    Raises:
        CheckpointError: There is none.
        StreamingError: The parameter is made of several, or of a converted one.
    """
    of_this = sources.get(parameter, [])
    if not of_this:
        raise CheckpointError(f"the checkpoint has no tensor for {parameter!r}")
    if len(of_this) > 1 or of_this[0].converter is not None:
        raise StreamingError(f"{parameter!r} is made of {len(of_this)} converted tensors on disk")
    return of_this[0].name


def stacked_sources(parameter: str, sources: Sequence[Source], slices: int) -> list[tuple[str, ...]]:
    """For each slice of a 3-D parameter, the names of the tensors on disk that are joined into it, gate before up.

    Args:
        parameter: Its name.
        sources: What it is made of.
        slices: Size of its first dimension.

    Raises:
        StreamingError: transformers does something other than stacking, or joining two stacks.
        CheckpointError: There are not as many tensors as slices.
    """
    converter = sources[0].converter
    assert converter is not None
    kinds = [type(operation) for operation in converter.operations]
    if kinds not in ([MergeModulelist], [MergeModulelist, Concatenate]) or len(converter.target_patterns) > 1:
        raise StreamingError(f"{parameter!r} is converted by {[kind.__name__ for kind in kinds]} on loading")
    columns = [
        [source.name for source in sources if source.pattern == pattern] for pattern in converter.source_patterns
    ]
    for column in columns:
        if len(column) != slices:
            raise CheckpointError(f"the checkpoint has {len(column)} of {slices} experts for {parameter!r}")
    return list(zip(*columns, strict=True))
