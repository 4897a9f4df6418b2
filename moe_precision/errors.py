"""The base class of this package's errors; each error class is in the module that raises it."""

from __future__ import annotations


class MoEPrecisionError(Exception):
    """Something that a user can fix: input, files, a model or settings that do not fit.

    Every error class of the package derives from it and from the builtin that fits, so that ``except ValueError`` and
    ``except MoEPrecisionError`` both work.
    """
