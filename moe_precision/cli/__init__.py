"""The command line, ``moe-precision COMMAND``: one file a command."""

from .main import main

__all__ = ["main"]
