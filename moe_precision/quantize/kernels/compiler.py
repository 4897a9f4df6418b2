"""Compiles C++ of this package for the CPU that it runs on, once, and keeps the library in the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
from pathlib import Path

from ...files import replaced_when_done

_FLAGS = ["-O3", "-std=c++17", "-march=native", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi"]
_SECONDS = 300  # until a compiler is taken for hung

log = logging.getLogger(__name__)


def compiled(source: Path) -> ctypes.CDLL:
    """The library that a C++ file gives, from the cache if this compiler made it of this text for this kind of CPU.

    The compiler is ``$CXX``, or ``c++``. The cache is ``$XDG_CACHE_HOME/moe_precision``, by default in ``~/.cache``. It
    may be shared by machines of different kinds.

    Raises:
        OSError: There is no compiler, it fails, its library cannot be loaded, or the cache cannot be written to.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise OSError(f"no C++ compiler {os.environ.get('CXX', 'c++')!r}")
    text = source.read_bytes()
    # what -march=native means here, and which version of the compiler it is: the commands that it would run
    meaning = _run([compiler, *_FLAGS, "-###", "-E", "-x", "c++", os.devnull])
    key = hashlib.sha256(text + meaning.encode()).hexdigest()[:20]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "moe_precision")
    library = cache / f"{source.stem}-{key}.so"
    if not library.is_file():
        log.info("compiling %s with %s: a few seconds, once on this machine", source.name, compiler)
        cache.mkdir(parents=True, exist_ok=True)
        with replaced_when_done(library) as temporary:
            _run([compiler, *_FLAGS, "-o", str(temporary), str(source)])
    return ctypes.CDLL(str(library))


def _run(command: list[str]) -> str:
    """What a command writes to stderr."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{command[0]} did not end in {_SECONDS} s") from error
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), f"exit status {done.returncode}")
        raise OSError(f"{command[0]} failed: {reason.strip()}")
    return done.stderr
