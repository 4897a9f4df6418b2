"""Callbacks for Lightning and for transformers' Trainer, one per file.

Those of other trainers are imported from their own modules: `olmo_core_callback`, `megatron_bridge_callback` and
`torchtitan_recorder`.
"""

from moe_precision.callbacks.precision_anneal import PrecisionAnneal
from moe_precision.callbacks.precision_anneal_trainer_callback import PrecisionAnnealTrainerCallback
from moe_precision.callbacks.router_norm_monitor import RouterNormMonitor
from moe_precision.callbacks.router_norm_trainer_callback import RouterNormTrainerCallback
from moe_precision.callbacks.save_pretrained import SavePretrained

__all__ = [
    "PrecisionAnneal",
    "PrecisionAnnealTrainerCallback",
    "RouterNormMonitor",
    "RouterNormTrainerCallback",
    "SavePretrained",
]
