"""A few values of every expert matrix, by which a checkpoint knows its experts again; never a collective.

A router's norm says nothing about the experts behind it: a checkpoint may be restored without them.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..checkpoints.tensor_file import TensorFile
from ..layers.banks import Bank
from ..layers.moe_layers import MoELayer
from .history import HistoryError

_FILE = TensorFile("moe-precision-expert-samples", 1, HistoryError, "samples of experts")
_VALUES = 16  # of every expert matrix, on a diagonal: a training step changes nearly all values


class ExpertSamples:
    """Values of all experts at fixed places, and whether a model still has them, possibly in another dtype.

    Weights that are sharded (FSDP, DeepSpeed ZeRO-3, tensor parallelism) or behind adapters are left out: their
    checkpoints are restored by the names of the module tree, and a sample would need all processes.

    Attributes:
        values: ``layer/projection`` -> ``(E, 16)`` float32 on the CPU.

    Example:
        >>> samples = ExpertSamples.of(find_moe_layers(model))
        >>> samples.others(find_moe_layers(model))
        []
    """

    def __init__(self, values: dict[str, Tensor] | None = None) -> None:
        self.values = values or {}

    @classmethod
    def of(cls, layers: list[MoELayer]) -> ExpertSamples:
        """The values of now; no copy of a matrix is made."""
        found = {f"{layer.name}/{name}": _sample(bank) for layer in layers for name, bank in layer.banks.items()}
        return cls({name: values.float().cpu() for name, values in found.items() if values is not None})

    def others(self, layers: list[MoELayer]) -> list[str]:
        """The experts that are not those of these samples, as ``expert 3 of 'model.layers.0.mlp' (down_proj)``.

        Args:
            layers: Of a model in any float dtype; the checkpoint may have been in yet another one.
        """
        dtypes = {
            f"{layer.name}/{name}": bank.weights[0].dtype for layer in layers for name, bank in layer.banks.items()
        }
        now = ExpertSamples.of(layers).values
        known = [name for name in now if name in self.values and self.values[name].shape == now[name].shape]
        fewest: list[str] | None = None
        for stored in (torch.float32, torch.bfloat16, torch.float16):
            found = []
            for name in known:
                expected = self.values[name].to(stored).to(dtypes[name]).float()
                differ = (expected.nan_to_num() != now[name].nan_to_num()).any(dim=1)
                layer, _, projection = name.rpartition("/")
                found += [
                    f"expert {expert} of {layer!r} ({projection})" for expert in differ.nonzero().flatten().tolist()
                ]
            fewest = found if fewest is None or len(found) < len(fewest) else fewest
        return fewest or []

    def state_dict(self) -> dict[str, Any]:
        """Tensors only, for a Trainer's checkpoint."""
        return dict(self.values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes safetensors; an existing file is replaced in one step.

        Raises:
            OSError: The file cannot be written.
        """
        _FILE.save(path, self.values)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ExpertSamples:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: No such file.
            HistoryError: The file is damaged, or of another kind or version.
        """
        return cls(_FILE.load(path).tensors)


@torch.no_grad()
def _sample(bank: Bank) -> Tensor | None:
    """``(E, 16)`` of one matrix of every expert; None where this process does not hold it whole."""
    if bank.parts > 1 or any(weight.gathers or weight.is_adapted for weight in bank.weights):
        return None
    parameters = [weight.parameter() for weight in bank.weights]
    if any(isinstance(one, DTensor) or one.is_meta for one in parameters):
        return None
    if len(parameters) > 1:
        return torch.stack([_diagonal(one) for one in parameters])
    (whole,) = parameters
    return _diagonal(whole if whole.ndim == 3 else whole.unflatten(0, (bank.num_experts, -1)))[: bank.num_experts]


def _diagonal(matrices: Tensor) -> Tensor:
    """Values of ``(..., rows, columns)`` from the first to the last corner, ``(..., 16)``."""
    share = torch.linspace(0, 1, _VALUES, dtype=torch.float64)
    rows, columns = ((share * (size - 1)).long().to(matrices.device) for size in matrices.shape[-2:])
    return matrices[..., rows, columns].detach()
