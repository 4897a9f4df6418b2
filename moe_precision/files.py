"""Writing single files so that a reader never sees half of one: a temporary name in the same folder, then one rename.

Whole folders of a checkpoint are replaced by `checkpoints.folders`.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def replaced_when_done(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; renames it onto ``path`` if the block ends without an exception.

    Raises:
        OSError: The folder does not exist or cannot be written to.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~umask())  # mkstemp makes files that only their owner can read
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(tensors: dict[str, Tensor], path: str | os.PathLike[str], metadata: dict[str, str]) -> None:
    """Writes a safetensors file in one step.

    Raises:
        OSError: The file cannot be written; an existing one is left as it was.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replaced_when_done(path) as temporary:
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata=metadata)
        except SafetensorError as error:  # how it reports a full disk
            raise OSError(errno.EIO, str(error), os.fspath(path)) from error


def check_writable(path: str | os.PathLike[str]) -> None:
    """Makes the parent folder of ``path`` and tries a temporary file in it.

    Raises:
        OSError: ``path`` cannot be written; the message says which path and why.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {str(path)!r}: it is a folder, expected the path of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise type(error)(f"cannot write {str(path)!r}: {error}. Choose a folder that can be written to") from error


def umask() -> int:
    """The permissions that new files of this process lack."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
