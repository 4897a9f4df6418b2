"""The files that a callback leaves at the end of a run: where they go, and what happens if a disk is full."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pytorch_lightning.utilities import rank_zero_warn

from moe_precision.files import check_writable
from moe_precision.plans.beside import PlanFiles
from moe_precision.plans.plan import PrecisionPlan


class RunFiles:
    """A plan and the files beside it.

    A full disk does not stop the run, whose other callbacks may still save the model: `write` warns and remembers the
    error, and `raise_error` raises it after all of them have done their work.

    Args:
        export_to: Path of the plan, relative to the folder of the run.
        owner: Name of the callback, for messages.
        rescue: A sentence that says what a user can still do when a file could not be written.

    Raises:
        ValueError: ``export_to`` does not end in ``.json``.
    """

    def __init__(self, export_to: str, owner: str, rescue: str) -> None:
        if Path(export_to).suffix != ".json":
            raise ValueError(f"export_to must end in .json, got {export_to!r}")
        self._export_to, self._owner, self._rescue = export_to, owner, rescue
        self._files: PlanFiles | None = None
        self._error: Exception | None = None
        self._cleared = False

    @property
    def written(self) -> bool:
        """Whether this run writes files at all."""
        return self._files is not None

    @property
    def folder(self) -> Path | None:
        """The folder of the plan; None for a run that writes no files."""
        return None if self._files is None else self._files.plan.parent

    @property
    def paths(self) -> PlanFiles:
        """Where the files go; only for a run that writes files."""
        assert self._files is not None, "this run writes no files"
        return self._files

    def prepare(self, folder: str | None) -> None:
        """Before training: checks that the plan can be written.

        Args:
            folder: What ``export_to`` is relative to; None for a run that writes nothing.

        Raises:
            OSError: The plan's folder cannot be written to.
        """
        self._error, self._cleared = None, False
        self._files = None if folder is None else PlanFiles(Path(folder, self._export_to))
        if self._files is not None:
            check_writable(self._files.plan)

    def clear(self) -> None:
        """Removes what an earlier run left, once in a run, before anything of this run is written.

        A run that is stopped between two files would else leave a new history beside an old plan.
        """
        if self._files is None or self._cleared:
            return
        self._cleared = True
        for path in (self._files.plan, self._files.curvature, self._files.statistics):
            path.unlink(missing_ok=True)

    def has_plan(self, step: int) -> bool:
        """Whether the plan of a step is there already."""
        try:
            return PrecisionPlan.load(self.paths.plan).last_step == step
        except (OSError, ValueError):
            return False

    def write(self, save: Callable[[Path], None], path: Path) -> bool:
        """Writes one file; returns whether that worked."""
        try:
            save(path)
        except OSError as error:
            text = f"{self._owner} could not write {str(path)!r}: {error.strerror or error}. {self._rescue}"
            self._error = type(error)(error.errno, text)
            rank_zero_warn(str(self._error))
            return False
        return True

    def keep(self, error: Exception) -> None:
        """Warns that nothing more is written, because of an error, and remembers it."""
        rank_zero_warn(f"{self._owner}: no plan is written: {type(error).__name__}: {error}. {self._rescue}")
        self._error = error

    def raise_error(self) -> None:
        """Raises what `write` could not write, or what `keep` was given.

        Raises:
            OSError: The path and the reason.
        """
        if self._error is not None:
            raise self._error
