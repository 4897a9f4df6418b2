"""Second moments of the inputs of linear layers outside of experts, such as those of attention.

They let `non_expert_bits` round as experts are rounded. Every token counts once: no router chooses among them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..layers.module_tree import root_model
from ..layers.prefixes import Prefixes
from .packed_moments import StatisticsError, check_moment, packed, shrunk
from .padding import Padding
from .processes import summed


@dataclass
class LinearInputs:
    """Second moments by layer, held as they are in the file.

    Attributes:
        diagonals: Name of the module -> ``(in,)`` float32.
        correlations: Name of the module -> ``(in * (in - 1) / 2)`` float16, the triangle above the diagonal.
        tokens: Name of the module -> tokens that it rests on.

    Example:
        >>> import torch
        >>> inputs = LinearInputs()
        >>> inputs.add("attention.q_proj", torch.tensor([[4.0, 1.0], [1.0, 1.0]]), tokens=1000)
        >>> inputs.correlations["attention.q_proj"].tolist()
        [0.5]
    """

    diagonals: dict[str, Tensor] = field(default_factory=dict)
    correlations: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, moment: Tensor, tokens: int) -> None:
        """Takes in the second moment ``(in, in)`` of one module.

        Raises:
            StatisticsError: It is not finite, or no second moment.
        """
        (self.diagonals[name],), (self.correlations[name],) = packed(moment[None])
        self.tokens[name] = tokens
        self.check(name)

    def check(self, name: str) -> None:
        """Raises `StatisticsError` where one cannot be used."""
        diagonal, above, tokens = self.diagonals[name], self.correlations[name], self.tokens[name]
        where = f"statistics of linear layer {name!r}"
        if diagonal.ndim != 1 or above.shape != (len(diagonal) * (len(diagonal) - 1) // 2,):
            raise StatisticsError(
                f"{where}: diagonal and correlations have shapes {tuple(diagonal.shape)} and {tuple(above.shape)}, "
                "expected (in,) and (in (in - 1) / 2,)"
            )
        if not isinstance(tokens, int) or tokens < 0:
            raise StatisticsError(f"{where}: tokens are {tokens!r}, expected a whole number of at least 0")
        check_moment(diagonal, above, where)

    def fit_moment(self, name: str) -> Tensor | None:
        """What a module's weight is rounded under, as `ExpertStatistics.fit_moment`; None for one that is not here."""
        if name not in self.tokens:
            return None
        return shrunk(self.diagonals[name], self.correlations[name], self.tokens[name])

    def renamed(self, change: Prefixes) -> LinearInputs:
        """The same under the names of another class of the model."""
        return LinearInputs(change.keys(self.diagonals), change.keys(self.correlations), change.keys(self.tokens))


class LinearCollector:
    """Sums ``x x^T`` over what linear layers are given, float32 on their device, until it is closed.

    Args:
        model: The model, whose ``attention_mask`` is looked at: padding does not count.
        names: Of ``nn.Linear`` modules, relative to the transformers model.
    """

    def __init__(self, model: nn.Module, names: Collection[str]) -> None:
        root = root_model(model)
        modules = {name: cast("nn.Linear", root.get_submodule(name)) for name in names}
        self._sums: dict[str, Tensor] = {}
        self._rows = dict.fromkeys(names, 0)
        self._widths = {name: module.in_features for name, module in modules.items()}
        self._device = next(root.parameters()).device
        self._padding = Padding()
        self._handles: list[Any] = [
            module.register_forward_pre_hook(partial(self._see, name), with_kwargs=True)
            for name, module in modules.items()
        ]
        if names:
            self._handles.append(root.register_forward_pre_hook(self._see_batch, with_kwargs=True))

    def _see_batch(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._padding.see(kwargs)

    @torch.no_grad()
    def _see(self, name: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        width = self._widths[name]
        if isinstance(given, DTensor) or given.shape[-1] != width:
            raise StatisticsError(
                f"linear layer {name!r} was given {type(given).__name__} {tuple(given.shape)}, expected rows of "
                f"{width} values: are its inputs split over processes (tensor parallelism)?"
            )
        x = given.detach().reshape(-1, width)
        if (real := self._padding.real(name, len(x))) is not None:
            x = x[real.to(x.device)]
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            if name not in self._sums:
                self._sums[name] = torch.zeros(width, width, dtype=torch.float32, device=x.device)
            self._sums[name].addmm_(x.T, x)
        self._rows[name] += len(x)

    def take(self, into: LinearInputs) -> None:
        """Adds what was collected, over all processes; a collective. A module that got no token is left out."""
        for name, width in self._widths.items():
            rows = int(summed(torch.tensor(self._rows[name], device=self._device)))
            own = self._sums.pop(name, None)
            own = torch.zeros(width, width, dtype=torch.float32, device=self._device) if own is None else own
            total = summed(own)
            if rows:
                into.add(name, total / rows, rows)

    def close(self) -> None:
        """Takes the hooks off; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._padding.forget()
