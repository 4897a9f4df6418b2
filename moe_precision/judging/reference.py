"""What a float model says on held-out text, kept so that many models can be measured against it.

One model is in memory at a time: the float model may be gone, or be the very model that takes on plans.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from ..layers.moe_layers import MoELayer
from .choices import places_of
from .divergence import Measured, Observation, measure_against, observations

KEPT_BYTES = 2 * 2**30  # of log-probabilities


class Reference:
    """A float model's losses, log-probabilities and choices of experts on batches, in memory on the CPU.

    Args:
        model: The float model; put into evaluation mode.
        batches: As in `target_logits`.
        layers: Its Mixture-of-Experts layers, where they are known.
        kept_bytes: Bound of the log-probabilities, float32. Where those of all target tokens are larger, every k-th
            is kept, with the least k that fits.
        name: What the progress bar says; None for no bar.

    Attributes:
        losses: Cross-entropy of every target token, ``(N,)`` float32.
        targets: ``(N,)`` int64.
        documents: The row that each is in, counted over all batches, ``(N,)`` int64.
        every: The k above; 1 where all are kept.

    Raises:
        ValueError: There is no batch, or no target token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Iterable[dict[str, Tensor]],
        layers: Sequence[MoELayer] | None = None,
        kept_bytes: int = KEPT_BYTES,
        name: str | None = None,
    ) -> None:
        self._batches, self._places = list(batches), places_of(model, layers)
        if not self._batches:
            raise ValueError("no batch to judge on")
        self._seen: list[Observation] = []
        self.every = start = 0
        bar = tqdm(self._batches, desc=name, unit="batch", leave=False, disable=name is None)
        for seen in observations(model, bar, self._places):
            if self.every == 0:
                first = 0 if model.config.is_encoder_decoder else 1  # the first label that is a target
                targets = sum(int((batch["labels"][:, first:] != -100).sum()) for batch in self._batches)
                room = max(1, kept_bytes // (4 * seen.log_probs.shape[1]))  # target tokens that fit
                self.every = max(1, math.ceil(targets / room))
            chosen = seen.log_probs[-start % self.every :: self.every].cpu().contiguous()
            self._seen.append(replace(seen, log_probs=chosen))
            start += len(seen.losses)
        if start == 0:
            raise ValueError("no target tokens: every label is -100")
        self.losses = torch.cat([seen.losses for seen in self._seen])
        self.targets = torch.cat([seen.targets for seen in self._seen])
        starts = accumulate((len(batch["labels"]) for batch in self._batches), initial=0)
        self.documents = torch.cat([seen.rows + first for seen, first in zip(self._seen, starts, strict=False)])

    def measure(self, model: PreTrainedModel, name: str | None = None) -> Measured:
        """Measures a model of the same vocabulary, in one pass over the batches.

        Args:
            model: Put into evaluation mode.
            name: What the progress bar says; None for no bar.

        Raises:
            ValueError: The vocabularies differ.
        """
        return measure_against(self._seen, model, self._batches, self._places, self.every, name)
