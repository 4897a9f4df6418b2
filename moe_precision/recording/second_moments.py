"""Curvature from an optimizer that has trained the experts: it holds a running mean of every squared gradient.

That second moment estimates the diagonal of the empirical Fisher matrix, at no cost beyond reading it.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..compat import held_by_deepspeed
from ..layers.module_tree import Weight
from ..layers.moe_layers import MoELayer
from .curvature import Curvature, CurvatureError, Means, row_and_column_means, stacks_of
from .masters import innermost
from .trusted import HALF, moment_in_half, problem_of

_BNB_BLOCK = 256  # weights that share a scale in bitsandbytes' optimizer state


def curvature_of(layers: list[MoELayer], optimizers: Iterable[Any]) -> Curvature:
    """Reads the second moments of all expert weights from Adam-like optimizers; a collective under FSDP2 and DeepSpeed.

    Optimizers that `problem_of` accepts: AdamW, Adam without coupled weight decay, and their kin in torch, torchao and
    bitsandbytes, 8-bit states included, and Adafactor, whose state is these very means. Of those inside DeepSpeed's
    ZeRO one whole tensor at a time is put together from the parts of all processes.

    The optimizer skips an expert with parameters of its own in a step where it got no token, so that its moment is a
    mean over fewer steps. It is scaled by the share of the layer's steps that the expert took part in, which puts it on
    the scale of a slice of a fused bank, whose gradient in such a step is zero.

    Args:
        layers: As found by `find_moe_layers`.
        optimizers: Optimizers that have taken a step; Lightning's or accelerate's wrappers are looked through.

    Raises:
        CurvatureError: An expert weight has no second moment that can be trusted in any of them: the optimizer is of
            another kind, the experts are frozen, or its state is a flat shard (FSDP1) or too coarse.
    """
    optimizers = list(optimizers)
    experts = {id(weight.parameter()) for layer in layers for bank in layer.banks.values() for weight in bank.weights}
    stacks = stacks_of(layers)
    moments, problems = _second_moments(optimizers, experts, stacks)
    held = [weight for layer in layers for bank in layer.banks.values() for weight in bank.weights]
    held = [weight for weight in held if held_by_deepspeed(weight.parameter())]
    _add_deepspeed(held, optimizers, stacks, moments, problems)
    steps = _steps_of(layers, moments)

    def means_of(weight: Weight) -> Means | None:
        found = moments.get(id(weight.parameter()))
        if found is None:
            problem = problems.get(id(weight.parameter()), "the optimizer has none: are the experts frozen?")
            raise _cannot(weight, problem)
        if found.means is None:
            return None
        rows, columns = found.means
        shape = stacks.get(id(weight.parameter()), weight.shape)
        if tuple(rows.shape) != shape[:-1] or tuple(columns.shape) != (*shape[:-2], shape[-1]):
            raise _cannot(weight, "the optimizer's has another shape: is its state in flat shards (FSDP1)?")
        share = found.step / steps[id(weight.parameter())]
        return rows * share, columns * share

    return Curvature.of(layers, means_of)


def _cannot(weight: Weight, problem: str) -> CurvatureError:
    return CurvatureError(
        f"no second moment of shape {weight.shape} for {weight.name!r} can be read: {problem}. curvature_batches=N "
        "of the callbacks takes squared gradients of N more batches instead, whatever the optimizer; in a loop of your "
        "own recording.gradients.curvature_of_losses does"
    )


class _Moment(NamedTuple):
    means: Means | None  # None: in training, and never had a gradient
    step: float


def _second_moments(
    optimizers: Iterable[Any], experts: Container[int], stacks: Mapping[int, tuple[int, ...]]
) -> tuple[dict[int, _Moment], dict[int, str]]:
    """By parameter id: the means of its second moment, unbiased, or why there are none; of others the step alone."""
    found: dict[int, _Moment] = {}
    problems: dict[int, str] = {}
    for optimizer in optimizers:
        inner = getattr(optimizer, "optimizer", optimizer)
        for group in inner.param_groups:
            problem = problem_of(optimizer, {id(parameter) for parameter in group["params"]})
            beta = float(group.get("betas", (0.0, 0.0))[1])
            for parameter in group["params"]:
                key, state = id(parameter), inner.state.get(parameter, {})
                if problem is not None:
                    problems[key] = problem
                elif not state:
                    if parameter.requires_grad:
                        found[key] = _Moment(None, 0.0)
                else:
                    try:
                        expert = key in experts
                        step = _Moment(None, float(state["step"]))
                        found[key] = _moment(state, parameter, beta, stacks.get(key)) if expert else step
                    except (ValueError, RuntimeError, KeyError, AttributeError, TypeError) as error:
                        problems[key] = f"the optimizer's state is unlike any known one ({error})"
    return found, problems


def _add_deepspeed(
    weights: list[Weight],
    optimizers: list[Any],
    stacks: Mapping[int, tuple[int, ...]],
    found: dict[int, _Moment],
    problems: dict[int, str],
) -> None:
    """Adds what DeepSpeed's ZeRO holds in parts: of every parameter, or why there is none; a collective."""
    if not weights:
        return
    from deepspeed.utils import safe_get_full_optimizer_state

    base = innermost(optimizers)
    steps = [float(state["step"]) for one in base for state in one.state.values() if "step" in state]
    for weight in weights:
        parameter = weight.parameter()
        key = id(parameter)
        problem = next((text for one in base if (text := problem_of(one)) is not None), None)
        if problem is not None or not parameter.requires_grad:
            problems[key] = problem or "the experts are frozen"
            continue
        if not steps:
            found[key] = _Moment(None, 0.0)
            continue
        try:
            moment: Any = safe_get_full_optimizer_state(parameter, "exp_avg_sq")
        except (KeyError, AttributeError, RuntimeError, ValueError) as error:
            problems[key] = f"DeepSpeed gives none ({type(error).__name__}: {error})"
            continue
        beta = float(base[0].param_groups[0].get("betas", (0.0, 0.0))[1])
        one = _moment({"exp_avg_sq": moment, "step": max(steps)}, parameter, beta, stacks.get(key))
        reached = one.means is not None and bool(one.means[0].any())
        found[key] = one if reached else _Moment(None, one.step)


def _moment(state: dict[str, Any], parameter: Tensor, beta: float, stack: tuple[int, ...] | None) -> _Moment:
    means, step = _means_in(state, parameter, beta, stack), float(state["step"])
    unbiased = 1 - beta**step if step and beta else 1.0
    return _Moment((means[0] / unbiased, means[1] / unbiased), step)


def _steps_of(layers: list[MoELayer], moments: dict[int, _Moment]) -> dict[int, float]:
    """By id of an expert's parameter: how many steps its layer took, its router's or its most used expert's."""
    found: dict[int, float] = {}
    for layer in layers:
        experts = [id(weight.parameter()) for bank in layer.banks.values() for weight in bank.weights]
        everything = [*experts, id(layer.router_is.parameter())]
        most = max((moments[key].step for key in everything if key in moments), default=0.0) or 1.0
        found.update(dict.fromkeys(experts, most))
    return found


def _means_in(state: dict[str, Any], parameter: Tensor, beta: float, stack: tuple[int, ...] | None) -> Means:
    """Means of a second moment in the form that each optimizer keeps it, float32 on the CPU.

    Raises:
        ValueError: There is none, or its dtype cannot hold a running mean at this rate.
    """
    if isinstance(moment := state.get("exp_avg_sq"), Tensor):  # Adam
        if hasattr(moment, "dequantize") and hasattr(moment, "block_size"):  # torchao's
            moment = moment.dequantize()
        if (problem := moment_in_half(moment.dtype, beta)) is not None:
            raise ValueError(problem)
        return row_and_column_means(moment, stack)
    for rows, columns in (("row_var", "col_var"), ("exp_avg_sq_row", "exp_avg_sq_col")):  # Adafactor, torch's and HF's
        if isinstance(state.get(rows), Tensor):
            if stack is not None:
                raise ValueError("Adafactor's factors are over all experts of a flat bank, not of each")
            if rows == "row_var" and state[rows].dtype in HALF:
                # torch's steps in this dtype, with a share for the new that falls to nothing; transformers' in float32
                raise ValueError(f"Adafactor's moments in {state[rows].dtype} hardly decay: train in float32")
            leading, inp = parameter.shape[:-1], (*parameter.shape[:-2], parameter.shape[-1])
            return state[rows].float().cpu().reshape(leading), state[columns].float().cpu().reshape(inp)
    if isinstance(state.get("state2"), Tensor) and state["state2"].dtype == torch.uint8:  # bitsandbytes' Adam8bit
        from bitsandbytes.functional import dequantize_blockwise

        absmax, code = state["absmax2"], state["qmap2"]
        moment = dequantize_blockwise(state["state2"], absmax=absmax, code=code, blocksize=_BNB_BLOCK)
        return row_and_column_means(moment.view(parameter.shape), stack)
    if isinstance(state.get("state2"), Tensor):  # its float32 form, for small tensors
        return row_and_column_means(state["state2"].view(parameter.shape), stack)
    raise ValueError(f"keys {sorted(state)}")
