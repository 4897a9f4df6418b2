"""What tests of several commands need: a checkpoint that a dataset goes with."""

import pytest

from moe_precision.recipes import TextDataModule
from tests.cli.test_cli import TEXT
from tests.support.models import build


@pytest.fixture
def model_with_text(tmp_path):
    """A model, saved with its tokenizer as ``model`` beside ``text.txt``."""
    (tmp_path / "text.txt").write_text(TEXT)
    text = TextDataModule(dataset=str(tmp_path / "text.txt"), vocab_size=300)
    text.setup("validate")
    model = build("mixtral", vocab_size=len(text.tokenizer))
    model.save_pretrained(tmp_path / "model")
    text.tokenizer.save_pretrained(tmp_path / "model")
    return model
