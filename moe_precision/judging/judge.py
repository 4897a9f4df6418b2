"""Held-out text and what the float model says on it: what every quantized model is compared with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..layers.moe_layers import MoELayer
from .divergence import Divergence
from .evaluation import BANDS, frequency_bands
from .reference import KEPT_BYTES, Reference
from .statistics import Interval, bootstrap, resample_documents

WORST_SHARE = 0.1  # of the documents


class Judge:
    """Held-out text, and what the float model says on it: what all quantized models are compared with.

    Args:
        model: The float model; later calls evaluate it as it is then.
        batches: Held-out batches with labels.
        token_counts: ``(vocab,)``, how often each token occurs in training.
        end_of_text: Token that ends a document, where batches are one packed text in order; None if each row is one.
        layers: The model's Mixture-of-Experts layers, where they are known.
        kept_bytes: Bound of the float model's log-probabilities, as in `Reference`.

    Attributes:
        counts: Tokens by document and band, ``(documents, 3)`` float64.
        loss: Of the float model, over all tokens and by band.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Iterable[dict[str, Tensor]],
        token_counts: Tensor,
        end_of_text: int | None = None,
        layers: Sequence[MoELayer] | None = None,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        self._model, self._reference = model, Reference(model, batches, layers, kept_bytes)
        losses, targets, documents = self._reference.losses, self._reference.targets, self._reference.documents
        if int(targets.max()) >= len(token_counts):
            raise ValueError(f"token_counts has {len(token_counts)} entries, a target is token {int(targets.max())}")
        if end_of_text is not None:
            ends = targets == end_of_text
            documents = ends.cumsum(0) - ends.long()  # the end belongs to its text
        bands = frequency_bands(targets, token_counts)
        self._cells = documents * len(BANDS) + bands
        self._shape = (int(documents.max()) + 1, len(BANDS))
        self.counts = self._by_cell(torch.ones_like(losses))
        self._resamples = resample_documents(len(self.counts))
        self.loss = {"all": float(losses.double().mean())}
        self.loss |= {band: float(losses[bands == i].double().mean()) for i, band in enumerate(BANDS)}

    def _by_cell(self, values: Tensor) -> Tensor:
        sums = torch.zeros(self._shape[0] * self._shape[1], dtype=torch.float64)
        return sums.index_add_(0, self._cells, values.double()).view(self._shape)

    def measure(self) -> tuple[Tensor, Divergence]:
        """The model as it is now against the float model that it was, in one pass over the batches.

        Returns:
            Its loss minus that of the float model, summed by document and band, ``(documents, 3)`` float64, and how far
            its predictions are from the float model's.
        """
        found = self._reference.measure(self._model)
        return self._by_cell(found.losses - found.float_losses), found.divergence

    def mean(self, sums: Tensor, band: str | None = None) -> Interval:
        """Mean increase per token, over all tokens or in a band, with its interval over documents."""
        return mean_increase(sums, self.counts, self._resamples, band)

    def worst_decile(self, sums: Tensor) -> float:
        """Mean increase over the tenth of the documents that lose most."""
        tokens = self.counts.sum(1)
        by_document = (sums.sum(1) / tokens)[tokens > 0].sort(descending=True).values
        return float(by_document[: max(1, round(WORST_SHARE * len(by_document)))].mean())


def mean_increase(sums: Tensor, counts: Tensor, resamples: Tensor, band: str | None) -> Interval:
    """Mean increase per token with its interval over documents.

    Args:
        sums: Summed increase by document and band, ``(documents, 3)`` float64.
        counts: Tokens by document and band, ``(documents, 3)`` float64.
        resamples: As `resample_documents` returns it.
        band: One of `BANDS`, or None for all tokens.
    """
    columns = slice(None) if band is None else slice(BANDS.index(band), BANDS.index(band) + 1)
    return bootstrap(sums[:, columns].sum(1), counts[:, columns].sum(1), resamples)
