"""Costs in proportion to what quantizing really does to the model's predictions, measured one projection at a time.

Costs by curvature or statistics rank the experts of one projection well. Between layers they can be off by a factor of
three, since they see neither what later layers make of an error (a token that is routed to other experts) nor that one
bit hurts more than in proportion. Both show in the divergence of the model whose experts of one layer and projection
are all quantized: one number for each layer, projection and width, to which the experts' costs are scaled.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from ..layers.module_tree import modes_kept, root_model
from ..layers.moe_layers import MoELayer
from ..plans.numbers import AllocationError
from ..plans.widths import DROPPED
from ..quantize.codec.fitting import at_a_time
from ..quantize.codec.guided import fit_of
from ..recording.batches import run_batch
from ..recording.curvature import Curvature
from ..recording.statistics import ExpertStatistics
from .costs import Costs, check_plain, pricing, quantized_matrices

TOKENS = 4096
_KEPT_BYTES = 2**29  # of log-probabilities
_UNSTEADY = 1e-4  # nats per token between two passes of the same weights, above which costs of 4 bits drown


class Calibration:
    """Divergence from a model's predictions as they are now, on a few training batches.

    Args:
        model: A transformers model, or what is around it, with its float weights.
        steps: Forward passes of training batches, which go through the transformers model; as many are taken as
            `TOKENS` need.

    Attributes:
        tokens: Number of tokens that are compared.

    Raises:
        AllocationError: The model is none of transformers', there is no batch, no logits come out, or they differ from
            one pass to the next.
    """

    def __init__(self, model: nn.Module, steps: Iterable[Callable[[], Any]]) -> None:
        root = root_model(model)
        if not isinstance(root, PreTrainedModel):
            raise AllocationError(f"calibration compares the logits of a transformers model, got {type(root).__name__}")
        self._model, self._root = model, root
        self._steps: list[Callable[[], Any]] = []
        self._float: list[Tensor] = []
        self._every = 0  # how many tokens for one that is compared
        self.tokens = 0
        for step in steps:
            self._steps.append(step)
            self._float.append(self._logits(step).log_softmax(-1))
            self.tokens += len(self._float[-1])
            if self.tokens * self._every >= TOKENS:
                break
        if not self.tokens:
            raise AllocationError("calibration needs at least one batch with tokens")
        if not (unsteady := self.divergence()) < _UNSTEADY:
            raise AllocationError(
                f"the same weights give predictions that are {unsteady:.2g} nats per token apart from one pass to the "
                "next: do batches change at random in the training step?"
            )

    def divergence(self) -> float:
        """Mean KL divergence of the model as it is now from what it was, in nats per token."""
        total = 0.0
        for step, before in zip(self._steps, self._float, strict=True):
            now = self._logits(step).log_softmax(-1)
            terms = (before.exp() * (before - now)).masked_fill_(before == -torch.inf, 0)  # no probability, no part
            total += float(terms.sum(dtype=torch.float64))
        return max(total, 0.0) / self.tokens

    @torch.no_grad()
    def _logits(self, step: Callable[[], Any]) -> Tensor:
        """Logits of every k-th token that is not padding, ``(N, vocab)`` float32."""
        seen: list[Tensor] = []

        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            logits = getattr(output, "logits", None)
            if not isinstance(logits, Tensor):
                raise AllocationError(f"calibration needs logits, and {type(module).__name__} gives none")
            chosen = logits[_kept(kwargs, logits, self._root.config.is_encoder_decoder)]
            expected = max(TOKENS, len(chosen)) * chosen.shape[-1] * 4  # bytes, if all were kept
            self._every = self._every or -(-expected // _KEPT_BYTES)
            seen.append(chosen[:: self._every].float())

        handle = self._root.register_forward_hook(hook, with_kwargs=True)
        try:
            with modes_kept(self._model), _same_random_numbers():
                self._model.eval()
                torch.clear_autocast_cache()  # autocast around this would keep the weights of the pass before
                step()
        finally:
            handle.remove()
        if not seen:
            raise AllocationError("calibration needs batches that go through the transformers model")
        return torch.cat(seen)


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Inside, random numbers are the same every time: a training step may mask or disturb its batch with them."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        # torch.manual_seed formats the stack for each kind of device that is not there, which takes milliseconds
        (torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed)(0)
        np.random.seed(0)
        random.seed(0)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def calibration_on(model: nn.Module, batches: Iterable[Any]) -> Calibration:
    """`Calibration` on batches, mappings of the model's arguments."""
    return Calibration(model, (partial(run_batch, model, batch) for batch in batches))


def _kept(kwargs: Mapping[str, Any], logits: Tensor, encoder_decoder: bool) -> Tensor:
    """Which positions are compared, ``(B, T)`` bool: those that predict a label, else those that are not padding."""
    kept = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    labels, mask = kwargs.get("labels"), kwargs.get("decoder_attention_mask" if encoder_decoder else "attention_mask")
    if isinstance(labels, Tensor) and labels.shape == kept.shape:
        if encoder_decoder:
            return labels != -100
        kept[:, :-1], kept[:, -1] = labels[:, 1:] != -100, False
    elif isinstance(mask, Tensor) and mask.shape == kept.shape:
        kept = mask != 0
    return kept


@torch.no_grad()
def calibrated_costs(
    layers: Sequence[MoELayer],
    widths: Sequence[int],
    group_size: int,
    curvature: Curvature | None,
    statistics: ExpertStatistics | None,
    calibration: Calibration,
    *,
    together: bool = False,
) -> Costs:
    """`expert_costs`, scaled so that those of a projection add up to the measured divergence, in nats per token.

    Each projection of each layer takes its quantized values for a moment, at one width after another, and gets the
    float ones back. Memory: the float experts of one projection more.

    Args:
        layers: As found by `find_moe_layers`, whole on this process, with plain parameters.
        widths: Candidate widths; 16 costs nothing.
        group_size: Weights that share a scale and an offset.
        curvature: As in `expert_costs`.
        statistics: As in `expert_costs`.
        calibration: Of the same model.
        together: As in `expert_costs`.

    Raises:
        CostError: The experts are sharded, or behind adapters, or a matrix cannot be quantized.

    Returns:
        For each layer and projection ``(E, len(widths))`` float64.
    """
    check_plain(layers)
    costs: Costs = {}
    total = sum(len(layer.banks) * len(widths) for layer in layers)
    by = statistics if together else None
    with tqdm(total=total, desc="calibrating", unit="width", disable=None) as bar:
        for layer in layers:
            costs[layer.name] = {}
            for name, bank in layer.banks.items():
                live = [bank.read(expert) for expert in range(layer.num_experts)]
                kept = [matrix.clone() for matrix in live]
                found = torch.zeros(len(live), len(widths), dtype=torch.float64)
                try:
                    for index, bits in reversed(list(enumerate(widths))):  # 0 bits after fits, which try the moments
                        for experts in at_a_time(range(len(kept)), bank.shape) if bits != 16 else ():
                            fit = fit_of(layer.name, name, experts, curvature, statistics)
                            weights = torch.stack([kept[expert] for expert in experts])
                            quantized = quantized_matrices(weights, bits, group_size, fit)
                            for expert, *pair in zip(experts, weights, quantized, strict=True):
                                found[expert, index] = pricing(curvature, by, layer.name, name, expert)(*pair)
                                if bits != DROPPED:
                                    live[expert].copy_(pair[1])
                        if bits not in (DROPPED, 16):
                            scale_to([found[:, index]], calibration.divergence())
                        bar.update()
                finally:
                    for matrix, before in zip(live, kept, strict=True):
                        matrix.copy_(before)
                costs[layer.name][name] = found
            if DROPPED in widths:
                calibrate_dropping(layer, costs[layer.name], list(widths).index(DROPPED), calibration)
    return costs


def calibrate_dropping(layer: MoELayer, costs: dict[str, Tensor], index: int, calibration: Calibration) -> None:
    """Scales what the absence of experts costs: the cheaper half of a layer's experts is dropped for a moment.

    All of them together would leave nothing of the layer, which no plan does. Experts whose absence costs nothing,
    since they never had a gradient, tell nothing. Where no token of the calibration meets the cheaper half, more
    experts are dropped with it: a scale of 0 would make every absence free.

    Args:
        layer: Its experts get their weights back.
        costs: Projection -> ``(E, widths)``; its column ``index`` is changed in place.
        index: Of the width 0.
        calibration: Of the same model.
    """
    absent = [of[:, index] for of in costs.values()]  # (E,) each
    total = torch.stack(absent).sum(0)
    able = [expert for expert in total.argsort(stable=True).tolist() if total[expert] > 0]
    gone = able[: max(1, len(able) // 2)]
    measured = _divergence_without(layer, gone, calibration)
    while measured == 0 and len(gone) < len(able):
        gone = able[: (len(gone) + len(able) + 1) // 2]
        measured = _divergence_without(layer, gone, calibration)
    if measured > 0:
        scale_to(absent, measured, gone)


def _divergence_without(layer: MoELayer, experts: Sequence[int], calibration: Calibration) -> float:
    """Divergence of the model without some experts of a layer, which get their weights back."""
    live = [bank.read(expert) for bank in layer.banks.values() for expert in experts]
    kept = [matrix.clone() for matrix in live]
    try:
        for matrix in live:
            matrix.zero_()
        return calibration.divergence()
    finally:
        for matrix, before in zip(live, kept, strict=True):
            matrix.copy_(before)


def scale_to(costs: list[Tensor], measured: float, experts: Sequence[int] | slice = slice(None)) -> None:
    """Scales costs in place so that those of some experts add up to what was measured of them."""
    predicted = sum(float(of[experts].sum()) for of in costs)
    if predicted > 0:
        for of in costs:
            of *= measured / predicted
