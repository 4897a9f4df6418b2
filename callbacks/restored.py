"""Whether the model of a resumed run is the one that its checkpoint recorded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_warn

from moe_precision.layers.moe_layers import MoELayer
from moe_precision.recording.expert_samples import ExpertSamples
from moe_precision.recording.history import HistoryError, RouterNormHistory
from moe_precision.recording.router_norms import router_norms

NOT_RESTORED = (
    "transformers' Trainer leaves out routers and experts whose names on disk differ from the model's "
    "(transformers issue 48805): load the model with from_pretrained(checkpoint) before you resume from it"
)


def keeps_two_weights(optimizers: Iterable[Any]) -> bool:
    """Whether an optimizer is schedule-free: it trains one set of weights, and ``optimizer.eval()`` puts in another."""
    inner = (getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers)
    return any(callable(getattr(one, "eval", None)) for one in inner)


def check_restored(
    history: RouterNormHistory,
    fresh: RouterNormHistory,
    layers: list[MoELayer],
    step: int,
    owner: str,
    optimizers: Iterable[Any] = (),
    experts: ExpertSamples | None = None,
) -> None:
    """Checks what a checkpoint brought against the model; a collective where reading norms is one.

    Args:
        history: From the checkpoint.
        fresh: An empty one of the model's layers.
        layers: Of the model.
        step: At which the run resumes.
        owner: Name of the callback, for messages.
        optimizers: Of the run. Under a schedule-free one the record may be of the weights where gradients are taken,
            and the checkpoint of their average: a difference is reported, and no error.
        experts: Those of the checkpoint, if it knows them.

    Raises:
        HistoryError: Its layers are others, or routers or experts are not those of the checkpoint: the run would
            train the wrong model. Of routers this shows only if the checkpoint's step was recorded.
    """
    if list(history.layers.items()) != list(fresh.layers.items()):
        raise HistoryError(
            f"the checkpoint's router norms are of layers {list(history.layers)}, this model has "
            f"{list(fresh.layers)}, or their shapes differ"
        )
    if history.steps[-1] == step:
        _check_routers(history, fresh, layers, owner, optimizers)
    if experts is None or not (others := experts.others(layers)):
        return
    if keeps_two_weights(optimizers):
        rank_zero_warn(
            f"{owner}: {len(others)} expert matrices are not those of the checkpoint at step {step}. That is right if "
            "it holds the averaged weights of the schedule-free optimizer; else it was not restored"
        )
        return
    raise HistoryError(
        f"{owner}: the experts of this model are not those of the checkpoint at step {step} ({len(others)} matrices "
        f"differ, {others[0]} the first): it was not restored into the model, whichever routers are. {NOT_RESTORED}"
    )


def _check_routers(
    history: RouterNormHistory, fresh: RouterNormHistory, layers: list[MoELayer], owner: str, optimizers: Iterable[Any]
) -> None:
    step = history.steps[-1]
    recorded = torch.cat(list(history.last.values()))
    now = router_norms(layers).to("cpu")
    tolerance = 1e-5 if history.dtypes == fresh.dtypes else 1e-2  # a float32 run may resume in bfloat16
    if not torch.allclose(now, recorded, rtol=tolerance, atol=0, equal_nan=True):
        difference = float(((now - recorded).abs() / recorded.clamp(min=1e-30)).max())
        if keeps_two_weights(optimizers):
            rank_zero_warn(
                f"{owner}: the routers' norms differ by up to {difference:.2%} from those recorded at step {step}. "
                "That is right if the checkpoint holds the averaged weights of the schedule-free optimizer and the "
                "record those where gradients are taken; if it is too much for that, the checkpoint was not restored"
            )
            return
        raise HistoryError(
            f"{owner}: the routers of this model are not those whose norms were recorded at step "
            f"{step} (a norm differs by {difference:.2%}): the checkpoint was not restored into the model. "
            f"{NOT_RESTORED}"
        )
