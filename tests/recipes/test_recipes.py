"""The recipes: text split by file, packing, span corruption by hand, two steps of each module, every shipped YAML."""

import math
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from transformers import PreTrainedTokenizerFast

import moe_precision.recipes
from moe_precision import allocate
from moe_precision.cli.lightning_cli import FitCLI
from moe_precision.recipes import CausalLM, Seq2SeqLM, SummarizationDataModule, TextDataModule
from moe_precision.recipes.causal_lm import load_balancing_loss, reach_all_experts, warmup_cosine
from moe_precision.recipes.corpus import (
    functions_with_summaries,
    load_text,
    python_stdlib,
    summarization_pairs,
)
from moe_precision.recipes.local_text import validation_paths
from moe_precision.recipes.seq2seq_data import corrupt_spans, random_span_mask
from moe_precision.recipes.text_data import pack, tokenize, train_tokenizer
from tests.support.models import build

FUNCTION = '''
def add_{i}(left, right):
    """Add {i} to two numbers.

    More words.
    """
    total = left + right
    return total + {i}
'''
MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 4,
    "router_aux_loss_coef": 0.5,
}
SWITCH = {
    "model_type": "switch_transformers",
    "d_model": 16,
    "d_ff": 32,
    "d_kv": 8,
    "num_heads": 2,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
    "num_experts": 4,
    "dropout_rate": 0.0,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve small Python files."""
    source = tmp_path / "source"
    source.mkdir()
    for i in range(12):
        (source / f"module_{i}.py").write_text(FUNCTION.format(i=i) * 3, encoding="utf-8")
    return source


def quiet_trainer(root: Path, **kwargs) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=root,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )


# --- corpus ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_standard_library_splits_by_file_without_overlap_and_the_same_way_twice():
    first, second = python_stdlib(), python_stdlib()
    train, validation = set(first["train"]["path"]), set(first["validation"]["path"])
    assert len(train) > 300
    assert not train & validation
    assert len(validation) == math.ceil(0.1 * (len(train) + len(validation)))
    assert not any(path.startswith(("test/", "encodings/")) or "site-packages" in path for path in train | validation)
    assert first["validation"]["path"] == second["validation"]["path"]


def test_validation_files_depend_on_paths_alone():
    paths = [f"{i}.py" for i in range(25)]
    assert validation_paths(paths) == validation_paths(reversed(paths))
    assert len(validation_paths(paths)) == 3  # a tenth, rounded up


def test_local_files_folder_and_glob(folder: Path):
    for dataset in (str(folder), str(folder / "*.py")):
        text = load_text(dataset)
        assert (len(text["train"]), len(text["validation"])) == (10, 2)
        assert not set(text["train"]["path"]) & set(text["validation"]["path"])


def test_one_local_file_is_split_by_position(tmp_path: Path):
    file = tmp_path / "one.txt"
    file.write_text("0123456789" * 2, encoding="utf-8")
    text = load_text(str(file))
    assert text["train"]["text"][0] == "012345678901234567"
    assert text["validation"]["text"][0] == "89"


def test_text_that_cannot_be_used_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="holds no file"):
        load_text(str(tmp_path))
    with pytest.raises(ValueError, match="no local file, folder or glob matches"):
        load_text(str(tmp_path / "missing" / "*.txt"))
    (tmp_path / "binary.bin").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match=r"binary\.bin.* is not UTF-8"):
        load_text(str(tmp_path))


def test_function_is_cut_out_without_its_docstring():
    source = (
        "class A:\n"
        "    def method(self):\n"
        '        """Return one.\n\n        At length.\n        """\n'
        "        return 1\n\n"
        "def bare():\n    return 2\n\n"
        'def only_docstring():\n    """Nothing else."""\n\n'
        'def one_line(): "Too short."; return 3\n'
    )
    assert functions_with_summaries(source) == [("def method(self):\n    return 1", "Return one.")]
    assert functions_with_summaries("def broken(:") == []


def test_summarization_pairs_keep_the_split(folder: Path):
    pairs = summarization_pairs(str(folder))
    assert (len(pairs["train"]), len(pairs["validation"])) == (30, 6)
    assert not set(pairs["train"]["summary"]) & set(pairs["validation"]["summary"])
    assert not any('"""' in document for document in pairs["train"]["document"])


def test_files_without_documented_functions_are_an_error(tmp_path: Path):
    for name in "ab":
        (tmp_path / f"{name}.py").write_text("x = 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no Python function with a docstring"):
        summarization_pairs(str(tmp_path))


# --- tokens ---------------------------------------------------------------------------------------------------------


def test_packing_loses_no_token():
    input_ids, labels = pack(torch.arange(10, 17), sequence_length=3, pad_token_id=0)
    assert input_ids.tolist() == [[10, 11, 12], [13, 14, 15], [16, 0, 0]]
    assert labels.tolist() == [[10, 11, 12], [13, 14, 15], [16, -100, -100]]


def test_tokenizing_ends_each_text_and_stops_at_the_limit():
    tokenizer = train_tokenizer(["some words and some more words"] * 20, 300)
    tokens = tokenize(["some words", "été"], tokenizer)
    assert tokenizer.decode(tokens.tolist()) == "some words<eos>été<eos>"
    assert tokenize(["some words", "été"], tokenizer, max_tokens=3).tolist() == tokens[:3].tolist()


def test_text_module_batches_and_counts(folder: Path):
    data = TextDataModule(str(folder), vocab_size=300, sequence_length=32, batch_size=4)
    data.setup("fit")
    tokenizer = data.tokenizer
    data.setup("validate")
    assert data.tokenizer is tokenizer  # a second setup does nothing
    batches = list(data.train_dataloader())
    assert batches[0]["input_ids"].shape == batches[0]["labels"].shape == (4, 32)
    labels = torch.cat([batch["labels"].flatten() for batch in batches])
    counts = torch.bincount(labels[labels != -100], minlength=len(tokenizer))
    assert data.token_counts.dtype == torch.long
    assert data.token_counts.tolist() == counts.tolist()
    assert int(data.token_counts[tokenizer.eos_token_id]) == 10  # one for each training file
    again = TextDataModule(str(folder), vocab_size=300, sequence_length=32, batch_size=4)
    again.setup("fit")
    assert torch.equal(next(iter(again.train_dataloader()))["input_ids"], batches[0]["input_ids"])


def test_saved_tokenizer_gives_the_same_validation_blocks(folder: Path, tmp_path: Path):
    args = {"dataset": str(folder), "vocab_size": 300, "sequence_length": 32}
    first = TextDataModule(**args)
    first.setup("validate")
    first.tokenizer.save_pretrained(tmp_path / "tokenizer")
    second = TextDataModule(**args, tokenizer=str(tmp_path / "tokenizer"))
    second.setup("validate")
    for left, right in zip(first.val_dataloader(), second.val_dataloader(), strict=True):
        assert torch.equal(left["input_ids"], right["input_ids"])


# --- span corruption ------------------------------------------------------------------------------------------------


def test_spans_are_corrupted_as_worked_out_by_hand():
    tokens = torch.tensor([[10, 11, 12, 13, 14, 15, 16, 17], [20, 21, 22, 23, 24, 25, 26, 27]])
    mask = torch.tensor([[0, 1, 1, 0, 0, 0, 0, 1], [0, 0, 0, 1, 0, 0, 1, 1]]).bool()
    inputs, targets = corrupt_spans(tokens, mask, torch.tensor([90, 91, 92]), eos_token_id=1)
    assert inputs.tolist() == [[10, 90, 13, 14, 15, 16, 91, 1], [20, 21, 22, 90, 24, 25, 91, 1]]
    assert targets.tolist() == [[90, 11, 12, 91, 17, 1], [90, 23, 91, 26, 27, 1]]


def test_span_mask_has_the_density_and_mean_length_of_t5():
    mask = random_span_mask(64, 100, torch.Generator().manual_seed(0))
    starts = mask & ~torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    assert mask.shape == (64, 100)
    assert mask.sum(1).unique().tolist() == [15]  # 15 % of 100
    assert starts.sum(1).unique().tolist() == [5]  # spans of 3 on average
    assert not mask[:, 0].any()
    assert mask[:, -1].all()
    assert len(mask.unique(dim=0)) > 60
    assert random_span_mask(2, 2).tolist() == [[False, True]] * 2


def test_more_spans_than_sentinels_are_an_error():
    with pytest.raises(ValueError, match="2 noise spans, but there are 1 sentinels"):
        corrupt_spans(torch.arange(4)[None], torch.tensor([[0, 1, 0, 1]]).bool(), torch.tensor([90]), 1)


# --- models ---------------------------------------------------------------------------------------------------------


def test_learning_rate_rises_then_falls_to_a_tenth():
    assert warmup_cosine(0, 3, 13) == 0.25
    assert warmup_cosine(3, 3, 13) == 1.0
    assert warmup_cosine(8, 3, 13) == pytest.approx(0.55)  # half way down: 0.1 + 0.9 / 2
    assert warmup_cosine(13, 3, 13) == warmup_cosine(99, 3, 13) == pytest.approx(0.1)


def test_load_balancing_loss_looks_at_each_layer():
    left = torch.tensor([[9.0, -9.0]]).expand(5, 2)  # every token to expert 0
    assert load_balancing_loss([torch.zeros(5, 2)], top_k=2).item() == pytest.approx(2.0)
    assert load_balancing_loss([left], top_k=1).item() == pytest.approx(2.0, abs=1e-4)
    assert load_balancing_loss([left, -left], top_k=1).item() == pytest.approx(2.0, abs=1e-4)  # balanced only together


@pytest.mark.parametrize("module", [CausalLM, Seq2SeqLM])
def test_exactly_one_of_config_and_checkpoint(module: type[pl.LightningModule]):
    with pytest.raises(ValueError, match="expected exactly one"):
        module()
    with pytest.raises(ValueError, match="expected exactly one"):
        module(config=MIXTRAL, checkpoint="somewhere")
    with pytest.raises(ValueError, match="'model_type'"):
        module(config={"hidden_size": 8})


@pytest.mark.slow
def test_causal_lm_trains_and_goes_on_from_its_checkpoint(folder: Path, tmp_path: Path):
    data = TextDataModule(str(folder), vocab_size=300, sequence_length=32, batch_size=4)
    module = CausalLM(config=MIXTRAL, warmup_steps=1)
    trainer = quiet_trainer(tmp_path, max_steps=2, val_check_interval=2, check_val_every_n_epoch=None)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 2
    metrics = trainer.callback_metrics
    assert module.model.config.vocab_size == len(data.tokenizer)
    # The plain cross-entropy: near log(vocabulary) for a new model, without 0.5 * (a balancing loss of at least 2).
    assert float(metrics["val_loss"]) == pytest.approx(math.log(len(data.tokenizer)), abs=0.3)
    assert float(metrics["train_loss"]) > float(metrics["val_loss"]) + 0.7
    assert float(metrics["val_perplexity"]) == pytest.approx(math.exp(float(metrics["val_loss"])), rel=1e-4)

    module.model.save_pretrained(tmp_path / "checkpoint")
    data.tokenizer.save_pretrained(tmp_path / "checkpoint")
    again = CausalLM(checkpoint=str(tmp_path / "checkpoint"))
    after = TextDataModule(str(folder), tokenizer=str(tmp_path / "checkpoint"), sequence_length=32, batch_size=4)
    (result,) = quiet_trainer(tmp_path).validate(again, datamodule=after, verbose=False)
    (expected,) = quiet_trainer(tmp_path).validate(module, datamodule=data, verbose=False)
    assert result["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-5)


def test_causal_lm_without_a_data_module_says_so(tmp_path: Path):
    with pytest.raises(ValueError, match="got no data module with a tokenizer"):
        quiet_trainer(tmp_path, max_steps=1).fit(CausalLM(config=MIXTRAL), train_dataloaders=[0])


@pytest.mark.slow
def test_seq2seq_pretrains_once_then_summarizes(folder: Path, tmp_path: Path):
    def fit(pretrain_steps: int) -> tuple[pl.Trainer, float]:
        data = SummarizationDataModule(str(folder), vocab_size=400, max_source_length=48, max_target_length=8)
        module = Seq2SeqLM(
            config=SWITCH,
            pretrain_steps=pretrain_steps,
            pretrain_batch_size=4,
            pretrain_sequence_length=32,
            rouge_examples=3,
            warmup_steps=1,
        )
        trainer = quiet_trainer(tmp_path, max_steps=2, val_check_interval=2, check_val_every_n_epoch=None)
        trainer.fit(module, datamodule=data)
        assert trainer.global_step == 2
        assert isinstance(data.tokenizer, PreTrainedTokenizerFast)
        return trainer, (tmp_path / "pretrained" / "model.safetensors").stat().st_mtime_ns

    trainer, written = fit(pretrain_steps=2)
    assert {"train_loss", "val_loss", "val_rouge1", "val_rouge2", "val_rougeL"} <= set(trainer.callback_metrics)
    assert fit(pretrain_steps=2)[1] == written  # found, not trained again
    assert fit(pretrain_steps=1)[1] != written  # other settings, so another model
    assert not list(tmp_path.glob("pretrained-unfinished-*"))


def test_summarization_batches_are_padded(folder: Path):
    data = SummarizationDataModule(str(folder), vocab_size=400, max_source_length=16, max_target_length=8, batch_size=4)
    data.setup()
    batch = next(iter(data.val_dataloader()))
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (4, 16)
    assert batch["labels"].shape[1] <= 8
    assert ((batch["labels"] == data.tokenizer.eos_token_id).sum(1) == 1).all()
    assert data.pretraining_blocks(32, max_tokens=100).shape == (3, 32)


def test_tokenizer_without_sentinels_is_an_error(folder: Path, tmp_path: Path):
    train_tokenizer(["some words"], 300).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="lacks 100 of the sentinels"):
        SummarizationDataModule(str(folder), tokenizer=str(tmp_path / "tokenizer")).setup()


# --- the shipped YAML -----------------------------------------------------------------------------------------------

RECIPES = Path(moe_precision.recipes.__path__[0])
YAML_FILES = sorted(RECIPES.glob("*.yaml"))


def test_recipes_are_shipped():
    assert {file.name for file in YAML_FILES} >= {"pretrain_mixtral.yaml", "finetune_switch.yaml"}


@pytest.mark.slow
@pytest.mark.parametrize("file", YAML_FILES, ids=lambda file: file.name)
def test_shipped_yaml_builds(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["pytest"])  # LightningCLI warns where there are arguments other than its own
    monkeypatch.setenv("WANDB_MODE", "offline")
    if file.name == "recover.yaml":  # starts from another recipe's result
        Path("runs/pretrain_mixtral").mkdir(parents=True)
        plan = allocate(build("mixtral"), method="uniform", average_bits=2, group_size=64)
        plan.save("runs/pretrain_mixtral/precision_plan.json")
    cli = FitCLI(args=["--config", str(file)], run=False)  # what `fit --config` builds
    config = cli.model.hparams["config"] or {}
    widths = [config[key] for key in ("hidden_size", "intermediate_size", "d_model", "d_ff") if key in config]
    ours = ("RouterNormMonitor", "PrecisionAnneal")
    (callback,) = [c for c in cli.trainer.callbacks if type(c).__name__ in ours]
    assert all(width % callback.settings.group_size == 0 for width in widths)
    assert type(cli.trainer.logger).__name__ == "WandbLogger"


def test_experts_without_a_token_get_a_gradient():
    """Otherwise processes wait for each other: each thinks that other experts were used."""
    batch = {"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[7, 8]])}
    losses, gradients = [], []
    for reach in (False, True):
        model = build("switch_transformers").train()
        if reach:
            reach_all_experts(model)
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        experts = {name: p.grad for name, p in model.named_parameters() if "experts" in name}
        gradients.append(experts)
    assert losses[0] == losses[1]
    assert any(gradient is None for gradient in gradients[0].values())
    for name, gradient in gradients[1].items():
        expected = gradients[0][name]
        torch.testing.assert_close(gradient, torch.zeros_like(gradient) if expected is None else expected)
