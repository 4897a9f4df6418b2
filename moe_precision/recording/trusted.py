"""Which optimizers hold what curvature needs: for each weight, a running mean of its own squared gradient.

Many more keep a tensor under the same name that is something else: the squared gradient with the L2 penalty in it
(coupled weight decay), in another basis (SOAP), of a normalized gradient (StableSPAM), or weighted by a growing
learning rate (Prodigy). Read as curvature it gives plans that are up to three times as costly, and nothing shows it. So
only those that were compared with independently taken squared gradients are read (docs/recording.md); any other is
refused by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Container, Mapping
from typing import Any

import torch

_DECOUPLED = "decoupled"  # weight decay never enters the moment
_BY_GROUP = "by group"  # the group's key "decoupled_weight_decay" says whether it does
_BY_ATTRIBUTE = "by attribute"  # the optimizer's attribute "is_adamw" says it

_KNOWN = {  # package and class that defines `step`
    ("torch", "Adam"): _BY_GROUP,  # AdamW too
    ("torch", "AdamW"): _DECOUPLED,  # where it is no subclass of Adam
    ("torch", "NAdam"): _BY_GROUP,
    ("torch", "RAdam"): _BY_GROUP,
    ("torch", "Adafactor"): _DECOUPLED,
    ("transformers", "Adafactor"): _DECOUPLED,
    ("torchao", "_AdamBase"): _BY_ATTRIBUTE,
    ("bitsandbytes", "Optimizer8bit"): _DECOUPLED,
}
COARSE = 2**-7  # a 16-bit moment that should lose less than this share of itself per step does not decay at all
HALF = (torch.bfloat16, torch.float16)
_WRAPPERS = ("pytorch_lightning", "lightning", "lightning_fabric", "accelerate", "deepspeed")  # change no gradient


def problem_of(optimizer: Any, of: Container[int] | None = None) -> str | None:
    """Why an optimizer's second moments cannot be taken as running means of squared gradients; None if they can.

    Args:
        optimizer: A torch optimizer, or Lightning's or accelerate's wrapper around one.
        of: Ids of the parameters whose moments count; None for all.

    Example:
        >>> import torch
        >>> weights = [torch.nn.Parameter(torch.zeros(2, 2))]
        >>> problem_of(torch.optim.AdamW(weights))
        >>> problem_of(torch.optim.Adam(weights, weight_decay=0.1)).split(", so")[0]
        'torch.optim.Adam adds the weight decay of 0.1 to the gradient'
    """
    known_wrapper = type(optimizer).__module__.split(".")[0] in _WRAPPERS
    inner = getattr(optimizer, "optimizer", optimizer) if known_wrapper else optimizer
    name = f"{type(inner).__module__.split('.')[0]}.{type(inner).__name__}"
    step = inspect.unwrap(getattr(type(inner), "step", problem_of))
    decay = _KNOWN.get((step.__module__.split(".")[0], step.__qualname__.split(".")[0]))
    coarse = any(base.__name__.endswith("4bit") for base in type(inner).__mro__)  # 4 bits round small moments up
    if decay is None or coarse:
        return f"{name} is not among the optimizers whose moments were found to be means of squared gradients"
    for group in inner.param_groups:
        if of is not None and not any(id(parameter) in of for parameter in group["params"]):
            continue
        amount = group.get("weight_decay", 0)
        coupled = (decay == _BY_GROUP and not group.get("decoupled_weight_decay", False)) or (
            decay == _BY_ATTRIBUTE and not getattr(inner, "is_adamw", False)
        )
        if amount and coupled:
            shown = name.replace("torch.", "torch.optim.", 1) if name.startswith("torch.") else name
            return (
                f"{shown} adds the weight decay of {amount:g} to the gradient, so that its moment is not of the "
                "gradient: take AdamW"
            )
    return None


def problem_in_half(optimizer: Any, group: Mapping[str, Any], parameter: torch.Tensor) -> str | None:
    """Why a 16-bit weight will have no second moment that decays, known before the first step; None if it will.

    torch's own optimizers keep moments in the dtype of the weight; the others that are read keep float32 or codes.

    Args:
        optimizer: As in `problem_of`.
        group: The optimizer's group that trains the weight.
        parameter: The weight.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    step = inspect.unwrap(getattr(type(inner), "step", problem_of))
    if parameter.dtype not in HALF or step.__module__.split(".")[0] != "torch":
        return None
    if step.__qualname__.startswith("Adafactor"):
        return f"Adafactor's moments in {parameter.dtype} hardly decay: train in float32"
    return moment_in_half(parameter.dtype, float(group.get("betas", (0.0, 0.0))[1]))


def moment_in_half(dtype: torch.dtype, beta: float) -> str | None:
    """Why a second moment of Adam's in a dtype does not decay at a rate; None if it does."""
    if dtype in HALF and 0 < 1 - beta < COARSE:
        return f"a moment in {dtype} hardly decays with beta2={beta:g}: train in float32"
    return None
