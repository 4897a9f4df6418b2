"""Expert statistics: the second moment of every expert matrix's inputs, which rounding takes into account.

For a matrix with input ``x`` it is ``H = E[w**2 x x^T]``, the mean over the tokens that the router has sent to the
expert, with ``w`` the routing weight that its output is multiplied by. `collecting` takes it from a model and text.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..checkpoints.tensor_file import Nested, TensorFile, named, shapes_of
from ..errors import MoEPrecisionError
from ..layers.moe_layers import MoELayer
from ..layers.prefixes import prefixes_of
from ..layers.shape import LayerShape
from .router_norms import check_same_weights, norms_by_layer

SHRINK = 0.3  # tokens for each input column at which half of a second moment is kept


class StatisticsError(MoEPrecisionError, ValueError):
    """Experts whose inputs cannot be seen, a damaged file, or statistics of another model."""


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
        packed = {projection: _packed(of_all) for projection, of_all in moments.items()}
        self.diagonals[name] = {projection: diagonal for projection, (diagonal, _) in packed.items()}
        self.correlations[name] = {projection: above for projection, (_, above) in packed.items()}
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
        diagonal = self.diagonals[layer][projection][expert]
        above = torch.zeros(len(diagonal), len(diagonal), dtype=torch.float32)
        above.masked_scatter_(_above_diagonal(len(diagonal)), self.correlations[layer][projection][expert].float())
        root = diagonal.sqrt()
        above.mul_(root).mul_(root.unsqueeze(1))
        return (above + above.T).diagonal_scatter(diagonal)

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
            ``(in, in)`` float32; None for an expert that no token has reached, or whose inputs were all 0: its matrix
            is then fitted as without statistics.
        """
        tokens, diagonal = int(self.tokens[layer][expert]), self.diagonals[layer][projection][expert]
        if tokens == 0 or not diagonal.any():
            return None
        share = SHRINK * len(diagonal) / (tokens + SHRINK * len(diagonal))
        weights = torch.ones_like(diagonal) if column_weights is None else column_weights.to(diagonal)
        if not weights.any():  # an expert that never had a gradient
            weights = torch.ones_like(diagonal)
        moment = self.second_moment(layer, projection, expert).mul_(1 - share)
        moment.diagonal().add_(weights / weights.mean() * (share * diagonal.mean()))
        return moment

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
        return ExpertStatistics(found, *moments, change.keys(self.tokens), change.keys(self.router_norms), self.text)

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
                _check_moment(diagonal[expert], above[expert], f"{where}, expert {expert}")
        if tokens.shape != (layer.num_experts,) or tokens.dtype != torch.int64 or (tokens < 0).any():
            raise StatisticsError(
                f"statistics of layer {name!r}: tokens are {tokens.tolist()} ({tokens.dtype}), expected "
                f"{layer.num_experts} whole numbers of at least 0"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes safetensors: ``diagonals/<layer>/<projection>``, ``correlations/...`` alike, ``tokens/<layer>`` and
        ``router_norms/<layer>``; layers and text are in the metadata.

        Raises:
            OSError: The file cannot be written; an existing one is left as it was.
        """
        tensors = named("diagonals", self.diagonals) | named("correlations", self.correlations)
        tensors |= named("tokens", self.tokens) | named("router_norms", self.router_norms)
        _FILE.save(path, tensors, layers=shapes_of(self.layers), text=self.text)

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
        found = cls(layers, *moments, tokens, norms, file.text("text"))
        for name in layers if check_moments else ():
            found._check_layer(name)
        return found


def as_statistics(statistics: ExpertStatistics | str | os.PathLike[str]) -> ExpertStatistics:
    """Takes statistics or the path of their file."""
    return statistics if isinstance(statistics, ExpertStatistics) else ExpertStatistics.load(statistics)


def file_bytes(layers: list[MoELayer]) -> int:
    """Bytes of the file that statistics of some layers make."""
    widths = [(layer.num_experts, inp) for layer in layers for _, inp in layer.projections.values()]
    return sum(experts * (4 * inp + inp * (inp - 1)) for experts, inp in widths)


def _above_diagonal(width: int) -> Tensor:
    """A mask ``(width, width)``."""
    return torch.ones(width, width, dtype=torch.bool).triu_(1)


def _packed(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Diagonals ``(E, in)`` float32 and correlations ``(E, in * (in - 1) / 2)`` float16 of ``(E, in, in)``."""
    diagonals, above = [], []
    mask = _above_diagonal(moments.shape[-1])
    for moment in moments:  # one at a time, on the CPU
        moment = moment.float().cpu()
        diagonal = moment.diagonal().clone()
        scale = torch.where(diagonal > 0, diagonal.rsqrt(), 0.0)
        diagonals.append(diagonal)
        above.append((moment * scale).mul_(scale.unsqueeze(1)).masked_select(mask).half())
    return torch.stack(diagonals), torch.stack(above)


def _check_moment(diagonal: Tensor, above: Tensor, where: str) -> None:
    if not (diagonal.is_floating_point() and above.is_floating_point()):
        raise StatisticsError(f"{where}: expected floats, got {diagonal.dtype} and {above.dtype}")
    if not (diagonal.isfinite().all() and above.isfinite().all()):
        raise StatisticsError(f"{where}: holds values that are not finite; has training diverged?")
    if (diagonal < 0).any():
        raise StatisticsError(f"{where}: mean squares of inputs go down to {float(diagonal.min()):.3g}, expected 0")
    if above.numel() and float(above.abs().max()) > 1.01:
        raise StatisticsError(f"{where}: correlations of inputs go up to {float(above.abs().max()):.3g}, expected 1")
