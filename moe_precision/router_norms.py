"""The recorded L2 norms of every expert's router row over a training run, and the file they are kept in.

Pure PyTorch: no trainer, no logger. Norms are float32 whatever the training dtype.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from .files import replaced_when_done
from .moe_layers import LayerShape, MoELayer, MoELayerError
from .signals import max_variance

_FORMAT = "moe-precision-history"
_VERSION = 1


class HistoryError(ValueError):
    """A history that cannot be used: damaged, of another model, or without records."""


def router_norms(layers: list[MoELayer]) -> Tensor:
    """L2 norm of every expert's router row, all layers in one tensor.

    Under FSDP2 this is a collective: call it on all ranks.

    Args:
        layers: As found by `find_moe_layers`.

    Returns:
        ``(sum of num_experts,)`` float32 on the routers' device, layer after layer.

    Raises:
        MoELayerError: A router is not whole (a flat or empty shard), which would give a wrong norm.
    """
    norm = torch.linalg.vector_norm
    with torch.no_grad():  # one kernel a layer, and as little else as can be
        norms = [norm(layer.router_weight(), dim=-1, dtype=torch.float32) for layer in layers]  # each (rows,)
        for i, layer in enumerate(layers):
            rows, experts = norms[i].numel(), layer.shape.num_experts
            if rows != experts or isinstance(norms[i], DTensor):
                norms[i] = _expert_norms(layer, norms[i])
        return torch.cat(norms)


def _expert_norms(layer: MoELayer, norms: Tensor) -> Tensor:
    """The norms of the experts' rows alone, whole, where a router has further rows or is sharded."""
    if norms.numel() < layer.num_experts:  # a flat or empty shard gives a single norm
        raise MoELayerError(
            f"router {layer.router!r} has shape {tuple(layer.router_weight().shape)}, expected at least "
            f"({layer.num_experts}, d). It looks like a shard (FSDP1, DeepSpeed ZeRO-3), whose norms would be wrong"
        )
    whole = norms.full_tensor() if isinstance(norms, DTensor) else norms
    return whole[: layer.num_experts]  # the others are shared or null experts


class RouterNormHistory:
    """Router norms of all layers, record by record; the first record is the baseline.

    Attributes:
        model_type: transformers' ``config.model_type``, or the class name of a model without a config.
        layers: Layer name -> `LayerShape`, in module order.
        steps: Optimizer step of each record, rising; ``steps[0]`` is the baseline's.
        max_variance: Layer name -> ``(E,)`` float32 at the last record, or empty if never measured.
    """

    def __init__(self, layers: dict[str, LayerShape] | None = None, model_type: str = "") -> None:
        self.model_type = model_type
        self.layers = layers or {}
        self.steps: list[int] = []
        self.max_variance: dict[str, Tensor] = {}
        self._records: list[Tensor] = []  # each (sum of num_experts,) float32 on CPU

    @classmethod
    def of(cls, layers: list[MoELayer], model_type: str) -> RouterNormHistory:
        """An empty history for the layers of one model."""
        return cls({layer.name: layer.shape for layer in layers}, model_type)

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

    def measure_variance(self, layers: list[MoELayer]) -> None:
        """Reads each expert's maximum intra-neuron variance from the weights, for plans made without the model."""
        for layer in layers:
            values = [max_variance(layer.first_projection(e)) for e in range(layer.num_experts)]
            whole = [v.full_tensor() if isinstance(v, DTensor) else v for v in values]  # a collective, on all ranks
            self.max_variance[layer.name] = torch.stack(whole).cpu()  # (E,)

    def change(self, layer: str) -> Tensor:
        """Last norm minus first norm of each expert, ``(E,)`` float32: a difference of norms (arXiv 2604.06515)."""
        if len(self.steps) < 2:
            raise HistoryError(f"a change needs two records, got {len(self.steps)}: no training step was recorded")
        return self.last[layer] - self.first[layer]

    def metrics(self) -> dict[str, float]:
        """The last record as flat keys for a logger: every expert, and a few aggregates a layer."""
        metrics: dict[str, float] = {}
        for index, (norms, first) in enumerate(zip(self.last.values(), self.first.values(), strict=True)):
            layer = f"router_norm/layer_{index:02d}"
            values = norms.tolist()
            metrics |= {f"{layer}/expert_{expert:03d}": norm for expert, norm in enumerate(values)}
            metrics |= _aggregates(layer, values)
            metrics |= _aggregates(f"router_norm_change/layer_{index:02d}", (norms - first).tolist())
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

    def save(self, path: str | os.PathLike) -> None:
        """Writes the history as safetensors: ``steps``, ``norms/<layer>``, ``max_variance/<layer>``."""
        tensors = {"steps": torch.tensor(self.steps, dtype=torch.int64)}
        tensors |= {f"norms/{name}": norms.contiguous() for name, norms in self.norms.items()}
        tensors |= {f"max_variance/{name}": values.contiguous() for name, values in self.max_variance.items()}
        layers = {name: layer.to_dict() for name, layer in self.layers.items()}
        metadata = {
            "format": _FORMAT,
            "version": str(_VERSION),
            "model_type": self.model_type,
            "layers": json.dumps(layers),
        }
        with replaced_when_done(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)

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
                }
            )
        except (KeyError, RuntimeError, json.JSONDecodeError) as error:
            raise HistoryError(f"{os.fspath(path)!r} lacks part of a history: {error!r}") from error
        return history


def _aggregates(prefix: str, values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    median = ordered[(len(ordered) - 1) // 2]  # the lower one, as torch.median's
    return {f"{prefix}/min": ordered[0], f"{prefix}/median": median, f"{prefix}/max": ordered[-1]}
