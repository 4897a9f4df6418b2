"""What goes wrong where a packed checkpoint is served."""

from __future__ import annotations

from ..errors import MoEPrecisionError


class ServingError(MoEPrecisionError, ValueError):
    """A packed checkpoint, or a request to an engine, that cannot be served correctly."""
