"""What every test shares: an environment without networks, and the fixtures. Models are in `support/models.py`."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels for GPUs run on the CPU

import pytest
from torch import Tensor
from transformers import PreTrainedModel

from tests.support.models import build, train_on_stdlib


@pytest.fixture
def mixtral() -> PreTrainedModel:
    return build("mixtral")


@pytest.fixture(scope="session")
def trained() -> tuple[PreTrainedModel, Tensor]:
    """A small Mixtral after 200 steps on real text, and held-out blocks; do not change its weights for good."""
    model = build("mixtral", vocab_size=256, num_hidden_layers=3, initializer_range=0.08)
    return model, train_on_stdlib(model, 200)
