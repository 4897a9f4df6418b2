"""`quantize_checkpoint`: all checks first, then the shards that are not there yet, then config, tokenizer and index."""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers.utils.hub import convert_file_size_to_int

from ...autocast import without_autocast
from ...checkpoints.checkpoint import Checkpoint, opened
from ...checkpoints.folders import check_quantizing, folder_of_job, resumable_folder
from ...checkpoints.other_files import copy_other_files
from ...files import replaced_when_done
from ...plans.plan import PrecisionPlan
from ...recording.curvature import Curvature
from ...recording.statistics import ExpertStatistics
from ..card import write_card
from ..codec.grid import Grid
from ..config import PlanQuantizationConfig
from .packer import Packer
from .ranks import RankError, Ranks, seen
from .resume import fingerprint, is_finished, parts
from .shards import Shard, divided, shards_of
from .workers import Settings, written


@without_autocast()
def quantize_checkpoint(
    checkpoint: Checkpoint | str | os.PathLike[str],
    plan: PrecisionPlan | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    non_expert_bits: int | None = None,
    curvature: Curvature | str | os.PathLike[str] | None = None,
    grid: Grid | str | os.PathLike[str] | None = None,
    statistics: ExpertStatistics | str | os.PathLike[str] | None = None,
    workers: int = 1,
    max_shard_size: int | str = "250MB",
    ranks: Ranks | None = None,
) -> None:
    """Quantizes a float checkpoint by a plan, layer by layer, and copies its tokenizer and whatever else belongs to it.

    A process holds one float layer, what transformers needs to convert it, and one packed shard. If a run ends early,
    its finished shards stay in a hidden folder beside ``out``, and the same call resumes from there. With several
    workers, which are new Python processes, call it below ``if __name__ == "__main__"``.

    Args:
        checkpoint: Folder of a float checkpoint, or an open `Checkpoint`.
        plan: A plan, or the path of its file.
        out: Folder to write; it appears in one step, when it is complete.
        non_expert_bits: 8 or 4 to quantize the other linear layers too.
        curvature: `Curvature` or the path of its file, for the weights of the fit.
        grid: `Grid` or the path of its file, instead of a fit.
        statistics: `ExpertStatistics` or the path of their file, which the fit rounds under. From a file, a process
            reads the second moment of one matrix at a time.
        workers: Processes that pack layers side by side, with the cores shared among them.
        max_shard_size: Largest packed file, in bytes or as ``"5GB"``; a larger layer gets a file of its own.
        ranks: `all_ranks`, to divide the files among the processes that torchrun has started, on one machine or
            several: each makes this call, into a folder that all see, and returns when ``out`` is complete.

    Raises:
        CheckpointError: The checkpoint is incomplete, or packed already, or a weight cannot be converted or packed.
        PlanError: The plan is for another model.
        RankError: Another rank has other arguments or files, does not see the folder, or has ended early.

    Example:
        >>> quantize_checkpoint("checkpoint", "precision_plan.json", "packed")
        >>> load_model("packed").is_quantized
        True
    """
    settings: Settings = {
        "plan": plan,
        "non_expert_bits": non_expert_bits,
        "curvature": curvature,
        "grid": grid,
        "statistics": statistics,
    }
    quantization = PlanQuantizationConfig(**settings)
    if workers < 1:
        raise ValueError(f"workers={workers}: expected at least 1")
    max_bytes = _bytes(max_shard_size)
    ranks = ranks or Ranks()
    with opened(checkpoint) as source:
        check_quantizing(source, out, plan, curvature, grid, statistics)
        packer = Packer(source, quantization)
        packer.check_weights()
        shards = shards_of(source, packer.model, packer.quantizer.waiting, quantization.plan.group_size, max_bytes)
        of_job = parts(source, quantization, shards)
        ranks.check_same({"torch or transformers": f"{torch.__version__} {transformers.__version__}", **of_job})
        job = fingerprint(of_job)
        with _folder(out, job, ranks) as folder:
            _write_shards(shards, packer, folder, job, workers, settings, ranks)
            if ranks.first:
                _check_there(shards, folder)
                _write_config(source, quantization, folder)
                _write_index(folder, shards)
                write_card(source, folder, sum(shard.packed_bytes for shard in shards), quantization)
                copy_other_files(source.folder, folder)  # but for the card, which is there
        ranks.gathered()  # once all is in its place


@contextmanager
def _folder(out: str | os.PathLike[str], job: str, ranks: Ranks) -> Iterator[Path]:
    """The hidden folder that all ranks write into; rank 0 makes it, and has it take its place."""
    if not ranks.first:
        ranks.check_shared(folder := folder_of_job(out, job))
        yield folder
        return
    with resumable_folder(out, job) as folder:
        ranks.check_shared(folder)
        yield folder


def _write_shards(
    shards: list[Shard], packer: Packer, folder: Path, job: str, workers: int, settings: Settings, ranks: Ranks
) -> None:
    """Writes this rank's part of what an earlier run did not finish, with a bar over the bytes of all sources."""
    digest = packer.quantization.digest()
    unfinished = [
        shard.file for shard in shards[ranks.rank :: ranks.size] if not is_finished(folder / shard.file, shard, digest)
    ]
    for file in unfinished:  # a damaged one is none that is there
        (folder / file).unlink(missing_ok=True)
    of_all = {file for said in ranks.gathered(json.dumps(unfinished)) for file in json.loads(said)}
    missing = [shard for shard in shards if shard.file in of_all]
    done = {shard.file for shard in shards} - of_all
    if ranks.first and done:
        tqdm.write(f"goes on: {len(done)} of {len(shards)} files were packed by an earlier run", file=sys.stderr)
    with (
        closing(written(divided(missing, ranks.size)[ranks.rank], packer, folder, job, workers, settings)) as writing,
        tqdm(
            total=sum(shard.nbytes for shard in shards),
            initial=sum(shard.nbytes for shard in shards if shard.file in done),
            desc="Quantizing",
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            disable=not ranks.first,
        ) as bar,
    ):

        def look() -> None:
            """Moves the bar by what is there now, whoever wrote it."""
            new = [shard for shard in missing if shard.file not in done and (folder / shard.file).exists()]
            done.update(shard.file for shard in new)
            bar.update(sum(shard.nbytes for shard in new))

        for _ in writing:
            look()
            ranks.check()
        ranks.gathered(watch=look)  # once all have packed theirs
        look()


def _check_there(shards: list[Shard], folder: Path) -> None:
    """Raises `RankError` if a file is not there that a rank has written."""
    if not seen(*(folder / shard.file for shard in shards)):
        lost = [shard.file for shard in shards if not (folder / shard.file).exists()]
        raise RankError(
            f"{len(lost)} of {len(shards)} packed files are not in {str(folder)!r}, such as {lost[0]!r}: they were "
            "removed while ranks were writing, or the file system does not show them. Start the same command again"
        )


def _write_config(source: Checkpoint, quantization: PlanQuantizationConfig, folder: Path) -> None:
    config = copy.deepcopy(source.config)
    config.dtype = source.dtype
    config.quantization_config = quantization
    config.save_pretrained(folder)


def _write_index(folder: Path, shards: list[Shard]) -> None:
    if len(shards) == 1:
        return
    size = sum(shard.packed_bytes for shard in shards)
    where = {name: shard.file for shard in shards for name in shard.tensors}
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
    with replaced_when_done(folder / "model.safetensors.index.json") as temporary:
        temporary.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _bytes(size: int | str) -> int:
    try:
        found = int(size) if isinstance(size, int) or size.isdigit() else convert_file_size_to_int(size)
    except ValueError:
        found = 0
    if found < 1:
        raise ValueError(f"max_shard_size={size!r}: expected bytes, or a whole number of them like '500MB' or '5GB'")
    return found
