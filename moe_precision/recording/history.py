"""The recorded L2 norms of every expert's router row over a training run, and the file that keeps them.

Pure PyTorch: no trainer, no logger. Norms are float32 whatever the training dtype.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.tensor_file import TensorFile, named, shapes_of
from ..errors import MoEPrecisionError
from ..layers.moe_layers import MoELayer
from ..layers.patterns import Patterns
from ..layers.shape import LayerShape
from .loads import Loads
from .router_norms import max_variances


class HistoryError(MoEPrecisionError, ValueError):
    """A history that cannot be used: damaged, of another model, or without records."""


_FILE = TensorFile("moe-precision-history", 1, HistoryError, "router-norm history")


class RouterNormHistory:
    """Router norms of all layers, record by record; the first record is the baseline.

    Attributes:
        model_type: transformers' ``config.model_type``, or the class name of a model without a config.
        layers: Layer name -> `LayerShape`, in module order.
        steps: Optimizer step of each record, ascending; ``steps[0]`` is the baseline's.
        max_variance: Layer name -> ``(E,)`` float32 at the last record, or empty if never measured.
        loads: ``training`` (since the first record) and ``validation`` (its last run), each layer name -> ``(2, E)``
            float64: tokens that each expert received, and their summed routing weight (NaN where it cannot be seen).
        caveats: Layer name -> key of `moe_layers.CAVEATS`, for routers whose norm means something else.
        patterns: ``router_pattern`` and ``expert_pattern`` that the layers were found with, if any.
        dtypes: dtypes of the routers that were read, e.g. ``["float32"]``.

    Example:
        >>> layers = find_moe_layers(model)
        >>> history = RouterNormHistory.of(layers, model_type="mixtral")
        >>> history.record(0, router_norms(layers))
        >>> history.baseline_step, history.norms["model.layers.0.mlp"].shape
        (0, torch.Size([1, 8]))
        >>> RouterNormHistory.load("precision_plan.history.safetensors").steps
        [0, 10]
    """

    def __init__(self, layers: dict[str, LayerShape] | None = None, model_type: str = "") -> None:
        self.model_type = model_type
        self.layers = layers or {}
        self.caveats: dict[str, str] = {}
        self.patterns = Patterns()
        self.dtypes: list[str] = []
        self.steps: list[int] = []
        self.max_variance: dict[str, Tensor] = {}
        self.loads: dict[str, Loads] = {}
        self._records: list[Tensor] = []  # each (sum of num_experts,) float32 on CPU

    @classmethod
    def of(cls, layers: list[MoELayer], model_type: str, patterns: Patterns | None = None) -> RouterNormHistory:
        """An empty history for the layers of one model, and the patterns that they were found with."""
        history = cls({layer.name: layer.shape for layer in layers}, model_type)
        history.caveats = {layer.name: layer.caveat for layer in layers if layer.caveat}
        history.patterns = Patterns(**(patterns or {}))
        history.dtypes = sorted({str(layer.router_is.dtype).removeprefix("torch.") for layer in layers})
        return history

    @property
    def baseline_step(self) -> int | None:
        """Optimizer step of the first record, or None if there is none."""
        return self.steps[0] if self.steps else None

    @property
    def norms(self) -> dict[str, Tensor]:
        """Layer name -> ``(records, E)`` float32."""
        experts = sum(layer.num_experts for layer in self.layers.values())
        return self._by_layer(
            torch.stack(self._records) if self._records else torch.empty(0, experts, dtype=torch.float32)
        )

    @property
    def first(self) -> dict[str, Tensor]:
        """Layer name -> ``(E,)`` float32 of the first record, the baseline."""
        return self._by_layer(self._records[0])

    @property
    def last(self) -> dict[str, Tensor]:
        """Layer name -> ``(E,)`` float32 of the last record."""
        return self._by_layer(self._records[-1])

    def _by_layer(self, record: Tensor) -> dict[str, Tensor]:
        sizes = [layer.num_experts for layer in self.layers.values()]
        return dict(zip(self.layers, record.split(sizes, dim=-1), strict=True))

    def record(self, step: int, norms: Tensor) -> None:
        """Adds one record. The only transfer from the device happens here, for all layers together.

        Args:
            step: Optimizer step, larger than that of the last record.
            norms: As `router_norms` returns it.
        """
        if self.steps and step <= self.steps[-1]:
            raise HistoryError(f"step {step} is not after the last recorded step {self.steps[-1]}")
        self.steps.append(step)
        self._records.append(norms.to("cpu"))
        self.max_variance = {}  # it was of an earlier step

    def replace_last(self, norms: Tensor) -> bool:
        """Replaces the norms of the last record; returns whether they differ from it."""
        last, norms = self._records[-1], norms.to("cpu")
        if torch.equal(last, norms):
            return False
        self._records[-1], self.max_variance = norms, {}
        return True

    def measure_variance(self, layers: list[MoELayer]) -> None:
        """Reads each expert's maximum intra-neuron variance from the weights, for plans made without the model."""
        self.max_variance = {layer.name: max_variances(layer) for layer in layers}

    def add_load(self, loads: Loads) -> None:
        """Adds what experts received in training since the last call, as `LoadCounter.take` returns it."""
        known = self.loads.setdefault("training", {})
        for name, load in loads.items():
            known[name] = known[name] + load if name in known else load

    def change(self, layer: str) -> Tensor:
        """Last norm minus first norm of each expert, ``(E,)`` float32: a difference of norms (arXiv 2604.06515)."""
        if len(self.steps) < 2:
            raise HistoryError(f"a change needs two records, got {len(self.steps)}: no training step was recorded")
        return self.last[layer] - self.first[layer]

    def changes(self, record: int = -1) -> dict[str, Tensor]:
        """Layer name -> norm at a record minus norm at the first, ``(E,)`` float32."""
        return self._by_layer(self._records[record] - self._records[0])

    def not_finite(self, last_only: bool = False) -> str | None:
        """Where a norm was first NaN or infinite, as ``expert 3 of layer 'x' has router norm nan at step 120``."""
        start = len(self.steps) - 1 if last_only else 0
        for step, record in zip(self.steps[start:], self._records[start:], strict=True):
            if not record.isfinite().all():
                for name, norms in self._by_layer(record).items():
                    for expert, norm in enumerate(norms.tolist()):
                        if not math.isfinite(norm):
                            return f"expert {expert} of layer {name!r} has router norm {norm} at step {step}"
        return None

    def metrics(self, experts: bool = True) -> dict[str, float]:
        """The last record as flat keys for a logger: a few aggregates per layer and, if wanted, every expert."""
        metrics: dict[str, float] = {}
        for index, (norms, first) in enumerate(zip(self.last.values(), self.first.values(), strict=True)):
            layer = f"router_norm/layer_{index:02d}"
            values = norms.tolist()
            if experts:
                metrics |= {f"{layer}/expert_{expert:03d}": norm for expert, norm in enumerate(values)}
            metrics |= aggregates(layer, values)
            metrics |= aggregates(f"router_norm_change/layer_{index:02d}", (norms - first).tolist())
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors only, so that a checkpoint loads with ``weights_only=True``."""
        return {
            "version": _FILE.version,
            "model_type": self.model_type,
            "layers": shapes_of(self.layers),
            "steps": list(self.steps),
            "norms": torch.stack(self._records) if self._records else torch.empty(0, dtype=torch.float32),
            "max_variance": dict(self.max_variance),
            "loads": {kind: dict(of_kind) for kind, of_kind in self.loads.items()},
            "caveats": dict(self.caveats),
            "patterns": dict(self.patterns),
            "dtypes": list(self.dtypes),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned, baseline included."""
        if state.get("version") != _FILE.version:
            raise HistoryError(
                f"the history in the checkpoint is of version {state.get('version')!r}, this release reads version "
                f"{_FILE.version}: resume with the release that wrote it"
            )
        self.model_type = state["model_type"]
        self.layers = {name: LayerShape.from_dict(layer) for name, layer in state["layers"].items()}
        self.steps = [int(step) for step in state["steps"]]
        self._records = list(state["norms"].unbind()) if self.steps else []
        self.max_variance = dict(state["max_variance"])
        self.loads = {kind: dict(of_kind) for kind, of_kind in state.get("loads", {}).items()}
        self.caveats, self.patterns = dict(state.get("caveats", {})), Patterns(**state.get("patterns", {}))
        self.dtypes = list(state.get("dtypes", []))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes safetensors: ``steps``, ``norms/<layer>``, ``max_variance/<layer>``, ``loads/<kind>/<layer>``.

        Raises:
            OSError: The file cannot be written; an existing one is left as it was.
        """
        tensors = {"steps": torch.tensor(self.steps, dtype=torch.int64)}
        tensors |= named("norms", self.norms) | named("max_variance", self.max_variance) | named("loads", self.loads)
        _FILE.save(
            path,
            tensors,
            model_type=self.model_type,
            layers=shapes_of(self.layers),
            caveats=self.caveats,
            patterns=self.patterns,
            dtypes=self.dtypes,
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RouterNormHistory:
        """Reads a history.

        Raises:
            FileNotFoundError: No such file.
            HistoryError: The file is damaged, of another version, or holds no history.
        """
        file = _FILE.load(path)
        history = cls(file.layers(), file.text("model_type"))
        history.steps = [int(step) for step in file.tensor("steps").tolist()]
        records = len(history.steps)
        shapes = {name: (records, layer.num_experts) for name, layer in history.layers.items()}
        norms = [file.tensor(f"norms/{name}", shape) for name, shape in shapes.items()]
        history._records = list(torch.cat(norms, dim=1).unbind())
        history.max_variance = file.by_layer("max_variance", history.layers)
        loads = {kind: file.by_layer(f"loads/{kind}", history.layers) for kind in ("training", "validation")}
        history.loads = {kind: of_kind for kind, of_kind in loads.items() if of_kind}
        history.caveats, history.patterns = file.decoded("caveats", "{}"), file.decoded("patterns", "{}")
        history.dtypes = file.decoded("dtypes", "[]")
        return history


def aggregates(prefix: str, values: list[float]) -> dict[str, float]:
    """Logger keys for the least, the median and the largest of some values."""
    ordered = sorted(values)
    median = ordered[(len(ordered) - 1) // 2]  # the lower one, as in torch.median
    return {f"{prefix}/min": ordered[0], f"{prefix}/median": median, f"{prefix}/max": ordered[-1]}


def load_metrics(before: dict[str, Tensor], now: dict[str, Tensor], layers: Sequence[str]) -> dict[str, float]:
    """Tokens of the least, the median and the most loaded expert of each layer, in even shares.

    Args:
        before: Layer name -> ``(2, E)``, tokens and routing weight up to the last time that this was logged.
        now: Layer name -> ``(2, E)``, the totals now.
        layers: Names of all layers, in module order.

    Returns:
        ``expert_load/layer_03/{min,median,max}``; 1 is an equal share of the tokens. Layers without
        new tokens are left out.
    """
    metrics: dict[str, float] = {}
    for index, name in enumerate(layers):
        if name not in now:
            continue
        tokens = now[name][0] - before[name][0] if name in before else now[name][0]
        if tokens.sum() > 0:
            metrics |= aggregates(f"expert_load/layer_{index:02d}", (tokens * len(tokens) / tokens.sum()).tolist())
    return metrics
