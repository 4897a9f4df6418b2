"""Expert statistics: the second moment of every expert matrix's inputs, which rounding takes into account.

For a matrix with input ``x`` it is ``H = E[w**2 x x^T]``, the mean over the tokens that the router has sent to the
expert, with ``w`` the routing weight that its output is multiplied by. `collecting` takes it from a model and text.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..checkpoints.tensor_file import Nested, TensorFile, named, shapes_of
from ..layers.moe_layers import MoELayer
from ..layers.prefixes import prefixes_of
from ..layers.shape import LayerShape
from .linear_inputs import LinearInputs
from .packed_moments import StatisticsError as StatisticsError
from .packed_moments import check_moment, packed, shrunk, whole
from .router_norms import check_same_weights, norms_by_layer

_FILE = TensorFile("moe-precision-statistics", 1, StatisticsError, "statistics")


@dataclass
class ExpertStatistics:
    """Second moments of the inputs of every expert matrix, held as they are in the file.

    A second moment is its diagonal in float32 and, of one triangle, the correlations in float16. That is half of a
    triangle in float32, whatever the range of the inputs.

    Attributes:
        layers: Layer name -> `LayerShape`, in module order.
        diagonals: Layer name -> projection name -> ``(E, in)`` float32.
        correlations: Layer name -> projection name -> ``(E, in * (in - 1) / 2)`` float16, the triangle above the
            diagonal, row after row; 0 for inputs that are always 0.
        tokens: Layer name -> ``(E,)`` int64: the tokens that each expert's statistics rest on.
        router_norms: Layer name -> ``(E,)`` float32 when they were taken, by which the weights that they belong to are
            known.
        text: What text they were taken from.
        linears: Second moments of the inputs of other linear layers, where they were asked for.
        indefinite: Layer, projection and expert of second moments that were found to have negative eigenvalues; these
            matrices are fitted and priced as without statistics.

    Example:
        >>> statistics = ExpertStatistics.load("precision_plan.statistics.safetensors")
        >>> statistics.second_moment("model.layers.0.mlp", "down_proj", expert=0).shape
        torch.Size([128, 128])
    """

    layers: dict[str, LayerShape]
    diagonals: Nested = field(default_factory=dict)
    correlations: Nested = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)
    router_norms: dict[str, Tensor] = field(default_factory=dict)
    text: str = ""
    linears: LinearInputs = field(default_factory=LinearInputs)
    indefinite: set[tuple[str, str, int]] = field(default_factory=set)

    @classmethod
    def of(
        cls,
        layers: list[MoELayer],
        second_moments: Mapping[str, Mapping[str, Tensor]],
        tokens: Mapping[str, Tensor],
        text: str = "",
    ) -> ExpertStatistics:
        """Statistics from whole second moments.

        Args:
            layers: As found by `find_moe_layers`, whose router norms are read.
            second_moments: Layer name -> projection name -> ``(E, in, in)`` float32; 0 for an expert without tokens.
            tokens: Layer name -> ``(E,)``.
            text: What text they were taken from.

        Raises:
            StatisticsError: A second moment is not finite, has a negative value on its diagonal, or has a correlation
                above 1.
        """
        found = cls({layer.name: layer.shape for layer in layers}, text=text)
        for name, moments in second_moments.items():
            found.add(name, moments, tokens[name])
        return found.belongs_to(layers)

    @without_autocast()
    def add(self, name: str, moments: Mapping[str, Tensor], tokens: Tensor) -> None:
        """Takes in one layer's second moments, one matrix at a time; arguments as those of `of` for the layer.

        Raises:
            StatisticsError: As `of` does, or a layer that these statistics are not for.
        """
        if name not in self.layers:
            raise StatisticsError(f"layer {name!r} is none of {list(self.layers)}")
        parts = {projection: packed(of_all) for projection, of_all in moments.items()}
        self.diagonals[name] = {projection: diagonal for projection, (diagonal, _) in parts.items()}
        self.correlations[name] = {projection: above for projection, (_, above) in parts.items()}
        self.tokens[name] = tokens.to("cpu", torch.int64)
        self._check_layer(name)

    def belongs_to(self, layers: list[MoELayer]) -> ExpertStatistics:
        """States the weights that these are of, those that the layers have now; a collective where reading norms is.

        Raises:
            StatisticsError: A layer is missing.
        """
        if missing := [layer.name for layer in layers if layer.name not in self.tokens]:
            raise StatisticsError(f"there are no statistics of {missing}")
        self.router_norms = norms_by_layer(layers)
        return self

    def second_moment(self, layer: str, projection: str, expert: int) -> Tensor:
        """The second moment of one matrix's inputs, ``(in, in)`` float32."""
        return whole(self.diagonals[layer][projection][expert], self.correlations[layer][projection][expert])

    def fit_moment(
        self, layer: str, projection: str, expert: int, column_weights: Tensor | None = None
    ) -> Tensor | None:
        """The second moment that a matrix is rounded under: shrunk to its diagonal where few tokens were seen.

        ``H <- (1 - l) H + l diag(c)`` with ``l = 0.3 in / (n + 0.3 in)``, where ``n`` is the number of the expert's
        tokens, ``in`` the width of the matrix's input and ``c`` the column weights, scaled to the mean of H's diagonal.
        With ``n = 16 in`` tokens l is 0.02, with ``n = 0.3 in`` it is 1/2.

        Args:
            layer: Name of the layer.
            projection: Name of the matrix.
            expert: Its expert.
            column_weights: ``(in,)``, see `Curvature.fit_weights`; None, or 0 in all columns, for all alike.

        Returns:
            ``(in, in)`` float32; None for an expert that no token has reached, or whose inputs were all 0, or one of
            `indefinite`: its matrix is then fitted as without statistics.
        """
        if (layer, projection, expert) in self.indefinite:
            return None
        diagonal, above = self.diagonals[layer][projection][expert], self.correlations[layer][projection][expert]
        return shrunk(diagonal, above, int(self.tokens[layer][expert]), column_weights)

    @property
    def experts_without_tokens(self) -> int:
        """How many experts no token has reached."""
        return sum(int((tokens == 0).sum()) for tokens in self.tokens.values())

    def tokens_by_layer(self) -> dict[str, list[int]]:
        """Layer name -> tokens of the expert with the least, of the median one, and of the one with the most."""
        of_layers = self.tokens.items()
        return {name: [int(of.min()), int(of.median()), int(of.max())] for name, of in of_layers}

    def described(self) -> str:
        """How many tokens the experts' statistics rest on, in words."""
        tokens = torch.cat(list(self.tokens.values()))
        text = f"tokens per expert: least {tokens.min():,}, median {tokens.median():,}, most {tokens.max():,}"
        if self.linears.tokens:
            text += f"; inputs of {len(self.linears.tokens)} other linear layers"
        if self.experts_without_tokens:
            text += f"; {self.experts_without_tokens} experts saw none and are fitted without statistics"
        return text

    def for_layers(self, found: dict[str, LayerShape]) -> ExpertStatistics:
        """The statistics in the names of a model's layers: themselves, or those of another class of the same model.

        Raises:
            StatisticsError: They are of another model.
        """
        change = prefixes_of(self.layers, found)
        if change is None:
            raise StatisticsError(
                f"the statistics are of another model: they have layers {list(self.layers)}, expected {list(found)}, "
                "or their shapes differ"
            )
        if change.equal:
            return self
        moments = change.keys(self.diagonals), change.keys(self.correlations)
        known = change.keys(self.tokens), change.keys(self.router_norms)
        return ExpertStatistics(found, *moments, *known, self.text, self.linears.renamed(change))

    def check_router_norms(self, norms: dict[str, Tensor]) -> None:
        """Raises `StatisticsError` if router norms show that they are of other weights; see `check_same_weights`."""
        check_same_weights(self.router_norms, norms, "set of statistics", StatisticsError)

    def _check_layer(self, name: str) -> None:
        layer, tokens = self.layers[name], self.tokens[name]
        for projection, (_, inp) in layer.projections.items():
            where = f"statistics of {projection!r} in layer {name!r}"
            diagonal, above = self.diagonals[name][projection], self.correlations[name][projection]
            expected = (layer.num_experts, inp), (layer.num_experts, inp * (inp - 1) // 2)
            if (diagonal.shape, above.shape) != expected:
                raise StatisticsError(
                    f"{where}: diagonal and correlations have shapes {tuple(diagonal.shape)} and "
                    f"{tuple(above.shape)}, expected {expected[0]} and {expected[1]}"
                )
            for expert in range(layer.num_experts):  # one at a time: a file is read as it is needed
                check_moment(diagonal[expert], above[expert], f"{where}, expert {expert}")
        if tokens.shape != (layer.num_experts,) or tokens.dtype != torch.int64 or (tokens < 0).any():
            raise StatisticsError(
                f"statistics of layer {name!r}: tokens are {tokens.tolist()} ({tokens.dtype}), expected "
                f"{layer.num_experts} whole numbers of at least 0"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes safetensors: ``diagonals/<layer>/<projection>``, ``correlations/...`` alike, ``tokens/<layer>`` and
        ``router_norms/<layer>``; layers and text are in the metadata. Of other linear layers there are
        ``linear_diagonals/<module>`` and ``linear_correlations/<module>``, with their tokens in the metadata.

        Raises:
            OSError: The file cannot be written; an existing one is left as it was.
        """
        tensors = named("diagonals", self.diagonals) | named("correlations", self.correlations)
        tensors |= named("tokens", self.tokens) | named("router_norms", self.router_norms)
        linears = self.linears
        tensors |= named("linear_diagonals", linears.diagonals) | named("linear_correlations", linears.correlations)
        more = {"linears": linears.tokens} if linears.tokens else {}
        _FILE.save(path, tensors, layers=shapes_of(self.layers), text=self.text, **more)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, check_moments: bool = True) -> ExpertStatistics:
        """Reads what `save` wrote. Second moments stay on disk until they are needed.

        Args:
            path: The file.
            check_moments: Whether every second moment is read once, to see that it can be used. For tokens, text and
                router norms alone that is not needed, and a large file takes long to read.

        Raises:
            FileNotFoundError: No such file.
            StatisticsError: The file is damaged, of another version, or holds no statistics.
        """
        file = _FILE.load(path)
        layers = file.layers()
        tokens, norms = (
            {name: file.tensor(f"{kind}/{name}") for name in layers} for kind in ("tokens", "router_norms")
        )
        moments = file.nested("diagonals", layers), file.nested("correlations", layers)
        of_linears = file.decoded("linears", "{}")
        diagonals, above = (
            {name: file.tensor(f"linear_{kind}/{name}") for name in of_linears}
            for kind in ("diagonals", "correlations")
        )
        linears = LinearInputs(diagonals, above, of_linears)
        found = cls(layers, *moments, tokens, norms, file.text("text"), linears)
        for name in layers if check_moments else ():
            found._check_layer(name)
        for name in of_linears if check_moments else ():
            found.linears.check(name)
        return found


def as_statistics(statistics: ExpertStatistics | str | os.PathLike[str]) -> ExpertStatistics:
    """Takes statistics or the path of their file."""
    return statistics if isinstance(statistics, ExpertStatistics) else ExpertStatistics.load(statistics)


def file_bytes(layers: list[MoELayer], linears: Iterable[int] = ()) -> int:
    """Bytes of the file that statistics of some layers make, and of other linear layers with inputs of some widths."""
    widths = [(layer.num_experts, inp) for layer in layers for _, inp in layer.projections.values()]
    widths += [(1, width) for width in linears]
    return sum(experts * (4 * inp + inp * (inp - 1)) for experts, inp in widths)
