"""A tokenizer that knows no text is refused, whatever transformers makes of a folder without one."""

import pytest
from transformers import PreTrainedTokenizerFast

from moe_precision import CheckpointError
from moe_precision.checkpoints.tokenizer import load_tokenizer
from moe_precision.recipes import TextDataModule
from moe_precision.recipes.text_data import train_tokenizer
from tests.support.models import build


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe", "switch_transformers", "gpt_oss", "deepseek_v3"])
def test_a_checkpoint_without_a_tokenizer_is_refused(family, tmp_path):
    build(family).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"(is empty|no tokenizer could be loaded).*--tokenizer FOLDER or NAME"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_of_four_letters_is_one(tmp_path):
    train_tokenizer(["ACGT" * 9], 300).save_pretrained(tmp_path)
    letters = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)("ACGT")["input_ids"] == letters("ACGT")["input_ids"]
    from tokenizers import Tokenizer, models, pre_tokenizers

    bases = Tokenizer(models.WordLevel({"<unk>": 0, "A": 1, "C": 2, "G": 3, "T": 4}, unk_token="<unk>"))
    bases.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=bases, unk_token="<unk>").save_pretrained(tmp_path / "bases")
    assert load_tokenizer(tmp_path / "bases")("ACT")["input_ids"] == [1, 2, 4]


def test_data_modules_refuse_it_too(tmp_path):
    build("qwen3_moe").save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("some words " * 99)
    with pytest.raises(CheckpointError, match="'hello world' gives no ids"):
        TextDataModule(str(tmp_path / "text.txt"), tokenizer=str(tmp_path / "model")).setup()
