"""Documents and summaries for a sequence-to-sequence model, and the T5 span corruption that it is pretrained with.

The arithmetic of span corruption is in two pure functions on tensors; the data module only loads, tokenizes and pads.
"""

import random

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from moe_precision.recipes.corpus import STDLIB, held_out_name, load_text, summarization_pairs
from moe_precision.recipes.text_data import (
    IGNORED,
    NO_TRAINING_TEXT,
    load_tokenizer,
    pack,
    shuffled_texts,
    tokenize,
    train_tokenizer,
)

SENTINELS = [f"<extra_id_{i}>" for i in range(100)]
NOISE_DENSITY = 0.15
MEAN_SPAN_LENGTH = 3.0
EXAMPLES_PER_CALL = 256

Example = tuple[list[int], list[int]]  # token ids of the document and of the summary

Batch = dict[str, Tensor]


def random_span_mask(rows: int, length: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw which tokens are noise: 15 % of each row, in spans of 3 tokens on average (T5, arXiv 1910.10683, 3.3.4).

    Every row starts with a kept token, ends with a noise span, and has as many noise tokens and spans as the others.

    Args:
        rows: Number of rows, B.
        length: Tokens in a row, T, at least 2.
        generator: Source of randomness; None is torch's global one.

    Returns:
        bool, (B, T), True where the token is noise.
    """
    noise = min(max(round(length * NOISE_DENSITY), 1), length - 1)
    spans = min(max(round(noise / MEAN_SPAN_LENGTH), 1), noise, length - noise)
    kept_lengths = _random_segments(rows, length - noise, spans, generator)  # (B, S)
    noise_lengths = _random_segments(rows, noise, spans, generator)  # (B, S)
    ends = torch.stack([kept_lengths, noise_lengths], dim=2).flatten(1).cumsum(1)  # (B, 2 S)
    positions = torch.arange(length).expand(rows, -1).contiguous()  # (B, T)
    return torch.searchsorted(ends, positions, right=True) % 2 == 1  # segments alternate: kept, noise, kept, …


def _random_segments(rows: int, items: int, segments: int, generator: torch.Generator | None) -> Tensor:
    """Cut `items` into `segments` parts of at least one item, uniformly: int64, (rows, segments)."""
    cuts = torch.rand(rows, items - 1, generator=generator).argsort(1)[:, : segments - 1] + 1  # (B, S - 1)
    first, last = torch.zeros(rows, 1, dtype=torch.long), torch.full((rows, 1), items)
    return torch.cat([first, cuts.sort(1).values, last], dim=1).diff(dim=1)


def corrupt_spans(tokens: Tensor, mask: Tensor, sentinel_ids: Tensor, eos_token_id: int) -> tuple[Tensor, Tensor]:
    """Replace each noise span by a sentinel; the target lists the sentinels with what they stand for.

    Tokens `a b c d e` with noise `b c` and `e` give the input `a <0> d <1> eos` and the target `<0> b c <1> e eos`.

    Args:
        tokens: int64, (B, T).
        mask: bool, (B, T), True where noise; each row with as many noise tokens and spans as the others.
        sentinel_ids: int64, (sentinels,), the token for the first span, the second, and so on.
        eos_token_id: Ends both rows.

    Returns:
        Inputs, int64, (B, T - noise + spans + 1), and targets, int64, (B, noise + spans + 1).

    Raises:
        ValueError: A row has more spans than there are sentinels.
    """
    rows = len(tokens)
    starts = mask & ~torch.nn.functional.pad(mask, (1, 0))[:, :-1]  # (B, T), the first token of each span
    spans = int(starts.sum(1).max())
    if spans > len(sentinel_ids):
        raise ValueError(
            f"a row has {spans} noise spans, but there are {len(sentinel_ids)} sentinels; shorten the rows"
        )
    sentinels = sentinel_ids[(starts.cumsum(1) - 1).clamp(min=0)]  # (B, T), that of the current span
    inputs = torch.where(starts, sentinels, tokens)[~mask | starts].view(rows, -1)
    pairs, chosen = torch.stack([sentinels, tokens], dim=2), torch.stack([starts, mask], dim=2)  # (B, T, 2)
    targets = pairs[chosen].view(rows, -1)
    eos = tokens.new_full((rows, 1), eos_token_id)
    return torch.cat([inputs, eos], dim=1), torch.cat([targets, eos], dim=1)


class SummarizationDataModule(pl.LightningDataModule):
    """Documents to summarize; from Python source, a function and the first line of its docstring.

    A batch is a dict with `input_ids` and `attention_mask`, int64, (batch, document), and `labels`, int64, (batch,
    summary), -100 on the padding; both are as long as the longest in the batch. After `setup`, `tokenizer` is the
    tokenizer, `judged_on` names the validation text with its documents and tokens, and `token_counts`, int64, (vocab,),
    says how often each token occurs in the training summaries (in the held-out ones, if there are no others).
    `pretraining_blocks` gives running text of the same training split for span corruption.

    Args:
        dataset: "python-stdlib", a local file, folder or glob of Python source or tables, or a name for
            `datasets.load_dataset`. None, with `heldout` and a tokenizer, for no training text.
        dataset_config: The configuration's name, for a `datasets` name only.
        document_column: The column to summarize, for tables and `datasets` names.
        summary_column: The column with the summaries, likewise.
        tokenizer: Path or name of a pretrained tokenizer with the sentinels <extra_id_0> to <extra_id_99>. None trains
            a byte-level BPE on the training split.
        vocab_size: Size of the tokenizer that is trained here, sentinels included; ignored where one is given.
        max_source_length: Longer documents are cut to this many tokens.
        max_target_length: Longer summaries are cut to this many tokens.
        batch_size: Documents in a batch, on each device.
        num_workers: Processes of each DataLoader. The examples are in memory, so 0 is fast.
        max_train_examples: Use at most this many training documents, a seeded sample. None uses all.
        max_val_examples: At most this many validation documents, likewise.
        seed: Order of the examples and of the training batches.
        heldout: Local files that are the validation text, all of them, instead of a part of `dataset`.

    Raises:
        ValueError: The dataset cannot be used, or the tokenizer has no eos token or no sentinels.
    """

    def __init__(
        self,
        dataset: str | None = STDLIB,
        dataset_config: str | None = None,
        document_column: str = "document",
        summary_column: str = "summary",
        tokenizer: str | None = None,
        vocab_size: int = 4096,
        max_source_length: int = 128,
        max_target_length: int = 32,
        batch_size: int = 16,
        num_workers: int = 0,
        max_train_examples: int | None = None,
        max_val_examples: int | None = None,
        seed: int = 0,
        heldout: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.judged_on = ""
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.token_counts: Tensor | None = None
        self._examples: dict[str, list[Example]] = {}

    def setup(self, stage: str | None = None) -> None:
        """Load and tokenize both splits; a second call does nothing."""
        if self._examples:
            return
        args = self.hparams
        if args["tokenizer"] is None:
            self.tokenizer = train_tokenizer(self._running_text(), args["vocab_size"], SENTINELS)
        else:
            self.tokenizer = load_tokenizer(args["tokenizer"])
        _sentinel_ids(self.tokenizer)
        sources = args["dataset"], args["dataset_config"]
        pairs = summarization_pairs(*sources, args["document_column"], args["summary_column"], args["heldout"])
        limits = {"train": args["max_train_examples"], "validation": args["max_val_examples"]}
        examples = {}
        for split, limit in limits.items():
            if split not in pairs:
                continue
            rows = list(zip(pairs[split]["document"], pairs[split]["summary"], strict=True))
            random.Random(args["seed"]).shuffle(rows)
            examples[split] = self._tokenize(rows[:limit], split)
        self._examples = examples
        held_out = examples["validation"]
        tokens = sum(len(summary) for _, summary in held_out)
        name = held_out_name(*sources, args["heldout"])
        self.judged_on = f"{name}: {len(held_out):,} documents, {tokens:,} tokens of their summaries"
        counted = examples.get("train", held_out)
        summaries = torch.tensor([token for _, summary in counted for token in summary])
        self.token_counts = torch.bincount(summaries, minlength=len(self.tokenizer))  # (vocab,)

    def _running_text(self) -> list[str]:
        args = self.hparams
        if args["dataset"] is None:
            raise ValueError(NO_TRAINING_TEXT)
        return shuffled_texts(
            load_text(args["dataset"], args["dataset_config"], args["document_column"])["train"], args["seed"]
        )

    def _tokenize(self, rows: list[tuple[str, str]], split: str) -> list[Example]:
        assert self.tokenizer is not None
        eos = [self.tokenizer.eos_token_id]
        source, target = self.hparams["max_source_length"] - 1, self.hparams["max_target_length"] - 1
        examples: list[Example] = []
        for start in tqdm(range(0, len(rows), EXAMPLES_PER_CALL), desc=f"tokenizing {split}", leave=False):
            documents, summaries = zip(*rows[start : start + EXAMPLES_PER_CALL], strict=True)
            inputs = self.tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]
            labels = self.tokenizer(list(summaries), add_special_tokens=False, verbose=False)["input_ids"]
            examples += [(x[:source] + eos, y[:target] + eos) for x, y in zip(inputs, labels, strict=True)]
        return examples

    def pretraining_blocks(self, sequence_length: int, max_tokens: int) -> Tensor:
        """Pack running text of the training split: int64, (blocks, sequence_length); a last short block is left out."""
        assert self.tokenizer is not None, "call setup first"
        tokens = tokenize(self._running_text(), self.tokenizer, max_tokens, "tokenizing text to pretrain on")
        whole = tokens[: len(tokens) // sequence_length * sequence_length]
        if len(whole) == 0:
            raise ValueError(f"the training text has {len(tokens)} tokens, expected a block of {sequence_length}")
        return pack(whole, sequence_length, self.tokenizer.pad_token_id)[0]

    def sentinel_ids(self) -> Tensor:
        """Return the ids of <extra_id_0>, <extra_id_1>, …: int64, (100,)."""
        assert self.tokenizer is not None, "call setup first"
        return _sentinel_ids(self.tokenizer)

    def _collate(self, examples: list[Example]) -> dict[str, Tensor]:
        assert self.tokenizer is not None
        inputs = [torch.tensor(document) for document, _ in examples]
        labels = [torch.tensor(summary) for _, summary in examples]
        masks = [torch.ones_like(row) for row in inputs]
        return {
            "input_ids": pad_sequence(inputs, batch_first=True, padding_value=self.tokenizer.pad_token_id),
            "attention_mask": pad_sequence(masks, batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }

    def _dataloader(self, split: str, generator: torch.Generator | None = None) -> DataLoader[Batch]:
        return DataLoader(
            self._examples[split],  # type: ignore[arg-type]  # a list is a map-style dataset
            batch_size=self.hparams["batch_size"],
            shuffle=generator is not None,
            generator=generator,
            num_workers=self.hparams["num_workers"],
            persistent_workers=self.hparams["num_workers"] > 0,
            collate_fn=self._collate,
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the training examples in a seeded random order.

        Raises:
            ValueError: There is no training text.
        """
        if "train" not in self._examples:
            raise ValueError(NO_TRAINING_TEXT)
        return self._dataloader("train", torch.Generator().manual_seed(self.hparams["seed"]))

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the validation examples in a fixed order."""
        return self._dataloader("validation")


def _sentinel_ids(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in SENTINELS if token not in vocabulary]
    if missing:
        raise ValueError(
            f"the tokenizer lacks {len(missing)} of the sentinels {SENTINELS[0]} to {SENTINELS[-1]}; "
            "give a T5 tokenizer, or none to train one"
        )
    return torch.tensor([vocabulary[token] for token in SENTINELS])
