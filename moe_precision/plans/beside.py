"""The names of the files beside a plan: the one place that knows them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["history", "curvature", "statistics", "grid", "teacher"]
_SUFFIXES: dict[Kind, str] = {
    "history": ".history.safetensors",
    "curvature": ".curvature.safetensors",
    "statistics": ".statistics.safetensors",
    "grid": ".grid.safetensors",
    "teacher": ".teacher.safetensors",
}


@dataclass(frozen=True)
class PlanFiles:
    """A plan's path and those of the files beside it, whether or not they exist.

    Attributes:
        plan: The plan, ``x.json``.

    Raises:
        ValueError: The plan's path does not end in ``.json``.
    """

    plan: Path

    def __post_init__(self) -> None:
        if self.plan.suffix != ".json":
            raise ValueError(f"got {str(self.plan)!r}, expected the path of a plan, which ends in .json")

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> PlanFiles:
        """The files of a plan, of which ``path`` is one: the plan itself, or any file beside it.

        Raises:
            ValueError: ``path`` ends neither in ``.json`` nor in the suffix of a file beside a plan.
        """
        path = Path(path)
        for suffix in _SUFFIXES.values():
            if path.name.endswith(suffix) and path.name != suffix:
                return cls(path.with_name(path.name.removesuffix(suffix) + ".json"))
        return cls(path)

    @property
    def history(self) -> Path:
        """The recorded router norms, ``x.history.safetensors``."""
        return self.path("history")

    @property
    def curvature(self) -> Path:
        """Means of second moments or of squared gradients, ``x.curvature.safetensors``."""
        return self.path("curvature")

    @property
    def statistics(self) -> Path:
        """Second moments of the experts' inputs, ``x.statistics.safetensors``."""
        return self.path("statistics")

    @property
    def grid(self) -> Path:
        """The grid that training ended on, or codes and distilled scales, ``x.grid.safetensors``."""
        return self.path("grid")

    @property
    def teacher(self) -> Path:
        """The weights that annealed steps learn from, while a run lasts, ``x.teacher.safetensors``."""
        return self.path("teacher")

    @property
    def all(self) -> tuple[Path, ...]:
        """The plan and every file beside it."""
        return (self.plan, *(self.path(kind) for kind in _SUFFIXES))

    def path(self, kind: Kind) -> Path:
        """The path of one kind of file."""
        return self.plan.with_name(self.plan.stem + _SUFFIXES[kind])


def existing(kind: Kind, path: str | os.PathLike[str] | None) -> Path | None:
    """A file of this kind beside a plan or a history; None if there is none, or no plan.

    Raises:
        ValueError: ``path`` names a plan that does not end in ``.json``, beside which nothing can be found.
    """
    if path is None:
        return None
    try:
        found = PlanFiles.of(path).path(kind)
    except ValueError:
        if Path(path).suffix == ".safetensors":  # a history under a name of its own
            return None
        raise
    return found if found.is_file() else None
