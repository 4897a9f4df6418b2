"""Where a teacher's weights come from: a checkpoint, the model when annealing begins, or the file that keeps those."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
import xxhash
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.tensor_file import TensorFile, named
from ..quantize.codec.grid import Grid
from .covers import AnnealError
from .teacher import saved_tensors, taught

_FILE = TensorFile("moe-precision-teacher", 1, AnnealError, "teacher")


def teacher_weights(checkpoint: str | os.PathLike[str], model: nn.Module) -> dict[str, Tensor]:
    """The weights of a float checkpoint for a model that is trained, checked to be of its class and shapes.

    Args:
        checkpoint: Folder, or a name in the Hub's cache.
        model: The model, or what is around it.

    Returns:
        Name in the transformers model -> tensor on the CPU, in the dtype of the model's own.

    Raises:
        AnnealError: The checkpoint is quantized, or of another class, vocabulary or shape.
        CheckpointError: The folder is missing or damaged.
    """
    root, teacher = taught(model), f"the teacher {str(checkpoint)!r}"
    with Checkpoint(checkpoint) as opened:
        if opened.is_quantized:
            raise AnnealError(f"{teacher} is quantized: give the float checkpoint that it was made of")
        words, own_words = (getattr(config, "vocab_size", None) for config in (opened.config, root.config))
        if words != own_words:
            raise AnnealError(f"{teacher} has a vocabulary of {words} tokens, the model that is trained {own_words}")
        its = opened.model_class()
        models = opened.meta_model(), root
        shapes = [{name: tuple(one.shape) for name, one in saved_tensors(of).items()} for of in models]
        apart = sorted(name for name in set().union(*shapes) if shapes[0].get(name) != shapes[1].get(name))
        if not isinstance(root, its) or apart:  # FSDP2 makes a class of its own
            first = (
                f", and {apart[0]!r} is {shapes[0].get(apart[0])} there, {shapes[1].get(apart[0])} here"
                if apart
                else ""
            )
            raise AnnealError(
                f"{teacher} is a {its.__name__}, the model that is trained a {type(root).__name__}{first}: give the "
                "float checkpoint that training starts from, or another of the same shapes"
            )
        found, info = opened.load(dtype=next(root.parameters()).dtype, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        raise AnnealError(f"{teacher} lacks weights of the model, {missing[0]!r} the first of {len(missing)}")
    return {name: tensor.detach() for name, tensor in saved_tensors(found).items()}


@torch.no_grad()
def weights_now(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model as they are, copied; a collective under FSDP2, which takes them to the CPU.

    Args:
        model: The model, or what is around it.

    Returns:
        Name in the transformers model -> whole tensor.
    """
    return {
        name: one.full_tensor().cpu() if isinstance(one, DTensor) else one.detach().clone()
        for name, one in saved_tensors(taught(model)).items()
    }


def save_teacher(path: str | os.PathLike[str], weights: Mapping[str, Tensor], grid: Grid) -> None:
    """Writes the teacher of a run, for when it is resumed: names, tensors, and which grid it belongs to."""
    _FILE.save(path, {name: weight.contiguous() for name, weight in weights.items()}, grid=_digest(grid))


def load_teacher(path: str | os.PathLike[str], model: nn.Module, grid: Grid) -> dict[str, Tensor]:
    """Reads what `save_teacher` has written.

    Raises:
        AnnealError: It is missing, damaged, of another run, or of a model with other weights.
    """
    name, root = os.fspath(path), taught(model)
    if not os.path.isfile(path):
        raise AnnealError(
            f"training resumes with teacher='start', and {name!r}, which holds the model as it was when annealing "
            "began, is gone: put it back, or give the checkpoint of that model as the teacher"
        )
    found = _FILE.load(path)
    if found.text("grid") != _digest(grid):
        raise AnnealError(
            f"{name!r} is the teacher of another run than the checkpoint that training resumes from: give the "
            "checkpoint of the model as it was when annealing began as the teacher"
        )
    return {key: found.tensor(key, tuple(one.shape)) for key, one in saved_tensors(root).items()}


def _digest(grid: Grid) -> str:
    """Of its scales, which are fitted to the weights of one run."""
    total = xxhash.xxh3_64()
    for name, scale in sorted(named("scales", grid.scales).items()):
        total.update(name.encode() + scale.cpu().contiguous().numpy().tobytes())
    return total.hexdigest()
