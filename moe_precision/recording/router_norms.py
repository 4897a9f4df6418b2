"""The recorded L2 norms of every expert's router row over a training run, and the file they are kept in.

Pure PyTorch: no trainer, no logger. Norms are float32 whatever the training dtype.
"""

from __future__ import annotations

import json
import math
import os
from itertools import groupby
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..errors import MoEPrecisionError
from ..files import save_tensors
from ..layers.experts import Bank
from ..layers.module_tree import whole
from ..layers.moe_layers import LayerShape, MoELayer
from .signals import max_variance

_FORMAT = "moe-precision-history"
_VERSION = 1


class HistoryError(MoEPrecisionError, ValueError):
    """A history that cannot be used: damaged, of another model, or without records."""


def router_norms(layers: list[MoELayer]) -> Tensor:
    """L2 norm of every expert's router row, all layers in one tensor.

    Under FSDP and DeepSpeed ZeRO-3 this is a collective: call it on all ranks.

    Args:
        layers: As found by `find_moe_layers`.

    Returns:
        ``(sum of num_experts,)`` float32 on the routers' device, layer after layer.

    Raises:
        MoELayerError: A router cannot be read whole, which would give a wrong norm.
    """
    norms: list[Tensor] = []
    with torch.no_grad():
        if not any(layer.router_is.gathers for layer in layers):
            return torch.cat(_norms(layers))
        for _, group in groupby(layers, key=lambda layer: id(layer.router_is.unit)):  # one FSDP1 unit at a time
            of_unit = list(group)
            with whole(layer.router_is for layer in of_unit):
                norms += _norms(of_unit)
        return torch.cat(norms)


def norms_by_layer(layers: list[MoELayer]) -> dict[str, Tensor]:
    """`router_norms` by layer name, each ``(E,)`` float32 on the CPU; a collective where that is one."""
    norms = router_norms(layers).cpu().split([layer.num_experts for layer in layers])
    return {layer.name: of_layer.clone() for layer, of_layer in zip(layers, norms, strict=True)}


def check_same_weights(expected: dict[str, Tensor], found: dict[str, Tensor], what: str) -> None:
    """Raises `HistoryError` where router norms differ by more than another dtype does: ``what`` is of other weights."""
    for name, norms in expected.items():
        now = found[name].detach().float().cpu()
        if not torch.allclose(now, norms, rtol=2e-3, atol=0):
            difference = float(((now - norms).abs() / norms.clamp(min=1e-30)).max())
            raise HistoryError(
                f"the {what} is of other weights: in layer {name!r} router norms differ by up to {difference:.2%}. "
                "Is it of another run?"
            )


def _norms(layers: list[MoELayer]) -> list[Tensor]:
    """``(num_experts,)`` for each layer: one kernel a layer, and as little else as can be."""
    norm = torch.linalg.vector_norm
    norms = [norm(layer.router_weight(), dim=-1, dtype=torch.float32) for layer in layers]  # each (rows,)
    for i, layer in enumerate(layers):
        if isinstance(norms[i], DTensor):
            norms[i] = norms[i].full_tensor()
        if norms[i].numel() != layer.shape.num_experts:
            norms[i] = norms[i][: layer.shape.num_experts]  # the others are shared or null experts
    return norms


def max_variances(layer: MoELayer) -> Tensor:
    """Maximum intra-neuron variance of every expert of a layer, ``(E,)`` float32 on the CPU; a collective when sharded.

    Reads one expert after the other; under FSDP2 each rank reads the experts that it holds.
    """
    bank = layer.banks[layer.first]
    with torch.no_grad(), layer.whole():
        parameter = bank.weights[0].read()
        if len(bank.weights) == 1 and isinstance(parameter, DTensor):
            return _of_sharded_bank(layer, bank, parameter)[: layer.num_experts].cpu()
        values = [max_variance(layer.neurons(matrix)) for matrix in bank.matrices()]
        values = [value.full_tensor() if isinstance(value, DTensor) else value for value in values]
        return torch.stack(values).cpu()


def _of_sharded_bank(layer: MoELayer, bank: Bank, parameter: DTensor) -> Tensor:
    by_expert = parameter.ndim == 3 and all(type(p) is Replicate or p == Shard(0) for p in parameter.placements)
    local = parameter.to_local() if by_expert else parameter.full_tensor()  # (some or all experts, ...)
    if parameter.ndim == 2:
        local = local.unflatten(0, (layer.num_experts, -1))
    values = [max_variance(layer.neurons(one.T if bank.transposed else one)) for one in local]
    stacked = torch.stack(values) if values else local.new_empty(0, dtype=torch.float32)
    if not by_expert:
        return stacked
    experts = (parameter.shape[0],)
    placed = DTensor.from_local(
        stacked, parameter.device_mesh, parameter.placements, run_check=False, shape=torch.Size(experts), stride=(1,)
    )
    return placed.full_tensor()


class RouterNormHistory:
    """Router norms of all layers, record by record; the first record is the baseline.

    Attributes:
        model_type: transformers' ``config.model_type``, or the class name of a model without a config.
        layers: Layer name -> `LayerShape`, in module order.
        steps: Optimizer step of each record, rising; ``steps[0]`` is the baseline's.
        max_variance: Layer name -> ``(E,)`` float32 at the last record, or empty if never measured.
        loads: ``training`` (since the first record) and ``validation`` (its last run), each layer name -> ``(2, E)``
            float64: tokens that each expert received, and their summed routing weight (NaN where it cannot be seen).
        caveats: Layer name -> key of `moe_layers.CAVEATS`, for routers whose norm is not what it is elsewhere.
        patterns: ``router_pattern`` and ``expert_pattern`` that the layers were found with, if any.
        dtypes: dtypes of the routers that were read, e.g. ``["float32"]``.
    """

    def __init__(self, layers: dict[str, LayerShape] | None = None, model_type: str = "") -> None:
        self.model_type = model_type
        self.layers = layers or {}
        self.caveats: dict[str, str] = {}
        self.patterns: dict[str, Any] = {}
        self.dtypes: list[str] = []
        self.steps: list[int] = []
        self.max_variance: dict[str, Tensor] = {}
        self.loads: dict[str, dict[str, Tensor]] = {}
        self._records: list[Tensor] = []  # each (sum of num_experts,) float32 on CPU

    @classmethod
    def of(cls, layers: list[MoELayer], model_type: str, patterns: dict[str, Any] | None = None) -> RouterNormHistory:
        """An empty history for the layers of one model, and the patterns that they were found with."""
        history = cls({layer.name: layer.shape for layer in layers}, model_type)
        history.caveats = {layer.name: layer.caveat for layer in layers if layer.caveat}
        history.patterns = dict(patterns or {})
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
        return self._by_layer(torch.stack(self._records) if self._records else torch.empty(0, experts))

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
        self.max_variance = {}  # of an earlier step

    def replace_last(self, norms: Tensor) -> bool:
        """Puts other norms in the place of the last record; returns whether they differ from it."""
        last, norms = self._records[-1], norms.to("cpu")
        if torch.equal(last, norms):
            return False
        self._records[-1], self.max_variance = norms, {}
        return True

    def measure_variance(self, layers: list[MoELayer]) -> None:
        """Reads each expert's maximum intra-neuron variance from the weights, for plans made without the model."""
        self.max_variance = {layer.name: max_variances(layer) for layer in layers}

    def add_load(self, loads: dict[str, Tensor]) -> None:
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
        """The last record as flat keys for a logger: a few aggregates a layer and, if wanted, every expert."""
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
            "version": _VERSION,
            "model_type": self.model_type,
            "layers": {name: layer.to_dict() for name, layer in self.layers.items()},
            "steps": list(self.steps),
            "norms": torch.stack(self._records) if self._records else torch.empty(0),
            "max_variance": dict(self.max_variance),
            "loads": {kind: dict(of_kind) for kind, of_kind in self.loads.items()},
            "caveats": dict(self.caveats),
            "patterns": dict(self.patterns),
            "dtypes": list(self.dtypes),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned, baseline included."""
        if state.get("version") != _VERSION:
            raise HistoryError(f"history has version {state.get('version')!r}, this release reads {_VERSION}")
        self.model_type = state["model_type"]
        self.layers = {name: LayerShape.from_dict(layer) for name, layer in state["layers"].items()}
        self.steps = [int(step) for step in state["steps"]]
        self._records = list(state["norms"].unbind()) if self.steps else []
        self.max_variance = dict(state["max_variance"])
        self.loads = {kind: dict(of_kind) for kind, of_kind in state.get("loads", {}).items()}
        self.caveats, self.patterns = dict(state.get("caveats", {})), dict(state.get("patterns", {}))
        self.dtypes = list(state.get("dtypes", []))

    def save(self, path: str | os.PathLike) -> None:
        """Writes safetensors: ``steps``, ``norms/<layer>``, ``max_variance/<layer>``, ``loads/<kind>/<layer>``.

        Raises:
            OSError: The file cannot be written; an existing one is left as it was.
        """
        tensors = {"steps": torch.tensor(self.steps, dtype=torch.int64)}
        tensors |= {f"norms/{name}": norms for name, norms in self.norms.items()}
        tensors |= {f"max_variance/{name}": values for name, values in self.max_variance.items()}
        for kind, loads in self.loads.items():
            tensors |= {f"loads/{kind}/{name}": load for name, load in loads.items()}
        layers = {name: layer.to_dict() for name, layer in self.layers.items()}
        metadata = {
            "format": _FORMAT,
            "version": str(_VERSION),
            "model_type": self.model_type,
            "layers": json.dumps(layers),
            "caveats": json.dumps(self.caveats),
            "patterns": json.dumps(self.patterns),
            "dtypes": json.dumps(self.dtypes),
        }
        save_tensors(tensors, path, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike) -> RouterNormHistory:
        """Reads a history.

        Raises:
            FileNotFoundError: No such file.
            HistoryError: The file is truncated, or is no history.
        """
        if not os.path.isfile(path):
            raise FileNotFoundError(f"no router-norm history at {os.fspath(path)!r}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise HistoryError(f"{os.fspath(path)!r} is no whole safetensors file: {error}") from error
        if metadata.get("format") != _FORMAT:
            raise HistoryError(f"{os.fspath(path)!r} is a safetensors file but no {_FORMAT}; its metadata: {metadata}")
        history = cls()
        try:
            layers = json.loads(metadata["layers"])
            history.load_state_dict(
                {
                    "version": int(metadata["version"]),
                    "model_type": metadata["model_type"],
                    "layers": layers,
                    "steps": tensors["steps"].tolist(),
                    "norms": torch.cat([tensors[f"norms/{name}"] for name in layers], dim=1),
                    "max_variance": {n: tensors[f"max_variance/{n}"] for n in layers if f"max_variance/{n}" in tensors},
                    "loads": {
                        kind: {n: tensors[f"loads/{kind}/{n}"] for n in layers if f"loads/{kind}/{n}" in tensors}
                        for kind in ("training", "validation")
                    },
                    "caveats": json.loads(metadata.get("caveats", "{}")),
                    "patterns": json.loads(metadata.get("patterns", "{}")),
                    "dtypes": json.loads(metadata.get("dtypes", "[]")),
                }
            )
        except (KeyError, RuntimeError, json.JSONDecodeError) as error:
            raise HistoryError(f"{os.fspath(path)!r} lacks part of a history: {error!r}") from error
        return history


def aggregates(prefix: str, values: list[float]) -> dict[str, float]:
    """Keys of a logger for the least, the median and the largest of some values."""
    ordered = sorted(values)
    median = ordered[(len(ordered) - 1) // 2]  # the lower one, as torch.median's
    return {f"{prefix}/min": ordered[0], f"{prefix}/median": median, f"{prefix}/max": ordered[-1]}
