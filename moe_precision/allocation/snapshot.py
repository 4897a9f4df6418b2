"""Signals of every expert at one moment: of a live model, of a checkpoint, or of a record in a history."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..layers.patterns import Patterns
from ..layers.prefixes import prefixes_of
from ..layers.shape import LayerShape
from ..plans.model_types import of_one_family
from ..recording.history import HistoryError, RouterNormHistory


@dataclass(frozen=True)
class Snapshot:
    """What is known of a model's experts at one moment. Methods read it; nothing in it is measured twice.

    Attributes:
        model_type: transformers' ``config.model_type``, or the class name of a model without a config.
        layers: Layer name -> `LayerShape`, in module order.
        router_norms: Layer name -> L2 norm of each expert's router row, ``(E,)`` float32.
        max_variance: Layer name -> maximum intra-neuron variance of each expert, ``(E,)`` float32; empty where it was
            not measured.
        loads: Layer name -> tokens that each expert received and their summed routing weight, ``(2, E)`` float64; empty
            where none were counted.
        caveats: Layer name -> key of `CAVEATS`, for routers whose norm does not mean what it means elsewhere.
        patterns: ``router_pattern`` and ``expert_pattern`` that the layers were found with.
        step: Optimizer step of the moment, None if it is not known.
    """

    model_type: str
    layers: dict[str, LayerShape]
    router_norms: dict[str, Tensor]
    max_variance: dict[str, Tensor] = field(default_factory=dict)
    loads: dict[str, Tensor] = field(default_factory=dict)
    caveats: dict[str, str] = field(default_factory=dict)
    patterns: Patterns = field(default_factory=Patterns)
    step: int | None = None

    @classmethod
    def first_of(cls, history: RouterNormHistory) -> Snapshot:
        """The baseline of a history, with what was counted since.

        Raises:
            HistoryError: The history holds no record.
        """
        return cls._of(history, 0)

    @classmethod
    def last_of(cls, history: RouterNormHistory) -> Snapshot:
        """The last record of a history, with the variances and loads that belong to it.

        Raises:
            HistoryError: The history holds no record, or the baseline alone.
        """
        if len(history.steps) == 1:
            raise HistoryError("the history holds the baseline alone: no training step was recorded")
        return cls._of(history, -1)

    def at_the_end_of(self, history: RouterNormHistory) -> Snapshot:
        """The same with the step of a history's last record, if that was taken of these weights."""
        if not history.steps or history.last.keys() != self.router_norms.keys():
            return self
        same = all(torch.equal(norms, self.router_norms[name]) for name, norms in history.last.items())
        return replace(self, step=history.steps[-1]) if same else self

    @classmethod
    def _of(cls, history: RouterNormHistory, record: int) -> Snapshot:
        if not history.steps:
            raise HistoryError("the history holds no record")
        return cls(
            model_type=history.model_type,
            layers=history.layers,
            router_norms=history.first if record == 0 else history.last,
            max_variance={} if record == 0 else dict(history.max_variance),
            loads=dict(history.loads.get("training") or history.loads.get("validation") or {}),
            caveats=dict(history.caveats),
            patterns=history.patterns,
            step=history.steps[record],
        )

    def in_names_of(self, other: Snapshot) -> Snapshot:
        """This snapshot, a history's, in the names of a model's layers: itself, or that of another class of the model.

        Raises:
            HistoryError: The layers, shapes or families are not those of the other.
        """
        if not of_one_family(self.model_type, other.model_type):
            raise HistoryError(
                f"the history, or the initial checkpoint, is of a model of type {self.model_type!r}, the trained model "
                f"is {other.model_type!r}: give that of the model that training started from"
            )
        change = prefixes_of(self.layers, other.layers)
        if change is None:
            raise HistoryError(
                f"the history is of another model: it has layers {list(self.layers)}, the model has "
                f"{list(other.layers)}, or their shapes differ"
            )
        if change.equal:
            return self
        return replace(
            self,
            layers=other.layers,
            router_norms=change.keys(self.router_norms),
            max_variance=change.keys(self.max_variance),
            loads=change.keys(self.loads),
            caveats=change.keys(self.caveats),
        )

    def not_finite(self) -> str | None:
        """Where a norm is NaN or infinite, as ``expert 3 of layer 'x' has router norm nan``; None if nowhere."""
        for name, norms in self.router_norms.items():
            for expert, norm in enumerate(norms.tolist()):
                if not math.isfinite(norm):
                    return f"expert {expert} of layer {name!r} has router norm {norm}"
        return None
