"""What every test shares: an environment without networks, and the fixtures. Models are in `support/models.py`.

Torch and transformers are imported where they are used: pytest-xdist's first process needs neither, and imports this
file before it starts the others.
"""

from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; processes that tests start have it too
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels for GPUs run on the CPU

import pytest
from filelock import FileLock

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever needs the trained model is slow."""
    for item in items:
        if "trained" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """What collecting has imported stays: garbage collections, which trainers ask for, need not look through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def few_calibration_tokens() -> None:
    """Costs are calibrated on few tokens: batches are so small here that the usual number takes hundreds of passes."""
    from tests.support.processes import calibrate_on_few_tokens

    calibrate_on_few_tokens()


@pytest.fixture
def mixtral() -> PreTrainedModel:
    from tests.support.models import build

    return build("mixtral")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Tensor]:
    """A small Mixtral after 200 steps on real text, and held-out blocks; do not change its weights for good.

    Of several pytest-xdist workers the first trains it, and the others read what it left.
    """
    import torch

    from tests.support.models import build, train_on_stdlib

    model = build("mixtral", vocab_size=256, num_hidden_layers=3, initializer_range=0.08)
    base = tmp_path_factory.getbasetemp()
    saved = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "trained.pt"
    with FileLock(f"{saved}.lock"):
        if saved.exists():
            state, held_out = torch.load(saved)
            model.load_state_dict(state)
            return model, held_out
        held_out = train_on_stdlib(model, 200)
        torch.save((model.state_dict(), held_out), saved)
    return model, held_out
