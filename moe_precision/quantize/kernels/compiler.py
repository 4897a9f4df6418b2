"""Compiles C++ of this package for the CPU that it runs on, once, and keeps the library in the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from filelock import FileLock

_FLAGS = ["-O3", "-std=c++17", "-march=native", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi"]
_SECONDS = 300  # until a compiler counts as hung

log = logging.getLogger(__name__)


def compiled(source: Path, *flags: str) -> ctypes.CDLL:
    """The library that a C++ file gives, from the cache if this compiler made it from this source for this kind of CPU.

    The compiler is ``$CXX``, or ``c++``. The cache is ``$XDG_CACHE_HOME/moe_precision``, by default in ``~/.cache``. It
    may be shared by machines of different kinds. A library's hash is in its name: a damaged one is compiled again. If
    several processes need one at the same time, the first compiles it and the others wait.

    Args:
        source: The file.
        flags: For the compiler, beside its usual ones.

    Raises:
        OSError: There is no compiler, it fails, its library cannot be loaded, or the cache cannot be written to.
    """
    wanted = compiler_command()
    # what -march=native means here, and which version of the compiler it is: the command that it would run
    wanted += [*_FLAGS, *flags]
    said = _run([*wanted, "-###", "-E", "-x", "c++", os.devnull]).splitlines()
    meaning = [line for line in said if "cc1" in line or " version " in line]
    key = _hash("\n".join(meaning).encode() + source.read_bytes())
    cache, name = _cache(), f"{source.stem}-{key}"
    library = _cached(cache, name)
    if library is None:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{name}.lock", timeout=_SECONDS):
            library = _cached(cache, name) or _made(wanted, source, cache, name)
    return ctypes.CDLL(str(library))


def compiler_command() -> list[str]:
    """The C++ compiler with what ``$CXX`` gives it, its path absolute.

    Raises:
        OSError: There is none.
    """
    wanted = shlex.split(os.environ.get("CXX", "c++"))
    found = shutil.which(wanted[0]) if wanted else None
    if found is None:
        raise OSError(f"no C++ compiler {' '.join(wanted)!r}")
    return [os.path.abspath(found), *wanted[1:]]


def _cached(cache: Path, name: str) -> Path | None:
    """The library of a name, if it is there and undamaged."""
    libraries = cache.glob(f"{name}-*.so")
    return next((one for one in libraries if one.stem.endswith(_hash(one.read_bytes()))), None)


def _made(compiler: list[str], source: Path, cache: Path, name: str) -> Path:
    """Compiles a file into the cache."""
    log.info("compiling %s with %s: a few seconds, once on this machine", source.name, compiler[0])
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        made = Path(folder, "made.so")
        _run([*compiler, "-o", str(made), os.path.abspath(source)])
        library = cache / f"{name}-{_hash(made.read_bytes())}.so"
        made.replace(library)
    return library


def _cache() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "moe_precision").resolve()
    except RuntimeError as error:  # no HOME, and no user known to the system
        raise OSError(f"{error}; name a folder in XDG_CACHE_HOME") from error


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:20]


def _run(command: list[str]) -> str:
    """What a command writes to stderr."""
    try:
        done = subprocess.run(  # always in the same folder, since clang's commands name it
            command, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False, cwd="/"
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{command[0]} did not end in {_SECONDS} s") from error
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), f"exit status {done.returncode}")
        raise OSError(f"{command[0]} failed: {reason.strip()}")
    return done.stderr
