"""A second quantizer behind the same plan: AutoRound, which tunes the rounding of weights on text.

AutoRound patches transformers for its whole process (a float Mixtral that is loaded after it has random experts), so it
runs in a process of its own, with this file as the main module. What it writes is a checkpoint in its own format.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..allocation.weights import StoredWeights
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.dtypes import meta_model_of
from ..checkpoints.folders import check_quantizing, folder_replaced_when_done
from ..checkpoints.headers import header
from ..checkpoints.other_files import copy_other_files
from ..checkpoints.sources import StreamingError
from ..errors import MoEPrecisionError
from ..files import save_tensors
from ..plans.beside import existing
from ..plans.plan import PrecisionPlan
from ..quantize.codec.grid import Grid
from ..recording.planned_weights import check_plan_is_for
from . import export, plan_of_checkpoint

_LAYER_CONFIG, _TOKENS = "layer_config.json", "tokens.safetensors"


class AutoRoundError(MoEPrecisionError, ValueError):
    """AutoRound is missing, failed, or did not do what the plan says."""


def check_installed() -> None:
    """Raises `AutoRoundError` without AutoRound."""
    if find_spec("auto_round") is None:
        raise AutoRoundError("AutoRound is not installed: pip install 'moe-precision[auto-round]'")


def quantize_with_auto_round(
    checkpoint: str | os.PathLike[str],
    plan: PrecisionPlan | str | os.PathLike[str],
    out: str | os.PathLike[str],
    blocks: Sequence[Tensor] = (),
    iterations: int = 200,
) -> tuple[str, ...]:
    """Quantizes a float checkpoint by a plan with AutoRound; the whole float model must fit in memory.

    Args:
        checkpoint: Folder of a float checkpoint with its tokenizer.
        plan: A plan, or the path of its file.
        out: Folder to write, in AutoRound's format; it appears in one step, once its bits have been read back.
        blocks: Text to tune on: token ids, each ``(tokens,)`` int64, all of one length.
        iterations: Steps of AutoRound's tuning for each decoder layer; 0 rounds to the nearest and needs no text.

    Returns:
        Which widths were rounded up to one that AutoRound has, in words.

    Raises:
        AutoRoundError: AutoRound is missing, failed, or wrote other bits than the plan's.
        PlanError: The plan is for another model.
        ExportError: Experts that nothing is known to unfuse.
        CheckpointError: The checkpoint is incomplete, or quantized already, or ``out`` would replace it.
    """
    check_installed()
    if iterations < 0:
        raise ValueError(f"iterations={iterations}: expected 0, to round to the nearest, or more")
    if iterations and not blocks:
        raise ValueError(f"iterations={iterations}, but no blocks of text to tune on; 0 rounds to the nearest")
    if len({len(block) for block in blocks}) > 1:
        raise ValueError("blocks of text have several lengths; expected one, since AutoRound leaves shorter ones out")
    source = Checkpoint(checkpoint)
    check_quantizing(source, out, plan)
    grid = None if isinstance(plan, PrecisionPlan) else existing("grid", plan)
    annealed = grid is not None and not Grid.load(grid).codes  # the plan is from other weights than now
    plan = plan if isinstance(plan, PrecisionPlan) else PrecisionPlan.load(plan)
    plan = plan.for_model(source.meta_model(), {layer.name: layer.shape for layer in source.layers(plan.patterns)})
    if not annealed:
        _check_weights(source, plan)
    exported = export(plan, "autoround")
    modules = source.meta_model().named_modules()
    left_alone = {name: {"bits": 16} for name, module in modules if isinstance(module, nn.Linear)}
    with folder_replaced_when_done(out) as temporary, tempfile.TemporaryDirectory() as given:
        Path(given, _LAYER_CONFIG).write_text(json.dumps(left_alone | exported.config), encoding="utf-8")
        save_file(
            {"blocks": torch.stack(tuple(blocks)) if blocks else torch.empty(0, 1, dtype=torch.int64)},
            Path(given, _TOKENS),
        )
        folders = [str(Path(folder).resolve()) for folder in (checkpoint, temporary, given)]
        command = [sys.executable, "-m", __name__, *folders, str(plan.group_size), str(iterations)]
        done = subprocess.run(command, cwd=given, check=False)  # it writes a folder of logs where it is started
        if done.returncode:
            raise AutoRoundError(f"AutoRound ended with status {done.returncode}; its messages are above")
        _lift(temporary)
        _restore_float32(temporary, source)
        differences = plan_of_checkpoint(temporary).diff(exported.plan)
        if differences:
            raise AutoRoundError("AutoRound did not carry the plan out: " + "; ".join(differences[:5]))
        copy_other_files(source.folder, temporary)
    return exported.notes[:-1]  # the last is of what a layer_config does not name


def _check_weights(source: Checkpoint, plan: PrecisionPlan) -> None:
    """Raises `PlanError` if router norms show that the plan was made for other weights."""
    try:
        norms = StoredWeights(source, plan.patterns).snapshot(variance=False).router_norms
    except StreamingError:
        return  # routers that are made of several tensors, which only a model shows
    check_plan_is_for(plan, norms)


def _lift(folder: Path) -> None:
    """Moves the checkpoint up to the folder that AutoRound was given: it may write into one inside it."""
    found = list(folder.glob("**/config.json"))
    if len(found) != 1:
        raise AutoRoundError(f"AutoRound wrote no checkpoint, or several: {[str(p) for p in found]}")
    (config,) = found
    for path in () if config.parent == folder else list(config.parent.iterdir()):
        path.rename(folder / path.name)


def _restore_float32(folder: Path, source: Checkpoint) -> None:
    """Writes tensors that the family keeps in float32 as the float checkpoint has them: AutoRound rounds them too."""
    kept = {"BF16": _kept(source, torch.bfloat16), "F16": _kept(source, torch.float16)}
    for file in folder.glob("*.safetensors"):
        written = header(file)
        rounded = {name: kept[one.dtype][name] for name, one in written.items() if name in kept.get(one.dtype, {})}
        if not rounded:
            continue
        with safe_open(file, "pt", backend="pread") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            about = opened.metadata()
        save_tensors(tensors | {name: source.read(own).float() for name, own in rounded.items()}, file, about)


def _kept(source: Checkpoint, dtype: torch.dtype) -> dict[str, str]:
    """Names of the tensors that are float32 in a model of ``dtype``, in the model and on disk -> name on disk."""
    found: dict[str, str] = {}
    for name, tensor in meta_model_of(source.model_class(), source.config, dtype).state_dict().items():
        made_of = source.sources.get(name, [])
        if tensor.dtype == torch.float32 and len(made_of) == 1 and made_of[0].converter is None:
            found |= dict.fromkeys((name, made_of[0].name), made_of[0].name)
    return found


def _run(checkpoint: str, out: str, given: str, group_size: int, iterations: int) -> None:
    """Runs AutoRound; called in a process of its own."""
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    blocks = load_file(Path(given, _TOKENS))["blocks"]
    tuning = {
        "iters": iterations,
        "nsamples": len(blocks),
        "seqlen": blocks.shape[1],
        "dataset": list(blocks.unsqueeze(1)),
    }
    rounder = AutoRound(
        model,
        AutoTokenizer.from_pretrained(checkpoint),
        bits=4,  # for what is not named, which is nothing
        group_size=group_size,
        layer_config=json.loads(Path(given, _LAYER_CONFIG).read_text(encoding="utf-8")),
        device_map="auto" if torch.cuda.is_available() else "cpu",
        **(tuning if iterations else {"iters": 0, "disable_opt_rtn": True}),
    )
    rounder.quantize_and_save(out, format="auto_round")


if __name__ == "__main__":
    _run(*sys.argv[1:4], *map(int, sys.argv[4:]))  # type: ignore[arg-type]
