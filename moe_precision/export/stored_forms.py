"""How other tools store one quantized matrix: its bits and its group size from the shapes of its packed tensors.

Which form to expect is what the config says; a form is read only where the shapes agree with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..checkpoints.headers import CheckpointError, StoredTensor

Tensors = Mapping[str, StoredTensor]
GPTQ, AWQ, COMPRESSED_TENSORS, MLX = "gptq", "awq", "compressed-tensors", "mlx"
TORCHAO, MODELOPT = "torchao", "modelopt"
_FORMS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {  # quant_method -> keys of the config, their value -> form
    "gptq": (("checkpoint_format",), dict.fromkeys(("gptq", "gptq_v2", "gptq_p"), GPTQ)),
    "auto-round": (
        ("packing_format",),
        dict.fromkeys(("auto_round", "auto_round:auto_gptq", "auto_round:gptqmodel"), GPTQ)
        | {"auto_round:auto_awq": AWQ},
    ),
    "awq": (("version", "checkpoint_format"), {"gemm": AWQ}),
    "compressed-tensors": (
        ("format",),
        dict.fromkeys(
            (
                "pack-quantized",
                "int-quantized",
                "naive-quantized",
                "dense",
                "mixed-precision",
                "nvfp4-pack-quantized",
                "mxfp4-pack-quantized",
            ),
            COMPRESSED_TENSORS,
        ),
    ),
    "mlx": (("mode",), {"affine": MLX}),
    "modelopt": (
        ("quant_algo",),
        dict.fromkeys(("nvfp4", "nvfp4_awq", "fp8", "mixed_precision"), MODELOPT),
    ),
    "torchao": ((), {"": TORCHAO}),  # the files say it of each tensor
}
METHODS = tuple(_FORMS)
PACKED = (
    ".qweight",
    ".weight_packed",
    "_blocks",
    ".weight_scale",
    ".weight_scale_inv",
    "_qdata",
)  # names that no float model has


@dataclass(frozen=True)
class Stored:
    """How one matrix is stored: its bits, and how many weights share a scale (None where it is not quantized)."""

    bits: int
    group_size: int | None


def form_of(quantization: Mapping[str, Any], name: str) -> str:
    """The form in which a checkpoint's experts are stored, by what its config says.

    Args:
        quantization: Its ``quantization_config``.
        name: The checkpoint, for messages.

    Raises:
        CheckpointError: A quantizer or a form that is not known.
    """
    method = quantization.get("quant_method")
    if method not in _FORMS:
        raise CheckpointError(
            f"{name} was quantized by {method!r}; supported are {', '.join(METHODS)} and moe_precision"
        )
    keys, forms = _FORMS[method]
    stated = [(key, quantization.get(key)) for key in keys]
    if method == "compressed-tensors":  # a group may have a format of its own
        stated += [("format", group.get("format")) for group in (quantization.get("config_groups") or {}).values()]
    if method == "modelopt":  # and so may a module, where they differ
        modules = (quantization.get("quantized_layers") or {}).values()
        stated += [("quant_algo", module.get("quant_algo")) for module in modules]
        if quantization.get("quant_algo") is None:
            raise CheckpointError(f"{name} was quantized by 'modelopt', but does not state its quant_algo")
    said = [(key, one) for key, one in stated if one is not None]
    for key, one in said:
        if str(one).lower() not in forms:
            raise CheckpointError(
                f"{name} was quantized by {method!r} with {key}={one!r}, whose bits cannot be read; known are "
                f"{', '.join(forms)}"
            )
    return forms[str(said[0][1]).lower()] if said else next(iter(forms.values()))


def widths_of(quantization: Mapping[str, Any]) -> list[int]:
    """The integer widths that compressed-tensors' config groups name, ascending."""
    groups = (quantization.get("config_groups") or {}).values()
    weights = [group.get("weights") or {} for group in groups]
    return sorted({of_group["num_bits"] for of_group in weights if of_group.get("type") == "int"})


def dense(bits: int, inp: int) -> int:
    """Words per row of ``inp`` codes without a gap."""
    return math.ceil(inp * bits / 32)


def loose(bits: int, inp: int) -> int:
    """Words per row where no code crosses the end of a word, as compressed-tensors once packed."""
    return math.ceil(inp / (32 // bits))


def gptq(name: str, tensors: Tensors, out: int, inp: int) -> Stored:
    """``qweight`` is ``(in * bits / 32, out)`` int32, ``scales`` are ``(in / group, out)``.

    Alike for ``gptq``, ``gptq_v2`` and ``gptq_p``, which differ in their zeros and in the order of the bits.
    """
    packed = tensors[f"{name}.qweight"]
    rows, columns = packed.shape if len(packed.shape) == 2 else (0, 0)
    bits, rest = divmod(32 * rows, inp)
    fits = packed.dtype == "I32" and columns == out and rest == 0 and 1 <= bits <= 8
    check(fits, f"{name}.qweight", packed, ("in * bits / 32", out))
    return Stored(bits, _group_size(name, f"{name}.scales", 0, tensors, inp))


def awq(name: str, tensors: Tensors, out: int, inp: int) -> Stored:
    """``qweight`` is ``(in, out * bits / 32)`` int32, ``scales`` are ``(in / group, out)``."""
    packed = tensors[f"{name}.qweight"]
    rows, columns = packed.shape if len(packed.shape) == 2 else (0, 0)
    bits, rest = divmod(32 * columns, out)
    fits = packed.dtype == "I32" and rows == inp and rest == 0 and 1 <= bits <= 8
    check(fits, f"{name}.qweight", packed, (inp, "out * bits / 32"))
    return Stored(bits, _group_size(name, f"{name}.scales", 0, tensors, inp))


def compressed(
    name: str, tensors: Tensors, out: int, inp: int, named: list[int], words: Callable[[int, int], int]
) -> Stored:
    """``weight_packed`` is ``(out, words)`` int32, or FP4 as ``(out, in / 2)`` bytes.

    The config's groups say which widths are meant.

    With empty ends 7 and 8 bits fill the same number of words: the smaller is taken, which differs from `dense`'s.
    """
    packed = tensors[f"{name}.weight_packed"]
    rows, filled = packed.shape if len(packed.shape) == 2 else (0, 0)
    if packed.dtype == "U8":  # FP4: two values in a byte, NVFP4 in groups of 16, MXFP4 of 32
        stored = Stored(4, _group_size(name, f"{name}.weight_scale", 1, tensors, inp))
        fits = (rows, 2 * filled) == (out, inp) and stored.group_size in (16, 32)
        check(fits, f"{name}.weight_packed", packed, (out, "in / 2, with scales for 16 or 32 weights"))
        return stored
    fitting = [bits for bits in named if filled == words(bits, inp)]
    fits = packed.dtype == "I32" and rows == out and len(fitting) > 0
    check(fits, f"{name}.weight_packed", packed, (out, f"words for one of {named} bits"))
    return Stored(fitting[0], _group_size(name, f"{name}.weight_scale", 1, tensors, inp))


def modelopt(name: str, tensors: Tensors, out: int, inp: int) -> Stored:
    """``weight`` is NVFP4 as ``(out, in / 2)`` bytes, FP8 as ``(out, in)``, or float.

    NVFP4 has a scale for 16 weights, ``(out, in / 16)`` in FP8; FP8 one for the matrix, or one for each row.
    """
    weight, scale = tensors[f"{name}.weight"], tensors.get(f"{name}.weight_scale")
    if weight.dtype == "U8":
        stored = Stored(4, _group_size(name, f"{name}.weight_scale", 1, tensors, inp))
        scale_dtype = tensors[f"{name}.weight_scale"].dtype
        fits = weight.shape == (out, inp // 2) and stored.group_size == 16 and scale_dtype == "F8_E4M3"
        check(fits, f"{name}.weight", weight, (out, "in / 2, with FP8 scales for 16 weights"))
        return stored
    if weight.dtype == "F8_E4M3":
        fits = weight.shape == (out, inp) and scale is not None and math.prod(scale.shape) in (1, out)
        check(fits, f"{name}.weight", weight, (out, "in, with one scale, or one for each row"))
        return Stored(8, inp)
    check(weight.is_float and weight.shape == (out, inp) and scale is None, f"{name}.weight", weight, (out, inp))
    return Stored(16, None)


def mlx(name: str, tensors: Tensors, experts: int, out: int, inp: int) -> Stored:
    """``weight`` of all experts is ``(E, out, in * bits / 32)`` uint32, ``scales`` are ``(E, out, in / group)``."""
    packed = tensors[f"{name}.weight"]
    if packed.is_float:
        check(packed.shape == (experts, out, inp), f"{name}.weight", packed, (experts, out, inp))
        return Stored(16, None)
    words = packed.shape[2] if len(packed.shape) == 3 else 0
    bits, rest = divmod(32 * words, inp)
    fits = packed.dtype == "U32" and packed.shape[:2] == (experts, out) and rest == 0 and 1 <= bits <= 8
    check(fits, f"{name}.weight", packed, (experts, out, "in * bits / 32"))
    return Stored(bits, _group_size(name, f"{name}.scales", 2, tensors, inp))


def in_bytes(name: str, tensors: Tensors, out: int, inp: int, named: list[int]) -> Stored:
    """``weight`` is ``(out, in)``: float, or int8 where the config names 8 bits alone, since bytes show no width."""
    weight = tensors[f"{name}.weight"]
    if weight.dtype == "I8" and weight.shape == (out, inp) and named == [8]:
        return Stored(8, _group_size(name, f"{name}.weight_scale", 1, tensors, inp))
    check(weight.is_float and weight.shape == (out, inp), name, weight, (out, inp))
    return Stored(16, None)


def _group_size(name: str, scale: str, dimension: int, tensors: Tensors, inp: int) -> int:
    shape = tensors[scale].shape if scale in tensors else ()
    groups = shape[dimension] if len(shape) == max(2, dimension + 1) else 0
    if groups < 1 or inp % groups:
        raise CheckpointError(f"{name!r}: {scale!r} is missing or does not divide {inp} input columns into groups")
    return inp // groups


def check(fits: bool, name: str, tensor: StoredTensor, expected: tuple[object, ...]) -> None:
    """Raises `CheckpointError` unless a tensor fits its form."""
    if not fits:
        raise CheckpointError(
            f"{name!r} is {tensor.dtype} {tensor.shape}, expected {expected} for the model of config.json; this form "
            "of a quantized weight cannot be read"
        )
