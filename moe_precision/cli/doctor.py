"""``moe-precision doctor``: what this machine has and what works on it, with an exit status for CI."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, requires, version

import torch
from packaging.requirements import Requirement
from rich import box
from rich.markup import escape
from rich.table import Table

from ..present.tables import show
from ..quantize.selfcheck import Check, State, check_kernels
from ..version import __version__
from .options import Commands, add_command, add_output

NAME = "moe-precision"
EXTRAS = {
    "cpu": "ARK kernels, which run packed experts on Intel CPUs",
    "auto-round": "`quantize --backend auto-round`",
    "report": "`report`, a run as an HTML page",
    "gguf": "`show FILE.gguf`",
    "vllm": "`serve`, packed checkpoints behind OpenAI's API by vLLM on a CPU",
    "workspace": "`workspace`, a saved view in Weights & Biases",
    "peers": "optimizers and shards of torchao, bitsandbytes and DeepSpeed, for their tests",
    "benchmarks": "peers of `python -m benchmarks.inference`",
    "docs": "`make docs`, the site",
    "dev": "tests and linters",
}
KERNELS = ("C++ compiler", "C++", "C++ in int8", "C++ rounding", "ARK", "torch int4", "Triton")


def run(options: argparse.Namespace) -> int:
    """Prints the tables; 1 if something is broken, or absent and required."""
    checks, extras = [_python(), _torch(), *_dependencies(), *check_kernels()], _extras()
    show(_table("what is there", checks))
    show(_table(escape("extras: pip install 'moe-precision[NAME]'"), extras))
    required = [one for one in checks if one.state == "absent" and one.name in options.require]
    wrong = [*(one for one in (*checks, *extras) if one.state == "broken"), *required]
    options.document = {"works": not wrong, "checks": _plain(checks), "extras": _plain(extras)}
    for one in wrong:
        print(f"{one.name}: {one.state}: {one.detail}", file=sys.stderr)
    absent = [one.name for one in checks if one.state == "absent" and one not in wrong]
    if not wrong:
        print("everything works" + (f"; absent, which costs speed alone: {', '.join(absent)}" if absent else ""))
    return 1 if wrong else 0


def _plain(checks: list[Check]) -> dict[str, dict[str, str]]:
    return {one.name: {"state": one.state, "detail": one.detail, "use": one.use} for one in checks}


def _python() -> Check:
    detail = f"{platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    return Check("Python", "works", detail, f"runs {NAME} {__version__}")


def _torch() -> Check:
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    detail = f"{torch.__version__}, {torch.get_num_threads()} threads, " + (", ".join(gpus) or "no GPU")
    return Check("devices", "works", detail, "what torch finds")


def _dependencies() -> list[Check]:
    """Every package that is always needed, in the versions that pyproject.toml asks for."""
    return [_installed(one, "needed") for one in _requirements() if _applies(one, "")]


def _extras() -> list[Check]:
    """Every package of an extra that this platform can have."""
    return [
        _installed(one, purpose, name=f"{extra}: {one.name}", absent="absent")
        for extra, purpose in EXTRAS.items()
        for one in _requirements()
        if not _applies(one, "") and _applies(one, extra)
    ]


def _installed(wanted: Requirement, use: str, name: str | None = None, absent: State = "broken") -> Check:
    name = name or wanted.name
    try:
        found = version(wanted.name)
    except PackageNotFoundError:
        return Check(name, absent, f"not installed; {wanted.specifier}", use)
    if not wanted.specifier.contains(found, prereleases=True):
        return Check(name, "broken", f"{found} is installed, expected {wanted.specifier}", use)
    return Check(name, "works", found, use)


def _requirements() -> list[Requirement]:
    """What the installed package asks for; nothing where it is used from a folder."""
    try:
        return [Requirement(text) for text in requires(NAME) or []]
    except PackageNotFoundError:
        return []


def _applies(wanted: Requirement, extra: str) -> bool:
    return wanted.marker is None or wanted.marker.evaluate({"extra": extra})


def _table(title: str, checks: list[Check]) -> Table:
    table = Table(title=title, box=box.MARKDOWN, title_justify="left")
    for column in ("what", "state", "detail", "what it is for"):
        table.add_column(column, overflow="fold")
    for one in checks:
        table.add_row(*map(escape, (one.name, one.state, one.detail, one.use)))
    return table


def add_to(commands: Commands) -> None:
    """Declares the command."""
    command = add_command(commands, "doctor", run, "moe-precision doctor --require C++")
    command.add_argument(
        "--require",
        nargs="+",
        default=[],
        choices=KERNELS,
        metavar="NAME",
        help=f"fail also where one of these is absent: {', '.join(KERNELS)}",
    )
    add_output(command)
