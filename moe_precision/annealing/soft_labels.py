"""The predictions of a teacher in the place of labels: a loss on logits, with a gradient of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..autocast import without_autocast
from .covers import AnnealError

_IN_CACHE, _AT_ONCE = 1 << 18, 1 << 26  # logits, on a CPU and elsewhere
IGNORED = -100
"""transformers' label of tokens that do not count."""


@without_autocast()
def divergence_less_cross_entropy(logits: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """KL(teacher || model) - cross-entropy of the labels, per token: what a teacher in their place changes.

    The logarithm of the model's normalizer is in both and cancels. What is left is linear in the model's logits ``z``:
    ``z[label] - sum(p * (z - t)) - logsumexp(t)``, with the teacher's logits ``t`` and probabilities ``p``.

    Args:
        logits: ``(N, vocabulary)``, of the model.
        teacher: ``(N, vocabulary)``, logits of the teacher; they take no gradient.
        labels: ``(N,)`` int64; -100 where a token does not count.

    Returns:
        ``(N,)`` float32, in nats; 0 where a token does not count.

    Raises:
        AnnealError: Logits of the teacher are not finite where a token counts.

    Example:
        >>> import torch
        >>> teacher, labels = torch.tensor([[0.0, 1.0]]), torch.tensor([1])
        >>> divergence_less_cross_entropy(teacher, teacher, labels)  # KL is 0, cross-entropy 0.3133
        tensor([-0.3133])
    """
    found: Tensor = _SoftLabels.apply(logits, teacher.detach(), labels)
    return found


class _SoftLabels(torch.autograd.Function):
    """Some rows at a time, which stay in a processor's cache; all that is kept is ``p``, in the dtype of the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        counts, labels = labels != IGNORED, labels.clamp(min=0).unsqueeze(-1)
        values = torch.empty(len(logits), device=logits.device)
        normalizers, kept = torch.empty_like(values), torch.empty_like(teacher)
        size = max(1, (_IN_CACHE if logits.device.type == "cpu" else _AT_ONCE) // logits.shape[-1])
        for rows in (slice(start, start + size) for start in range(0, len(logits), size)):
            z, t = logits[rows].float(), teacher[rows].float()
            normalizers[rows] = t.logsumexp(-1)
            p = (t - normalizers[rows].unsqueeze(-1)).exp_()
            values[rows] = z.gather(-1, labels[rows]).squeeze(-1) - (p * (z - t)).sum(-1) - normalizers[rows]
            kept[rows] = p
        if not bool(normalizers.where(counts, 0.0).isfinite().all()):
            raise AnnealError("the teacher's logits are not finite: is its checkpoint intact, its dtype wide enough?")
        kept[~counts] = 0  # whatever their logits are, they get no gradient
        ctx.save_for_backward(kept, counts, labels)
        return values.where(counts, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        p, counts, labels = ctx.saved_tensors
        gradient = gradient.where(counts, 0.0).to(p.dtype).unsqueeze(-1)
        return (-gradient * p).scatter_add_(-1, labels, gradient), None, None


def next_tokens(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The label of each position's prediction: of the next token, or in an encoder-decoder model of the same one."""
    labels: Tensor = batch["labels"]
    if model.config.is_encoder_decoder:  # type: ignore[union-attr]
        return labels
    shifted: Tensor | None = batch.get("shift_labels")  # a collator may have shifted them
    return F.pad(labels[..., 1:], (0, 1), value=IGNORED) if shifted is None else shifted
