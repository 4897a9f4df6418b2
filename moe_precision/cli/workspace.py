"""``moe-precision workspace``: a saved view of a Weights & Biases project, or a layout for TensorBoard."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..present.report.run import read_run
from ..present.workspace import STEPS, save, workspace_of, write_layout
from .options import Commands, add_command


def run(options: argparse.Namespace) -> None:
    """Saves the view and prints its address."""
    if (options.project is None) == (options.tensorboard is None):
        raise ValueError("give ENTITY/PROJECT for Weights & Biases, or --tensorboard FOLDER")
    if options.tensorboard is not None:
        layers = list(read_run(options.run_folder).shapes)
        print(f"wrote the layout into {write_layout(layers, Path(options.tensorboard))}; see its tab Custom Scalars")
        return
    entity, slash, project = options.project.partition("/")
    if not (entity and slash and project) or "/" in project:
        raise ValueError(f"got {options.project!r}, expected ENTITY/PROJECT: the team or user, and its project")
    layers = list(read_run(options.run_folder).shapes)
    print(f"saved {save(workspace_of(layers, entity, project, name=options.name, trainer=options.trainer))}")


def add_to(commands: Commands) -> None:
    """Declares the command."""
    command = add_command(commands, "workspace", run, "moe-precision workspace runs/demo my-team/my-project")
    command.add_argument("run_folder", metavar="RUN", help="a run's folder, plan or history, which names the layers")
    command.add_argument("project", metavar="ENTITY/PROJECT", nargs="?", help="where the runs are logged")
    command.add_argument(
        "--tensorboard", metavar="FOLDER", help="write a layout for TensorBoard's event files in this folder instead"
    )
    command.add_argument("--name", default="moe-precision", help="name of the view (default moe-precision)")
    command.add_argument(
        "--trainer", default="lightning", choices=list(STEPS), help="whose runs it shows (default lightning)"
    )
