"""Checkpoint folders: opened once, checked, read one tensor at a time, and replaced in one step."""

from .checkpoint import Checkpoint, load_model
from .headers import CheckpointError, StoredTensor
from .sources import StreamingError

__all__ = ["Checkpoint", "CheckpointError", "StoredTensor", "StreamingError", "load_model"]
