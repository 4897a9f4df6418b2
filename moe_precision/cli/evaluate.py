"""``moe-precision evaluate``: loss and perplexity of a checkpoint on held-out text, and its distance from another."""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.headers import CheckpointError
from .options import Commands, add_command, add_dataset, add_heldout, add_output, data_of, judged_on, positive


def run(options: argparse.Namespace) -> None:
    """Evaluates the checkpoint and prints a table."""
    from ..judging.divergence import measure
    from ..judging.evaluation import evaluate, summarize_losses
    from ..present.tables import evaluation_document, evaluation_table, show
    from ..quantize.card import has_card

    kwargs = {} if options.dtype == "auto" else {"dtype": options.dtype}
    with Checkpoint(options.checkpoint) as checkpoint:
        if options.card and not has_card(checkpoint.folder):
            raise CheckpointError(
                f"--card adds to a card that `moe-precision quantize` has written, and {str(checkpoint.folder)!r} has "
                "none: name a folder that it wrote, or leave --card out"
            )
        if options.reference is not None:
            with Checkpoint(options.reference) as reference:
                _check_comparable(checkpoint, reference)
        data = data_of(options, options.checkpoint)  # before any weight is read
        if options.reference is not None:
            float_model, float_name = reference.load(**kwargs), f"{reference.name} (reference)"
        model, name = checkpoint.load(**kwargs), checkpoint.name
    batches = list(islice(data.val_dataloader(), options.max_batches))
    if options.reference is None:
        results = {name: evaluate(model, batches, data.token_counts)}
        options.document = evaluation_document(results, {}, judged_on(data))
        show(evaluation_table(results, text=judged_on(data)))
        _note(options, f"Measured {judged_on(data)}: loss {results[name].loss:.4f}.")
        return
    found = measure(float_model, model, batches, "Evaluating beside the reference")
    by_loss = {float_name: found.float_losses, name: found.losses}
    results = {of: summarize_losses(losses, found.targets, data.token_counts) for of, losses in by_loss.items()}
    options.document = evaluation_document(results, {name: found.divergence}, judged_on(data))
    show(evaluation_table(results, {name: found.divergence}, judged_on(data)))
    losses = f"loss {results[float_name].loss:.4f} of the float model, {results[name].loss:.4f} of this one"
    _note(options, f"Measured {judged_on(data)}: {losses}; KL divergence {found.divergence.kl:.5f} nats per token.")


def _note(options: argparse.Namespace, line: str) -> None:
    """Writes the result into the model card, where that is asked for."""
    from ..quantize.card import CARD, add_to_card

    if options.card:
        add_to_card(Path(options.checkpoint), line)
        print(f"added to {Path(options.checkpoint) / CARD}")


def _check_comparable(checkpoint: Checkpoint, reference: Checkpoint) -> None:
    """Raises `CheckpointError` unless predictions of the two are about the same tokens."""
    if reference.is_quantized:
        raise CheckpointError(f"--reference {str(reference.folder)!r} is quantized; give the float checkpoint")
    one, other = checkpoint.config, reference.config
    for what, first, second in (
        ("model types", one.model_type, other.model_type),
        ("vocabularies", *(config.get_text_config().vocab_size for config in (one, other))),
        ("tokenizers", _tokens(checkpoint.folder), _tokens(reference.folder)),
    ):
        if first is not None and second is not None and first != second:
            shown = f" ({first} and {second})" if what != "tokenizers" else ""
            raise CheckpointError(
                f"{str(checkpoint.folder)!r} and --reference {str(reference.folder)!r} have different {what}{shown}: "
                "give the float checkpoint that it was made from"
            )


def _tokens(folder: Any) -> dict[str, int] | None:
    """Token -> index, by the tokenizer in a checkpoint folder; None if there is none."""
    from ..checkpoints.tokenizer import load_tokenizer

    if not any(Path(folder).glob("tokenizer*")):
        return None
    tokens: dict[str, int] = load_tokenizer(folder).get_vocab()
    return tokens


def add_to(commands: Commands) -> None:
    """Declares the command."""
    command = add_command(
        commands,
        "evaluate",
        run,
        "moe-precision evaluate runs/demo/quantized-plan --reference runs/demo/checkpoint --max-batches 20\n"
        "  moe-precision evaluate model --heldout my_text.jsonl",
    )
    command.add_argument("checkpoint", help="checkpoint folder, with its tokenizer unless --tokenizer is given")
    command.add_argument(
        "--reference", metavar="FLOAT", help="the float checkpoint that it was made from; both are loaded"
    )
    command.add_argument("--card", action="store_true", help="add the result to the checkpoint's README.md")
    add_heldout(command)
    add_dataset(command)
    command.add_argument("--max-batches", type=positive, help="use at most this many validation batches of 16")
    command.add_argument("--dtype", default="auto", help="auto (the checkpoint's), float32 or bfloat16")
    add_output(command)
