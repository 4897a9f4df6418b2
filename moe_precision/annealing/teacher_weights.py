"""Where a teacher's weights come from: a checkpoint, the model when annealing begins, or the file that keeps those."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.tensor_file import TensorFile, named
from ..quantize.codec.grid import Grid
from .covers import AnnealError
from .teacher import saved_tensors, taught

_NO_PART = frozenset(  # entries of a config that predictions do not depend on
    [
        "architectures",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "initializer_range",
        "experts_implementation",
        "attn_implementation",
        "output_router_logits",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "router_jitter_noise",
        "initializer_factor",
        "max_position_embeddings",
        "id2label",
        "label2id",
        "problem_type",
        "chunk_size_feed_forward",
    ]
)
_NO_PART_ENDS = ("dropout", "dropout_rate", "_token_id", "_coef")
_FILE = TensorFile("moe-precision-teacher", 1, AnnealError, "teacher")


def teacher_weights(checkpoint: str | os.PathLike[str], model: nn.Module) -> dict[str, Tensor]:
    """The weights of a float checkpoint for a model that is trained, checked to be of its class and shapes.

    Args:
        checkpoint: Folder, or a name in the Hub's cache.
        model: The model, or what is around it.

    Returns:
        Name in the transformers model -> tensor on the CPU, in the dtype of the model's own.

    Raises:
        AnnealError: The checkpoint is quantized or incomplete, or of another class, vocabulary, shape or config.
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
            first = "".join(f"; {one!r} is {shapes[0].get(one)} there, {shapes[1].get(one)} here" for one in apart[:1])
            if any(".base_layer." in name for name in shapes[1]):
                first += "; it has adapters, which no checkpoint of the base model has: teacher='start' has them too"
            raise AnnealError(
                f"{teacher} is a {its.__name__}, the model that is trained a {type(root).__name__}{first}: give the "
                "float checkpoint that training starts from, or another of the same shapes"
            )
        configs = (json.loads(config.to_json_string(use_diff=False)) for config in (opened.config, root.config))
        if other := _computes_otherwise(*configs):
            raise AnnealError(
                f"the config.json of {teacher} says {other[0]}={other[1]!r}, that of the model {other[2]!r}: its "
                "weights would run under the model's. Give a teacher of the same config"
            )
        found, info = opened.load(dtype=next(root.parameters()).dtype, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        raise AnnealError(f"{teacher} lacks weights of the model, {missing[0]!r} the first of {len(missing)}")
    return {name: tensor.detach() for name, tensor in saved_tensors(found).items()}


def _computes_otherwise(its: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first entry of two configs that differs and that predictions may depend on, with both values."""
    for key in sorted((its.keys() | own.keys()) - _NO_PART):
        left, right = its.get(key), own.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            if (inner := _computes_otherwise(left, right)) is not None:
                return f"{key}.{inner[0]}", *inner[1:]
        elif left != right and not key.startswith("_") and not key.endswith(_NO_PART_ENDS):
            return key, left, right
    return None


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


def digest_of(weights: Mapping[str, Tensor]) -> str:
    """What identifies a teacher: a hash of its weights' names and values, in bfloat16, so that a copy of another float
    dtype is the same teacher.
    """
    total = xxhash.xxh3_64()
    for name, weight in sorted(weights.items()):
        values = weight.detach().to(torch.bfloat16) if weight.is_floating_point() else weight.detach()
        total.update(name.encode() + str(tuple(weight.shape)).encode())
        total.update(values.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _digest(grid: Grid) -> str:
    """Of its scales, which are fitted to the weights of one run."""
    total = xxhash.xxh3_64()
    for name, scale in sorted(named("scales", grid.scales).items()):
        total.update(name.encode() + scale.cpu().contiguous().numpy().tobytes())
    return total.hexdigest()
