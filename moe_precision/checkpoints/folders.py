"""Replacing a checkpoint folder in one step, with a hidden folder beside it while the new one is written."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, SoftFileLock, Timeout

from ..files import umask
from .config import released
from .headers import CheckpointError

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

_LOCK = ".lock"
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


def check_quantizing(checkpoint: Checkpoint, out: str | os.PathLike[str], *sources: Any) -> None:
    """Checks that a checkpoint is float, and that writing ``out`` destroys nothing that is read.

    Args:
        checkpoint: The float checkpoint.
        out: Folder that will be written, or replaced.
        sources: Whatever else is read; only paths are checked.

    Raises:
        CheckpointError: The checkpoint is quantized already, or ``out`` lies in what is read or contains it.
    """
    if checkpoint.is_quantized:
        raise CheckpointError(
            f"{str(checkpoint.folder)!r} is quantized already (by {checkpoint.quantizer!r}); quantize the float "
            "checkpoint instead" + released(checkpoint.quantization)
        )
    if Path(out).resolve().is_relative_to(checkpoint.folder.resolve()):
        raise CheckpointError(f"{os.fspath(out)!r} is, or lies in, the float checkpoint; choose another folder")
    for source in (checkpoint.folder, *sources):
        if isinstance(source, str | os.PathLike) and Path(source).resolve().is_relative_to(Path(out).resolve()):
            raise CheckpointError(f"{os.fspath(out)!r} would be replaced, and {os.fspath(source)!r} lies in it")


@contextmanager
def folder_replaced_when_done(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary folder beside ``path``, which takes its place if the block ends without an exception.

    Raises:
        FileExistsError: ``path`` is a folder that holds something other than a checkpoint, a mount point, or a file.
    """
    path = Path(path)
    check_replaceable(path)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield temporary
        _take_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def resumable_folder(path: str | os.PathLike[str], job: str) -> Iterator[Path]:
    """Yields a hidden folder beside ``path``, which takes its place if the block ends without an exception.

    However the block ends early, finished files stay, and the next call for this job yields them again; only an empty
    folder is removed. So check all input before entering: an error that would recur every time is best raised while
    there is nothing to keep. Entering removes what other jobs for ``path`` left behind, where a lock shows that they
    have ended; a file system without locks is enough, but leaves that, and two writers, to the user.

    Args:
        path: Where the folder goes when it is complete.
        job: A hash of what is made and from what; part of the folder's name.

    Raises:
        FileExistsError: ``path`` is a folder that holds something other than a checkpoint, a mount point, or a file.
        BlockingIOError: Another process is working on the same job.
    """
    path = Path(path).resolve()
    check_replaceable(path)
    partial = folder_of_job(path, job)
    for other in path.parent.glob(f".{path.name}.*.partial"):
        if other != partial:
            with suppress(BlockingIOError), _locked(other) as locked:
                if locked:  # of a job that has been given up
                    shutil.rmtree(other, ignore_errors=True)
    partial.mkdir(exist_ok=True)
    with _locked(partial):
        for rest in partial.glob(".*.tmp"):  # of a file that was being written
            rest.unlink()
        try:
            yield partial
        except BaseException:
            if all(file.name == _LOCK for file in partial.iterdir()):
                shutil.rmtree(partial, ignore_errors=True)
            raise
        _take_place(partial, path)
        (path / _LOCK).unlink(missing_ok=True)


def folder_of_job(path: str | os.PathLike[str], job: str) -> Path:
    """The hidden folder that `resumable_folder` yields."""
    path = Path(path).resolve()
    return path.parent / f".{path.name}.{job[:12]}.partial"


def kept_folder(path: str | os.PathLike[str]) -> Path | None:
    """The hidden folder that an interrupted `resumable_folder` has left for a path; the newest of several."""
    path = Path(path).resolve()
    found = sorted(path.parent.glob(f".{path.name}.*.partial"), key=lambda folder: folder.stat().st_mtime)
    return found[-1] if found else None


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Holds the lock of a folder, and yields whether there is one: some network file systems have no locks."""
    lock = FileLock(folder / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        if not isinstance(lock, SoftFileLock):
            raise BlockingIOError(f"another process is writing into {str(folder)!r}; wait for it, or stop it") from None
    except NotImplementedError:  # how filelock says ENOSYS
        pass
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    try:
        # newer versions of filelock go on with a file that a killed process leaves for ever: not a lock
        yield lock.is_locked and not isinstance(lock, SoftFileLock)
    finally:
        lock.release()


def check_replaceable(path: Path) -> None:
    """Raises `FileExistsError` if a folder holds something other than a checkpoint, which is not to be replaced."""
    if os.path.ismount(path):
        raise FileExistsError(f"{str(path)!r} is a mount point, which cannot be replaced; name a folder inside it")
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not (path / "config.json").is_file()):
        raise FileExistsError(
            f"{str(path)!r} exists and is not a checkpoint folder; nothing was replaced, choose another one"
        )
    path.parent.mkdir(parents=True, exist_ok=True)


def _take_place(temporary: Path, path: Path) -> None:
    temporary.chmod(0o777 & ~umask())
    if path.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
        path.replace(old)
        temporary.replace(path)
        shutil.rmtree(old)
    else:
        temporary.replace(path)
