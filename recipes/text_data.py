"""Blocks of tokens for causal language models: text in, a tokenizer if none is given, packed blocks out.

Runs without a Trainer too: `data = TextDataModule(); data.setup("validate"); data.val_dataloader()`. It never writes a
file.
"""

import random
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.utils.data import DataLoader, StackDataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moe_precision.checkpoints.tokenizer import load_tokenizer as tokenizer_of
from moe_precision.recipes.corpus import STDLIB, held_out_name, load_text

IGNORED = -100  # the label that transformers' losses leave out
NO_TRAINING_TEXT = "there is no training text beside the held-out text: give a dataset (--dataset) too"
TOKENIZER_SAMPLE_CHARS = 3_000_000  # enough for a few thousand merges, and a second of work
FILES_PER_CALL = 16

Batch = dict[str, Tensor]


def train_tokenizer(
    texts: list[str], vocab_size: int, extra_tokens: list[str] | None = None
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; the same texts give the same tokenizer.

    Args:
        texts: Training texts; the first `TOKENIZER_SAMPLE_CHARS` characters are used.
        vocab_size: Number of tokens, the special ones included; small texts may give fewer.
        extra_tokens: Special tokens in addition to `<pad>` (id 0) and `<eos>` (id 1).

    Returns:
        A tokenizer that knows every byte, so it needs no unknown token. It adds no special token on its own.
    """
    special = ["<pad>", "<eos>", *(extra_tokens or [])]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first_chars(texts, TOKENIZER_SAMPLE_CHARS), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
        additional_special_tokens=extra_tokens or [],
    )


def _first_chars(texts: list[str], limit: int) -> Iterator[str]:
    for text in texts:
        if limit <= 0:
            return
        yield text[:limit]
        limit -= len(text)


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load a pretrained tokenizer from a folder or by name; one without a padding token pads with its eos token.

    Raises:
        CheckpointError: There is none, or an empty one.
        ValueError: The tokenizer has no end-of-sequence token, which the recipes put between texts.
    """
    tokenizer = tokenizer_of(path)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {path!r} has no eos token; give one that has: the recipes end every text with it")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenize(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None, desc: str = "tokenizing"
) -> Tensor:
    """Tokenize texts into one long row, each text followed by the eos token.

    Args:
        texts: The texts, in the order of the row.
        tokenizer: Must have an eos token.
        max_tokens: Stop once there are this many tokens; the row is cut there. None keeps all.
        desc: Label of the progress bar.

    Returns:
        int64, (tokens,).
    """
    pieces: list[Tensor] = []
    count = 0
    with tqdm(total=len(texts), desc=desc, unit="text", leave=False) as progress:
        for start in range(0, len(texts), FILES_PER_CALL):
            if max_tokens is not None and count >= max_tokens:
                break
            chunk = texts[start : start + FILES_PER_CALL]
            for ids in tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]:
                pieces.append(torch.tensor([*ids, tokenizer.eos_token_id]))
                count += len(ids) + 1
            progress.update(len(chunk))
    tokens = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.long)
    return tokens[:max_tokens]


def pack(tokens: Tensor, sequence_length: int, pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Cut a row of tokens into blocks; only the last block is padded, and no token is lost.

    Args:
        tokens: int64, (tokens,).
        sequence_length: Tokens per block.
        pad_token_id: Fills the last block.

    Returns:
        `input_ids` and `labels`, both int64, (blocks, sequence_length). Labels are the inputs, not shifted (the model
        does that), with -100 on the padding.
    """
    padding = -len(tokens) % sequence_length
    input_ids = torch.nn.functional.pad(tokens, (0, padding), value=pad_token_id)
    labels = torch.nn.functional.pad(tokens, (0, padding), value=IGNORED)
    return input_ids.view(-1, sequence_length), labels.view(-1, sequence_length)


def _checkpoint_of(data: pl.LightningDataModule) -> str | None:
    """The checkpoint that the module of a data module's Trainer begins with; None without any."""
    module = None if data.trainer is None else data.trainer.lightning_module
    return None if module is None else module.hparams.get("checkpoint")


def shuffled_texts(rows: Dataset, seed: int) -> list[str]:
    """Return the column `text` in a seeded order, so that a cut at some number of tokens is a fair sample."""
    texts = list(rows["text"])
    random.Random(seed).shuffle(texts)
    return texts


class TextDataModule(pl.LightningDataModule):
    """Packed blocks of text for a causal language model.

    A batch is a dict with `input_ids` and `labels`, both int64, (batch, sequence_length). After `setup`, `tokenizer` is
    the tokenizer, `judged_on` names the validation text with its documents and tokens, and `token_counts`, int64,
    (vocab,), says how often each token occurs in the training blocks (in the held-out text, if there is no other).

    Args:
        dataset: "python-stdlib", a local file, folder or glob of text or tables, or a name for
            `datasets.load_dataset`. None, with `heldout` and a tokenizer, for no training text.
        dataset_config: The configuration's name, for a `datasets` name only.
        text_column: The column that holds the text, for tables and `datasets` names.
        tokenizer: Path or name of a pretrained tokenizer. None takes that of the checkpoint that is trained, if the
            module has one (`CausalLM(checkpoint=...)`), else trains a byte-level BPE on the training split.
        vocab_size: Size of the tokenizer that is trained here; ignored where one is given.
        sequence_length: Tokens in a block.
        batch_size: Blocks in a batch, on each device.
        num_workers: Processes of each DataLoader. The blocks are in memory, so 0 is fast.
        max_train_tokens: Use at most this many tokens of the training split, sampled by the seed. None uses all.
        max_val_tokens: At most this many tokens of the validation split, likewise.
        seed: Order of the texts and of the training batches.
        heldout: A local file, folder or glob that is the validation text, all of it, instead of a part of `dataset`.

    Raises:
        ValueError: The dataset or tokenizer cannot be used, or a split is shorter than one block needs to be.
    """

    def __init__(
        self,
        dataset: str | None = STDLIB,
        dataset_config: str | None = None,
        text_column: str = "text",
        tokenizer: str | None = None,
        vocab_size: int = 4096,
        sequence_length: int = 256,
        batch_size: int = 16,
        num_workers: int = 0,
        max_train_tokens: int | None = None,
        max_val_tokens: int | None = None,
        seed: int = 0,
        heldout: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.judged_on = ""
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.token_counts: Tensor | None = None
        self._blocks: dict[str, StackDataset[Any]] = {}

    def setup(self, stage: str | None = None) -> None:
        """Load, tokenize and pack both splits; a second call does nothing."""
        if self._blocks:
            return
        args = self.hparams
        text = load_text(args["dataset"], args["dataset_config"], args["text_column"], args["heldout"])
        texts = {split: shuffled_texts(text[split], args["seed"]) for split in ("train", "validation") if split in text}
        limits = {"train": args["max_train_tokens"], "validation": args["max_val_tokens"]}
        name = held_out_name(args["dataset"], args["dataset_config"], args["heldout"])
        if (source := args["tokenizer"] or _checkpoint_of(self)) is not None:
            self.tokenizer = load_tokenizer(source)
        elif "train" in texts:
            self.tokenizer = train_tokenizer(texts["train"], args["vocab_size"])
        else:
            raise ValueError("a tokenizer is trained on training text: give a dataset, or a tokenizer")
        blocks = {}
        for split in texts:
            tokens = tokenize(texts[split], self.tokenizer, limits[split], f"tokenizing {split}")
            if len(tokens) < 2:
                of = name if split == "validation" else f"the train split of dataset {args['dataset']!r}"
                raise ValueError(f"{of} has {len(tokens)} tokens; give more text")
            if split == "train" or len(texts) == 1:
                self.token_counts = torch.bincount(tokens, minlength=len(self.tokenizer))  # (vocab,)
            if split == "validation":
                self.judged_on = f"{name}: {len(texts[split]):,} documents, {len(tokens):,} tokens"
            input_ids, labels = pack(tokens, args["sequence_length"], self.tokenizer.pad_token_id)
            blocks[split] = StackDataset(input_ids=input_ids, labels=labels)  # type: ignore[arg-type]  # tensors do
        self._blocks = blocks

    def _dataloader(self, split: str, generator: torch.Generator | None = None) -> DataLoader[Batch]:
        return DataLoader(
            self._blocks[split],
            batch_size=self.hparams["batch_size"],
            shuffle=generator is not None,
            generator=generator,
            num_workers=self.hparams["num_workers"],
            persistent_workers=self.hparams["num_workers"] > 0,
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the training blocks in a seeded random order.

        Raises:
            ValueError: There is no training text.
        """
        if "train" not in self._blocks:
            raise ValueError(NO_TRAINING_TEXT)
        return self._dataloader("train", torch.Generator().manual_seed(self.hparams["seed"]))

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the validation blocks in a fixed order."""
        return self._dataloader("validation")
