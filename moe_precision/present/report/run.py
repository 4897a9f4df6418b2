"""What the folder of a run holds: plan, history, the files beside them, and results of the demo and of `compare`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from ...errors import MoEPrecisionError
from ...layers.shape import LayerShape
from ...plans.beside import Kind, PlanFiles
from ...plans.document import FORMAT
from ...plans.plan import PrecisionPlan
from ...recording.curvature import Curvature, CurvatureError
from ...recording.history import HistoryError, RouterNormHistory
from ...recording.statistics import ExpertStatistics, StatisticsError

_DEFAULT_PLAN = "precision_plan"
_LARGEST_RESULT = 64 * 2**20  # bytes of a JSON file that may be a result
_COMPARISON = "moe-precision-comparison"
_COMPARED_ROW = {
    **dict.fromkeys(("method", "granularity", "asked_bits", "average_bits", "stored_bits")),
    "increase": dict.fromkeys(("value", "low", "high")),
    "divergence": dict.fromkeys(("kl", "top1")),
}
_COMPARED: dict[str, Any] = {"rows": [_COMPARED_ROW], "loss": {}, "tokens": None, "documents": None, "text": None}
_DEMO_ROW = {
    **dict.fromkeys(("model", "nominal_bits", "stored_bits", "file_mb", "divergence")),
    "evaluation": dict.fromkeys(("loss", "rare_loss", "tokens")),
}
Beside = TypeVar("Beside", Curvature, ExpertStatistics)


class ReportError(MoEPrecisionError, ValueError):
    """A folder without a run, or with several, or files that do not belong together."""


@dataclass
class Run:
    """What is known of a run. At least one of plan and history is there.

    Attributes:
        files: Where the plan and the files beside it are, or would be.
        plan: The plan, or None.
        history: The recorded norms, or None.
        curvature: Curvature of the last weights, or None.
        tokens: Layer name -> ``(E,)`` int64: the tokens behind each expert's statistics; empty where there are none.
        statistics_text: What text the statistics were taken from.
        demo: Rows of the demo's table, as its results.json holds them.
        comparison: What ``compare --output`` wrote, or None.
        checkpoint: Folder of the float checkpoint, or None.
        read: Files that were read.
        absent: What is not there, or was left out, and why, in sentences.
    """

    files: PlanFiles
    plan: PrecisionPlan | None = None
    history: RouterNormHistory | None = None
    curvature: Curvature | None = None
    tokens: dict[str, Tensor] = field(default_factory=dict)
    statistics_text: str = ""
    demo: list[dict[str, Any]] = field(default_factory=list)
    comparison: dict[str, Any] | None = None
    checkpoint: Path | None = None
    read: list[Path] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)

    @property
    def model_type(self) -> str:
        """transformers' ``config.model_type``, or the class name of a model without a config."""
        return self._either.model_type

    @property
    def shapes(self) -> dict[str, LayerShape]:
        """Layer name -> shape, in module order."""
        if self.history is not None:
            return self.history.layers
        assert self.plan is not None
        return {name: layer.shape for name, layer in self.plan.layers.items()}

    @property
    def norms(self) -> tuple[list[int], dict[str, Tensor]]:
        """Steps of the records, and layer name -> ``(records, E)`` float32.

        Of a plan without a history these are the first and the last norms that it holds.
        """
        if self.history is not None:
            return self.history.steps, self.history.norms
        assert self.plan is not None
        layers = self.plan.layers
        kinds = [kind for kind in ("first", "last") if all(kind in layer.router_norms for layer in layers.values())]
        step_of = {"first": self.plan.baseline_step or 0, "last": self.plan.last_step}
        steps = [step if (step := step_of[kind]) is not None else index for index, kind in enumerate(kinds)]
        return steps, {name: torch.tensor([of.router_norms[kind] for kind in kinds]) for name, of in layers.items()}

    @property
    def _either(self) -> RouterNormHistory | PrecisionPlan:
        found = self.plan if self.history is None else self.history
        assert found is not None
        return found


def read_run(path: str | os.PathLike[str]) -> Run:
    """Reads what is in a run's folder.

    Args:
        path: The folder, its plan (``x.json``) or its history (``x.history.safetensors``).

    Raises:
        FileNotFoundError: There is neither a plan nor a history.
        ReportError: There are several, or plan and history are of two models.
        PlanError: The plan is damaged.
        HistoryError: The history is damaged or holds no record.
    """
    run = Run(_files_of(Path(path)))
    if run.files.plan.is_file():
        run.plan = PrecisionPlan.load(run.files.plan)
        run.read.append(run.files.plan)
    else:
        run.absent.append(f"no plan ({run.files.plan.name}): bits are not shown")
    if run.files.history.is_file():
        run.history = RouterNormHistory.load(run.files.history)
        run.read.append(run.files.history)
        if not run.history.steps:
            raise HistoryError(f"{str(run.files.history)!r} holds no record: nothing was recorded")
    else:
        kept = "the first and last norms that the plan holds are drawn" if run.norms[0] else "no curves are drawn"
        run.absent.append(f"no history ({run.files.history.name}): {kept}")
    _check_one_model(run)
    run.curvature = _beside(run, "curvature", Curvature.load)
    statistics = _beside(run, "statistics", partial(ExpertStatistics.load, check_moments=False))
    if statistics is not None:
        run.tokens, run.statistics_text = statistics.tokens, statistics.text
    if not (run.history is not None and run.history.loads):
        run.absent.append("no loads: no tokens were counted, as the callbacks do in training and validation")
    _read_results(run)
    run.checkpoint = _checkpoint_in(run.files.plan.parent)
    return run


def _files_of(path: Path) -> PlanFiles:
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"no such file or folder: {str(path)!r}; expected a run's folder, plan or history")
        return PlanFiles.of(path)
    histories = path.glob("*.history.safetensors")
    stems = {found.name.removesuffix(".history.safetensors") for found in histories}
    stems |= {found.stem for found in path.glob("*.json") if _json_format(found) == FORMAT}
    if (path / f"{_DEFAULT_PLAN}.json").is_file():  # damaged, it names no format
        stems.add(_DEFAULT_PLAN)
    if not stems:
        raise FileNotFoundError(
            f"{str(path)!r} holds no run: expected a plan (x.json) or a history (x.history.safetensors), as "
            "RouterNormMonitor and RouterNormTrainerCallback write them; name the folder that holds them, or a file"
        )
    if len(stems) > 1 and _DEFAULT_PLAN not in stems:
        raise ReportError(f"{str(path)!r} holds several runs or plans ({', '.join(sorted(stems))}): name one of them")
    return PlanFiles(path / f"{next(iter(stems)) if len(stems) == 1 else _DEFAULT_PLAN}.json")


def _json_format(path: Path) -> str | Literal["damaged"] | None:
    """The format that a JSON file names: ``demo`` for the demo's rows, None for other files."""
    if path.stat().st_size > _LARGEST_RESULT:
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # which a text that is not UTF-8 is too
        return "damaged"
    if isinstance(data, dict):
        return str(data.get("format")) if "format" in data else None
    is_demo = isinstance(data, list) and data and all(isinstance(row, dict) and "evaluation" in row for row in data)
    return "demo" if is_demo else None


def _check_one_model(run: Run) -> None:
    if run.plan is None or run.history is None:
        return
    planned = {name: layer.shape for name, layer in run.plan.layers.items()}
    if planned != run.history.layers:
        raise ReportError(
            f"{str(run.files.plan)!r} and {str(run.files.history)!r} are of two models: the plan has layers "
            f"{list(planned)}, the history {list(run.history.layers)}, or their shapes differ; name files of one run"
        )


def _beside(run: Run, kind: Kind, load: Callable[[Path], Beside]) -> Beside | None:
    """A file beside the plan, if it is of these weights."""
    path = run.files.path(kind)
    if not path.is_file():
        run.absent.append(f"no {kind} ({path.name})")
        return None
    steps, norms = run.norms
    try:
        found: Beside = load(path).for_layers(run.shapes)
        if steps:
            found.check_router_norms({name: of_layer[-1] for name, of_layer in norms.items()})
    except (CurvatureError, StatisticsError) as error:
        run.absent.append(f"{path.name} is left out: {error}")
        return None
    run.read.append(path)
    return found


def _read_results(run: Run) -> None:
    """The results that are in the folder; of several comparisons the newest."""
    folder, damaged = run.files.plan.parent, []
    for path in sorted(folder.glob("*.json"), key=lambda found: found.stat().st_mtime):
        if path == run.files.plan:
            continue
        kind = _json_format(path)
        if kind not in ("damaged", "demo", _COMPARISON):
            continue
        data: Any = None if kind == "damaged" else json.loads(path.read_text(encoding="utf-8"))
        if kind == "demo" and _like(data, [_DEMO_ROW]):
            run.demo = data
        elif kind == _COMPARISON and _like(data, _COMPARED):
            run.comparison = data
        else:
            damaged.append(path.name)
            continue
        run.read.append(path)
    if damaged:
        run.absent.append(f"damaged, or of another release, and left out: {', '.join(sorted(damaged))}")
    if not run.demo and run.comparison is None:
        run.absent.append("no comparison: `moe-precision compare --output FILE.json` writes one")


def _like(data: Any, pattern: Any) -> bool:
    """Whether data has the keys of a pattern, at every depth; all items of a list are like the pattern's only one."""
    if isinstance(pattern, dict):
        return isinstance(data, dict) and all(key in data and _like(data[key], of) for key, of in pattern.items())
    if isinstance(pattern, list):
        return isinstance(data, list) and all(_like(item, pattern[0]) for item in data)
    return True


def _checkpoint_in(folder: Path) -> Path | None:
    """A float checkpoint: ``checkpoint``, where the recipes leave it, or the only one in the folder."""
    found = [one for one in sorted(folder.iterdir()) if one.is_dir() and _is_float_checkpoint(one)]
    named = [one for one in found if one.name == "checkpoint"]
    only = named or found
    return only[0] if len(only) == 1 else None


def _is_float_checkpoint(folder: Path) -> bool:
    config = folder / "config.json"
    weights = ("model.safetensors", "model.safetensors.index.json")
    if not config.is_file() or not any((folder / name).is_file() for name in weights):
        return False
    try:
        return "quantization_config" not in json.loads(config.read_text(encoding="utf-8"))
    except ValueError:
        return False
