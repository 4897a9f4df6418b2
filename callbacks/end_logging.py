"""What is logged when training ends: a logger that fails then stops nobody, and is reported once all is done."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pytorch_lightning.utilities import rank_zero_warn

from moe_precision.plans.plan import PrecisionPlan
from moe_precision.present.wandb_media import MEDIA, log_media
from moe_precision.recording.history import RouterNormHistory


class EndLogging:
    """Calls loggers at the end of a run, whose model and plan are worth more than their charts.

    Args:
        owner: Name of the callback, for messages.
    """

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._failed: list[str] = []

    def attempt(self, what: str, log: Callable[[], object]) -> None:
        """Logs; whatever that raises is kept for `report`.

        Args:
            what: What is logged and where, in words.
            log: Does it.
        """
        try:
            log()
        except Exception as error:  # loggers of other packages raise what they like
            self._failed.append(f"{what} ({type(error).__name__}: {error})")

    def media(self, run: Callable[[], Any], history: RouterNormHistory, plan: PrecisionPlan, path: Path) -> None:
        """Charts and the plan for a wandb run, which ``run`` gives; ``path`` is the plan's file."""
        for what in MEDIA:
            self.attempt(f"{what} to wandb", partial(log_media, what, run, history, plan, path))

    def report(self, folder: Path | None) -> None:
        """Warns of what failed, after everything else is done.

        Args:
            folder: Where the same is in files, if it is.
        """
        if self._failed:
            kept = "" if folder is None else f" All of it is in {str(folder)!r}."
            rank_zero_warn(f"{self._owner}: at the end of the run could not log {'; '.join(self._failed)}.{kept}")
        self._failed = []
