"""Saved views: panels for what the callbacks log, in a Weights & Biases project or beside TensorBoard's event files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ..errors import MoEPrecisionError

INSTALL = "the view is made with wandb-workspaces: pip install 'moe-precision[workspace]'"
TrainerName = Literal["lightning", "transformers"]
STEPS: dict[TrainerName, str] = {"lightning": "trainer/global_step", "transformers": "train/global_step"}
"""Trainer -> the key of the optimizer step, which all curves are drawn over."""


class WorkspaceError(MoEPrecisionError, ValueError):
    """The view cannot be made or saved."""


def workspace_of(
    layers: Sequence[str], entity: str, project: str, *, name: str = "moe-precision", trainer: TrainerName = "lightning"
) -> Any:
    """The view, which nothing is sent of until its ``save()``.

    Args:
        layers: Names of the MoE layers, in module order.
        entity: Team or user.
        project: Its project.
        name: Of the view.
        trainer: Whose runs it shows: Lightning's or transformers' Trainer's.

    Returns:
        A ``wandb_workspaces.workspaces.Workspace``.

    Raises:
        WorkspaceError: wandb-workspaces is not installed.

    Example:
        >>> view = workspace_of(["model.layers.0.mlp"], "team", "moe")
        >>> view.sections[1].panels[0].metric_regex
        'router_norm/layer_00/expert_.*'
    """
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise WorkspaceError(INSTALL) from error

    def lines(title: str, regex: str) -> Any:
        return panels.LinePlot(title=title, x=STEPS[trainer], title_x="optimizer step", metric_regex=regex)

    plan = [
        panels.LinePlot(title="experts whose bits the last record changed", x=STEPS[trainer], y=["plan/changed"]),
        lines("change of router norm, median of each layer", r"router_norm_change/layer_\d+/median"),
        panels.MediaBrowser(title="change of router norm", media_keys=["router_norm_change/heatmap"]),
        panels.ScalarChart(title="average bits", metric=panels.SummaryMetric("precision_plan/average_bits")),
    ]
    norms = [lines(layer, rf"router_norm/layer_{index:02d}/expert_.*") for index, layer in enumerate(layers)]
    load = [
        lines("load of the least loaded expert of each layer", r"expert_load/layer_\d+/min"),
        lines("load of the most loaded expert of each layer", r"expert_load/layer_\d+/max"),
    ]
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            workspaces.Section(name="Precision plan", panels=plan, is_open=True),
            workspaces.Section(name="Router norms of every expert", panels=norms, is_open=True),
            workspaces.Section(name="Expert load", panels=load),
        ],
    )


def save(workspace: Any) -> str:
    """Saves a view.

    Returns:
        Its address.

    Raises:
        WorkspaceError: Weights & Biases cannot be reached, or does not take it.
    """
    try:
        return str(workspace.save().url)
    except Exception as error:  # the client raises what it likes
        raise WorkspaceError(
            f"could not save the view in {workspace.entity}/{workspace.project}: {type(error).__name__}: {error}. Does "
            "`wandb login --verify` work, and does the project exist?"
        ) from error


def layout_of(layers: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """The same view as a layout of TensorBoard's custom scalars, a chart for every layer.

    Args:
        layers: Names of the MoE layers, in module order.

    Returns:
        Category -> title of a chart -> its kind and the regular expressions of its tags, as
        ``SummaryWriter.add_custom_scalars`` takes it.

    Example:
        >>> layout_of(["model.layers.0.mlp"])["Router norms of every expert"]
        {'model.layers.0.mlp': ['Multiline', ['router_norm/layer_00/expert_.*']]}
    """

    def lines(regex: str) -> list[Any]:
        return ["Multiline", [regex]]

    return {
        "Precision plan": {
            "experts whose bits the last record changed": lines("plan/changed"),
            "change of router norm, median of each layer": lines(r"router_norm_change/layer_\d+/median"),
        },
        "Router norms of every expert": {
            layer: lines(rf"router_norm/layer_{index:02d}/expert_.*") for index, layer in enumerate(layers)
        },
        "Expert load": {
            "load of the least loaded expert of each layer": lines(r"expert_load/layer_\d+/min"),
            "load of the most loaded expert of each layer": lines(r"expert_load/layer_\d+/max"),
        },
    }


def write_layout(layers: Sequence[str], folder: Path) -> Path:
    """Writes the layout into a folder of event files, where TensorBoard shows it under *Custom Scalars*.

    Raises:
        WorkspaceError: The folder holds no event file, or tensorboard is not installed.
    """
    if not any(folder.glob("events.out.tfevents.*")):
        raise WorkspaceError(
            f"{str(folder)!r} holds no event file; give the folder of one run, such as lightning_logs/version_0"
        )
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise WorkspaceError("the layout is written with tensorboard: pip install tensorboard") from error
    with SummaryWriter(str(folder), filename_suffix=".moe_precision") as writer:
        writer.add_custom_scalars(layout_of(layers))
    return folder
