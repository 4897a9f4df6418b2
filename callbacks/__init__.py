"""Callbacks for Lightning and for transformers' Trainer, one a file."""

from .precision_anneal import PrecisionAnneal
from .precision_anneal_trainer_callback import PrecisionAnnealTrainerCallback
from .router_norm_monitor import RouterNormMonitor
from .router_norm_trainer_callback import RouterNormTrainerCallback
from .save_pretrained import SavePretrained

__all__ = [
    "PrecisionAnneal",
    "PrecisionAnnealTrainerCallback",
    "RouterNormMonitor",
    "RouterNormTrainerCallback",
    "SavePretrained",
]
