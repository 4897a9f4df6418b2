"""A model's name on the Hugging Face Hub where a folder is expected: its downloaded files, or how to get them.

Nothing is downloaded here: a model of many gigabytes is for its user to fetch.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_name(source: str | os.PathLike[str]) -> bool:
    """Whether text that is no path of this machine may name a model on the Hub, as ``Qwen/Qwen3-30B-A3B`` does."""
    text = os.fspath(source)
    inside = text.split("/")[0]  # of runs/typo the first part is often a folder
    return bool(_NAME.fullmatch(text)) and not os.path.exists(text) and not os.path.isdir(inside)


def local_folder(source: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint: for a Hub name its snapshot in the cache, if it is there; else the path as it is."""
    if not is_hub_name(source):
        return Path(source)
    from transformers.utils.hub import cached_file

    try:
        config = cached_file(os.fspath(source), "config.json", local_files_only=True)
    except OSError:  # it is not there
        config = None
    return Path(source) if config is None else Path(config).parent


def name_of(folder: Path) -> str:
    """The name of a folder, or the model's where it is a snapshot in the cache, whose own name is a hash."""
    if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
        return folder.parents[1].name.rpartition("--")[2]
    return folder.name


def how_to_download(name: str) -> str:
    """The command that downloads a model, to end a message."""
    return (
        f"if that is a model on the Hub, download it and give the folder: hf download {name} --local-dir "
        f"{name.rpartition('/')[2]}"
    )
