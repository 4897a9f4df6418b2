"""SavePretrained's tokenizer: given, found on the data module or the module, or missing with a warning."""

import warnings

import pytest
import torch
from torch.utils.data import DataLoader

from moe_precision import CheckpointError
from moe_precision.callbacks import SavePretrained
from moe_precision.checkpoints.tokenizer import load_tokenizer
from moe_precision.recipes.text_data import train_tokenizer
from tests.support.models import build
from tests.support.trainers import Language, trainer


def saved_by(tmp_path, saver, module):
    tokens = DataLoader(torch.randint(3, 128, (2, 8)), batch_size=2)
    trainer(tmp_path, saver).fit(module, tokens)
    return tmp_path / "checkpoint"


@pytest.fixture
def tokenizer():
    return train_tokenizer(["some words and some more"], 300)


@pytest.mark.slow
def test_a_given_tokenizer_is_saved(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "elsewhere")
    for given in (tokenizer, str(tmp_path / "elsewhere")):
        folder = saved_by(tmp_path, SavePretrained(tokenizer=given), Language())
        assert load_tokenizer(folder).get_vocab() == tokenizer.get_vocab()


def test_the_modules_own_tokenizer_is_found(tmp_path, tokenizer):
    module = Language()
    module.tokenizer = tokenizer
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="SavePretrained")
        folder = saved_by(tmp_path, SavePretrained(), module)
    assert load_tokenizer(folder).get_vocab() == tokenizer.get_vocab()


def test_a_missing_tokenizer_is_said_and_the_model_is_saved(tmp_path):
    module = Language()
    module.tokenizer = str.split  # of another library: it cannot be saved, and must not lose the model
    with pytest.warns(UserWarning, match=r"holds no tokenizer.*SavePretrained\(tokenizer=...\)"):
        folder = saved_by(tmp_path, SavePretrained(), module)
    assert (folder / "model.safetensors").is_file()


def test_what_is_no_tokenizer_is_refused_before_training(tmp_path):
    build("qwen3_moe").save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="is empty"):
        SavePretrained(tokenizer=str(tmp_path / "model"))
    with pytest.raises(ValueError, match="tokenizer must be a transformers tokenizer"):
        SavePretrained(tokenizer=str.split)


def test_shards_that_nobody_can_put_together_are_refused_at_the_start(tmp_path):
    module = Language()
    next(module.parameters()).ds_id = 0  # as DeepSpeed ZeRO-3 marks its placeholders
    with pytest.raises(ValueError, match="cannot put together the shards of FSDP1 or DeepSpeed ZeRO-3"):
        saved_by(tmp_path, SavePretrained(), module)
    assert not list((tmp_path / "checkpoint").glob("*"))
