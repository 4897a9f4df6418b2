"""Turns a float checkpoint into a packed one, shard by shard: neither model is ever complete in memory.

The module tree is laid out on the meta device, so that names and sizes of everything that will be written are known
before any weight is read (`shards`). The tensors of each shard then go through transformers' own conversion and are
packed, written under a temporary name and renamed (`packer`, `workers`). A run that was stopped finds its finished
shards by their checksums and continues with the others (`resume`). Several processes, also on several machines, may
divide the shards (`ranks`).
"""

from .distilled import distill_checkpoint
from .job import quantize_checkpoint
from .meeting import all_ranks
from .ranks import RankError
from .streamed import distill_streamed

__all__ = ["RankError", "all_ranks", "distill_checkpoint", "distill_streamed", "quantize_checkpoint"]
