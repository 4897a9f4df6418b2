"""Checkpoint folders for tests: a float one with its plan, and the contents of any."""

from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedModel

from moe_precision import PrecisionPlan, allocate
from tests.support.models import build


def save_float(folder: Path) -> tuple[PreTrainedModel, PrecisionPlan, Path, Path]:
    """A Mixtral, its plan of 2 bits (packed layers are some 30 KB each), its folder on disk, and one to write."""
    model = build("mixtral", num_hidden_layers=4)
    model.save_pretrained(folder / "float", max_shard_size="300KB")
    plan = allocate(model, method="uniform", average_bits=2, bits=(2,), group_size=64)
    return model, plan, folder / "float", folder / "out"


def contents(folder: Path) -> dict[str, Any]:
    """Everything that a folder holds: safetensors write their metadata in any order."""
    found = {}
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            found[file.name] = file.read_bytes()
            continue
        with safe_open(file, "pt") as opened:
            found[file.name] = opened.metadata(), {name: opened.get_tensor(name).tolist() for name in opened.keys()}  # noqa: SIM118
    return found
