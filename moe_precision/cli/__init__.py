"""The command line, ``moe-precision COMMAND``: one file per command."""

from .main import main

__all__ = ["main"]
