"""The tokenizer of a checkpoint folder, checked to know text."""

from __future__ import annotations

import os
import string
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .headers import CheckpointError

_WAY_OUT = (
    "give another one (--tokenizer FOLDER or NAME, tokenizer= in Python), or save the model's own there: "
    "tokenizer.save_pretrained(folder)"
)


def load_tokenizer(source: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Loads a tokenizer from a folder or by name.

    Where a checkpoint holds no tokenizer, transformers makes an empty one for some families: it gives no ids, or the
    unknown token for every word. Losses would then be about no text at all.

    Raises:
        CheckpointError: There is no tokenizer, it cannot be loaded, or it is empty.
    """
    path = os.fspath(source)
    try:
        if (Path(path) / "tokenizer.json").is_file():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        else:
            tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # each family has its own
        if Path(path).is_dir() and not any(Path(path).glob("*token*")):
            reason = "it holds no file of one"
        else:
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        raise CheckpointError(f"no tokenizer could be loaded from {path!r} ({reason}); {_WAY_OUT}") from error
    if not _knows_text(tokenizer):
        found = tokenizer("hello world", add_special_tokens=False)["input_ids"]
        raise CheckpointError(
            f"the tokenizer of {path!r} is empty: 'hello world' gives {found or 'no ids'}, and letters, digits "
            f"and signs give no two tokens of their own. Transformers makes such a one where there is none; {_WAY_OUT}"
        )
    return tokenizer


def _knows_text(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether at least two tokens that are not special stand for printable ASCII characters."""
    special = {*tokenizer.all_special_ids}
    ids = tokenizer(list(string.printable), add_special_tokens=False)["input_ids"]
    return len({token for row in ids for token in row} - special) >= 2
