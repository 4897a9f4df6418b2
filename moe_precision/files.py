"""Writing files so that a reader never meets half of one: a temporary name in the same folder, then one rename."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

_LOCK = ".lock"


@contextmanager
def replaced_when_done(path: str | os.PathLike) -> Iterator[Path]:
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
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes files that only their owner can read
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(tensors: dict[str, Tensor], path: str | os.PathLike, metadata: dict[str, str]) -> None:
    """Writes a safetensors file in one step.

    Raises:
        OSError: The file cannot be written; an existing one is left as it was.
    """
    with replaced_when_done(path) as temporary:
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata=metadata)
        except SafetensorError as error:  # its form of a full disk
            raise OSError(errno.EIO, str(error), os.fspath(path)) from error


@contextmanager
def folder_replaced_when_done(path: str | os.PathLike) -> Iterator[Path]:
    """The same for a checkpoint folder: yields a temporary one beside ``path``, which takes its place at the end.

    Raises:
        FileExistsError: ``path`` is a folder that holds something else than a checkpoint, or a file.
    """
    path = Path(path)
    _check_replaceable(path)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield temporary
        _take_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def resumable_folder(path: str | os.PathLike, job: str) -> Iterator[Path]:
    """The same, but what an interruption leaves is kept, and yielded again to the same ``job``.

    Args:
        path: Where the folder goes when it is complete.
        job: What is made, and of what: a hash, which is in the name of the folder.

    Raises:
        FileExistsError: ``path`` is a folder that holds something else than a checkpoint, a mount point, or a file.
        BlockingIOError: Another process is at the same job.
    """
    path = Path(path).resolve()
    _check_replaceable(path)
    partial = path.parent / f".{path.name}.{job[:12]}.partial"
    for other in path.parent.glob(f".{path.name}.*.partial"):
        if other != partial:
            with suppress(BlockingIOError), _locked(other):  # of a job that has been given up
                shutil.rmtree(other, ignore_errors=True)
    partial.mkdir(exist_ok=True)
    with _locked(partial):
        for rest in partial.glob(".*.tmp"):  # of a file that was being written
            rest.unlink()
        try:
            yield partial
        except ValueError:  # bad input: it would fail again
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _take_place(partial, path)
        (path / _LOCK).unlink()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise BlockingIOError(f"another process is writing into {str(folder)!r}; wait for it, or stop it") from None
    try:
        yield
    finally:
        lock.release()


def _check_replaceable(path: Path) -> None:
    if os.path.ismount(path):
        raise FileExistsError(f"{str(path)!r} is a mount point, which cannot be replaced; name a folder inside of it")
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not (path / "config.json").is_file()):
        raise FileExistsError(
            f"{str(path)!r} exists and is no checkpoint folder; choose another one, nothing is replaced"
        )
    path.parent.mkdir(parents=True, exist_ok=True)


def _take_place(temporary: Path, path: Path) -> None:
    temporary.chmod(0o777 & ~_umask())
    if path.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
        path.replace(old)
        temporary.replace(path)
        shutil.rmtree(old)
    else:
        temporary.replace(path)


def check_writable(path: str | os.PathLike) -> None:
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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
