"""From a float checkpoint to a packed one, a shard at a time: neither model is ever whole in memory.

The module tree is laid out on the meta device, so that names and sizes of everything that will be written are known
before any weight is read. The tensors of each shard then go through transformers' own conversion, are packed, written
under a temporary name and renamed. A run that was killed finds its finished shards by their checksums and goes on.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from threading import Thread

import torch
import xxhash
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging
from transformers.utils.hub import convert_file_size_to_int

from ..checkpoints.checkpoint import CheckpointError, check_quantizing, empty_model, stored_tensors, weight_files
from ..checkpoints.reading import sources_of
from ..files import replaced_when_done, resumable_folder, save_tensors
from ..plans.plan import PrecisionPlan
from ..recording.curvature import Curvature
from ..version import __version__
from . import PlanHfQuantizer, PlanQuantizationConfig
from .checksums import DamagedCheckpointError, check_files, checksums, metadata
from .codec.grid import Grid
from .replace import packed_tensors

_LAYER = re.compile(r"^(?:.*?\.)?\d+(?=\.)")  # up to the first index: a decoder layer
_WRITTEN_HERE = ("*.safetensors", "*.safetensors.index.json", "config.json", "*.bin", "*.pt")


@dataclass(frozen=True)
class Shard:
    """One file to write.

    Attributes:
        file: Its name.
        tensors: Names of what it will hold.
        sources: Names of the float tensors that these are made of.
        nbytes: Bytes of the sources.
        packed_bytes: Bytes of the tensors.
    """

    file: str
    tensors: tuple[str, ...]
    sources: tuple[str, ...]
    nbytes: int
    packed_bytes: int


def quantize_checkpoint(
    checkpoint: str | os.PathLike,
    plan: PrecisionPlan | str | os.PathLike,
    out: str | os.PathLike,
    non_expert_bits: int | None = None,
    curvature: Curvature | str | os.PathLike | None = None,
    grid: Grid | str | os.PathLike | None = None,
    workers: int = 1,
    max_shard_size: int | str = "250MB",
) -> None:
    """Quantizes a float checkpoint by a plan, layer by layer, and copies its tokenizer.

    A process holds one float layer, what transformers needs to convert it, and one packed shard. A run that is
    interrupted leaves its finished shards in a hidden folder beside ``out``; the same call goes on from there. Call it
    below ``if __name__ == "__main__"`` with several workers, which are new Python processes.

    Args:
        checkpoint: Folder of a float checkpoint.
        plan: A plan, or the path of its file.
        out: Folder to write; it appears in one step, when it is complete.
        non_expert_bits: 8 or 4 to quantize the other linear layers too.
        curvature: `Curvature` or the path of its file, for the weights of the fit.
        grid: `Grid` or the path of its file, in the place of a fit.
        workers: Processes that pack layers side by side, with the cores shared among them.
        max_shard_size: Of a packed file, in bytes or as ``"5GB"``; a layer that is larger has a file of its own.

    Raises:
        CheckpointError: The checkpoint is incomplete, or packed already.
        PlanError: The plan is for another model.
    """
    settings = (plan, non_expert_bits, curvature, grid)
    quantization = PlanQuantizationConfig(*settings)
    if workers < 1:
        raise ValueError(f"workers={workers}: expected at least 1")
    max_bytes = _bytes(max_shard_size)
    files = weight_files(checkpoint)
    config = check_quantizing(checkpoint, out, plan, curvature, grid)
    packer = _Packer(checkpoint, quantization)
    packer.check_weights()
    shards = _shards(checkpoint, packer, max_bytes)
    job = _fingerprint(quantization, [Path(checkpoint, "config.json"), *files], shards)
    with resumable_folder(out, job) as folder:
        missing = [shard for shard in shards if not _is_finished(folder / shard.file, shard, quantization.digest())]
        total = sum(shard.nbytes for shard in shards)
        done = total - sum(shard.nbytes for shard in missing)
        with tqdm(total=total, initial=done, desc="Quantizing", unit="B", unit_scale=True, unit_divisor=1024) as bar:
            for shard in _packed(missing, packer, folder, job, workers, settings):
                bar.update(shard.nbytes)
        config.dtype = packer.dtype
        config.quantization_config = quantization
        config.save_pretrained(folder)
        for file in Path(checkpoint).iterdir():  # the tokenizer and whatever else is small
            if file.is_file() and not any(file.match(pattern) for pattern in _WRITTEN_HERE):
                shutil.copy2(file, folder)
        _write_index(folder, shards)


class _Packer:
    """A model on the meta device that is filled for one shard at a time."""

    def __init__(self, checkpoint: str | os.PathLike, quantization: PlanQuantizationConfig) -> None:
        self.checkpoint, self.quantization = checkpoint, quantization
        self.files = weight_files(checkpoint)
        config = AutoConfig.from_pretrained(checkpoint)
        self.dtype = config.dtype = config.dtype or _stored_dtype(checkpoint)
        self.model: PreTrainedModel = empty_model(checkpoint, config)
        self.quantizer = PlanHfQuantizer(quantization, pre_quantized=False)
        self.quantizer.preprocess_model(self.model)
        self._load = LoadStateDictConfig(
            dtype=self.dtype,
            dtype_plan=self.model._get_dtype_plan(self.dtype),
            hf_quantizer=self.quantizer,
            weight_mapping=get_model_conversion_mapping(self.model, None, self.quantizer),
        )

    def check_weights(self) -> None:
        """Reads the routers alone, to see whether curvature and grid are of these weights."""
        if self.quantization.curvature is None and self.quantization.grid is None:
            return
        routers = [layer.shape.router for layer in self.quantization.plan.layers.values()]
        made_of = sources_of(self.model, list(stored_tensors(self.checkpoint)))
        self._read({source.name for router in routers for source in made_of.get(router, [])})
        lost = [router for router in routers if self.model.get_parameter(router).is_meta]
        if lost:
            raise CheckpointError(f"{os.fspath(self.checkpoint)!r} lacks {lost}")
        self.quantization.check_weights(self.quantizer.layers)
        for router in routers:
            _forget(self.model, router)

    @torch.no_grad()
    def _read(self, names: set[str]) -> None:
        """Loads some tensors of the checkpoint into the model, converted and packed."""
        with ExitStack() as opened, _quiet():
            # read and not mapped, so that the memory of a tensor is free again as soon as it is packed
            readers = [opened.enter_context(safe_open(file, "pt", backend="pread")) for file in self.files]
            tensors = {name: reader.get_slice(name) for reader in readers for name in names & set(reader.keys())}
            info, _ = convert_and_load_state_dict_in_model(self.model, tensors, self._load)
        texts = info.conversion_errors.values()
        failed = [(re.findall(r"^[\w.]+Error: (.+)", text, re.M) or [text.strip()])[-1] for text in texts]
        problems = [*failed, *info.mismatched_keys, *info.error_msgs]
        if problems:
            raise CheckpointError(f"{os.fspath(self.checkpoint)!r} cannot be quantized: {problems[0]}")

    def write(self, shard: Shard, folder: Path, job: str) -> None:
        """Reads, packs and writes one shard."""
        self._read(set(shard.sources))
        whole = self.model.state_dict()
        packed = {name: whole[name] for name in shard.tensors}
        empty = [name for name, tensor in packed.items() if tensor.is_meta]
        if empty:
            raise CheckpointError(f"{os.fspath(self.checkpoint)!r} lacks {empty}")
        save_tensors(packed, folder / shard.file, {"format": "pt", **metadata(packed, self.quantization.digest(), job)})
        for name in shard.tensors:
            _forget(self.model, name)


def _forget(model: nn.Module, name: str) -> None:
    """Back to the meta device with one tensor of a model."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        setattr(module, leaf, nn.Parameter(module._parameters[leaf].to("meta"), requires_grad=False))  # type: ignore[union-attr]
    else:
        module._buffers[leaf] = module._buffers[leaf].to("meta")  # type: ignore[union-attr]


def _shards(checkpoint: str | os.PathLike, packer: _Packer, max_bytes: int) -> list[Shard]:
    """What to write, whole layers together, before anything is read.

    Raises:
        CheckpointError: The checkpoint lacks a tensor of the model.
    """
    stored = stored_tensors(checkpoint)
    model = packer.model
    own, targets = model.state_dict(), packer.quantizer.waiting
    sources: dict[str, set[str]] = defaultdict(set)  # layer -> tensors on disk
    unknown = set()
    made_of = sources_of(model, list(stored))
    read = set()  # tensors of the model that the checkpoint has
    for name, tensors in made_of.items():
        read |= {result for source in tensors for result in source.results(name)}
        names = {source.name for source in tensors}
        unknown |= names if name not in own else set()
        sources[_layer(name)] |= names if name in own else set()
    unused = model._keys_to_ignore_on_load_unexpected or []
    unknown = {name for name in unknown if not any(re.search(pattern, name) for pattern in unused)}
    if unknown:
        warnings.warn(f"{len(unknown)} tensors are not in the model and left out: {sorted(unknown)[:3]}", stacklevel=3)
    elsewhere = _tied_to(model, read) - read  # stored under another name
    ignored = model._keys_to_ignore_on_load_missing or []
    missing = [
        name
        for name in own
        if name not in elsewhere | read and not any(re.search(pattern, name) for pattern in ignored)
    ]
    if missing:
        raise CheckpointError(f"{os.fspath(checkpoint)!r} lacks {sorted(missing)}")
    packed = packed_tensors(model, targets, packer.quantizer.plan.group_size)
    groups: list[tuple[list[str], int]] = []  # layers, bytes
    by_layer: dict[str, dict[str, int]] = defaultdict(dict)
    for name, nbytes in packed.items():
        if name in read or name not in own:
            by_layer[_layer(name)][name] = nbytes
    for layer, sizes in by_layer.items():
        size = sum(sizes.values())
        if not groups or groups[-1][1] + size > max_bytes:
            groups.append(([], 0))
        groups[-1] = [*groups[-1][0], layer], groups[-1][1] + size
    one = len(groups) == 1
    return [
        Shard(
            file="model.safetensors" if one else f"model-{number:05d}-of-{len(groups):05d}.safetensors",
            tensors=tuple(name for layer in layers for name in by_layer[layer]),
            sources=tuple(sorted(name for layer in layers for name in sources[layer])),
            nbytes=sum(stored[name].nbytes for layer in layers for name in sources[layer]),
            packed_bytes=size,
        )
        for number, (layers, size) in enumerate(groups, start=1)
    ]


def _tied_to(model: PreTrainedModel, read: set[str]) -> set[str]:
    """All names of the tensors that are read under one of them."""
    groups: dict[str, set[str]] = defaultdict(set)
    for name, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        groups[source] |= {name, source}
    return {name for group in groups.values() if group & read for name in group}


def _stored_dtype(checkpoint: str | os.PathLike) -> torch.dtype:
    """Of the first floating tensor, as transformers takes it where config.json does not say."""
    names = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return next((names[one.dtype] for one in stored_tensors(checkpoint).values() if one.dtype in names), torch.float32)


def _bytes(size: int | str) -> int:
    try:
        found = int(size) if isinstance(size, int) or size.isdigit() else convert_file_size_to_int(size)
    except ValueError:
        found = 0
    if found < 1:
        raise ValueError(f"max_shard_size={size!r}: expected bytes, or a whole number of them like '500MB' or '5GB'")
    return found


def _layer(name: str) -> str:
    """The path of the layer that a tensor belongs to; what is in no list of layers stands alone."""
    layer = _LAYER.match(name)
    return layer.group() if layer else name


def _packed(
    missing: list[Shard], packer: _Packer, folder: Path, job: str, workers: int, settings: tuple
) -> Iterator[Shard]:
    """Writes shards and yields each when it is there; processes get the settings as they were given, paths as paths."""
    if workers == 1 or len(missing) < 2:
        for shard in missing:
            packer.write(shard, folder, job)
            yield shard
        return
    workers = min(workers, len(missing))
    threads = max(1, torch.get_num_threads() // workers)
    start = packer.checkpoint, settings, threads, os.getpid()
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, start) as pool:
        jobs = {pool.submit(_work, shard, folder, job): shard for shard in missing}
        try:
            for done in as_completed(jobs):
                done.result()
                yield jobs[done]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_of_worker: dict[str, _Packer] = {}


def _start_worker(checkpoint: str | os.PathLike, settings: tuple, threads: int, parent: int) -> None:
    Thread(target=_die_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the process that started this one has told them
        _of_worker["packer"] = _Packer(checkpoint, PlanQuantizationConfig(*settings))


def _die_with(parent: int) -> None:
    """Ends this process soon after the one that started it, which may have been killed."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _work(shard: Shard, folder: Path, job: str) -> None:
    _of_worker["packer"].write(shard, folder, job)


def _fingerprint(quantization: PlanQuantizationConfig, files: list[Path], shards: list[Shard]) -> str:
    """The same for a run that would write the same shards."""
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    fit = [checksums(tensors) for tensors in _tensors_of(quantization.curvature, quantization.grid)]
    job = [__version__, quantization.to_dict(), [asdict(shard) for shard in shards], stats, fit]
    return xxhash.xxh3_128(json.dumps(job, sort_keys=True).encode()).hexdigest()


def _tensors_of(curvature: Curvature | None, grid: Grid | None) -> list[dict[str, Tensor]]:
    """All tensors that a fit depends on."""
    kinds = [] if curvature is None else [curvature.rows, curvature.columns]
    kinds += [] if grid is None else [grid.scales, grid.offsets]
    return [{f"{layer}.{p}": t for layer, of in kind.items() for p, t in of.items()} for kind in kinds]


def _is_finished(file: Path, shard: Shard, config: str) -> bool:
    """Whether an interrupted run has left this shard, whole."""
    if not file.is_file():
        return False
    try:
        check_files([file], config)
        with safe_open(file, "pt") as opened:
            return set(opened.keys()) == set(shard.tensors)
    except DamagedCheckpointError:
        return False


def _write_index(folder: Path, shards: list[Shard]) -> None:
    if len(shards) == 1:
        return
    size = sum(shard.packed_bytes for shard in shards)
    where = {name: shard.file for shard in shards for name in shard.tensors}
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
    with replaced_when_done(folder / "model.safetensors.index.json") as temporary:
        temporary.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own bar for every shard."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
