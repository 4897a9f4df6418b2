"""A real drop: a checkpoint with fewer experts, rows of the router cut, that stock transformers loads.

Families state one number of experts for all layers, so every layer loses as many. Tokens that went to a dropped expert
go to the next best one that is left.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..checkpoints.checkpoint import Checkpoint, opened
from ..checkpoints.dtypes import meta_model_of
from ..checkpoints.folders import check_quantizing, folder_replaced_when_done
from ..checkpoints.other_files import copy_other_files
from ..errors import MoEPrecisionError
from ..layers.moe_layers import MoELayer, find_moe_layers
from ..layers.shape import LayerShape
from ..plans.beside import PlanFiles
from ..plans.layer_plan import LayerPlan
from ..plans.notes import PlanNotes
from ..plans.plan import PrecisionPlan, as_plan
from ..plans.widths import DROPPED
from ..recording.curvature import Curvature, as_curvature
from ..recording.router_norms import norms_by_layer
from ..recording.statistics import ExpertStatistics, as_statistics

PLAN_NAME = "precision_plan.json"
_COUNT = re.compile(r"^(?!.*(?:shared|top_?k)).*experts$")  # not of shared ones, of those for a token, or a capacity
Kept = Mapping[str, Sequence[int]]  # layer -> experts that stay, in order


class PruneError(MoEPrecisionError, ValueError):
    """Experts that cannot be cut out of a checkpoint."""


def prune_checkpoint(
    checkpoint: Checkpoint | str | os.PathLike[str],
    plan: PrecisionPlan | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    keep: int | None = None,
    curvature: Curvature | str | os.PathLike[str] | None = None,
    statistics: ExpertStatistics | str | os.PathLike[str] | None = None,
    max_shard_size: int | str = "5GB",
) -> PrecisionPlan:
    """Writes a float checkpoint without the experts that a plan drops; the whole float model is in memory.

    Args:
        checkpoint: Folder of the float checkpoint.
        plan: A plan with 0 among its levels, for this checkpoint.
        out: Folder to write; it appears in one step, when it is complete. It also gets the plan of what is left,
            ``precision_plan.json``, with curvature and statistics beside it, for the quantize step.
        keep: Experts to keep in every layer: those whose absence would cost most by the plan, after those that no plan
            would drop, since too little is known of them. None keeps those that the plan does not drop, which must be
            as many in every layer.
        curvature: Of the checkpoint, to be cut alike.
        statistics: Of the checkpoint, to be cut alike.
        max_shard_size: Largest file, in bytes or as ``"5GB"``.

    Returns:
        The plan of what is left.

    Raises:
        PruneError: Layers would keep different numbers of experts, or fewer than serve a token; the plan cannot say
            which ones to keep; or the family's config does not set the number of experts of all layers.
        CheckpointError: The checkpoint is incomplete, damaged or quantized.
        PlanError: The plan is for another model.

    Example:
        >>> beside = ("curvature", "statistics")
        >>> known = {kind: f"precision_plan.{kind}.safetensors" for kind in beside}
        >>> plan = allocate("checkpoint", bits=(0, 1, 2), average_bits=1, min_tokens=1, group_size=64, **known)
        >>> prune_checkpoint("checkpoint", plan, "pruned", keep=4).layers["model.layers.0.mlp"].shape.num_experts
        4
        >>> load_model("pruned").config.num_local_experts
        4
    """
    with opened(checkpoint) as source:
        check_quantizing(source, out, plan, curvature, statistics)
        old = source.meta_model()
        layers = find_moe_layers(old, **as_plan(plan).patterns)
        shapes = {layer.name: layer.shape for layer in layers}
        plan = as_plan(plan).for_model(old, shapes)
        kept = _kept(plan, keep)
        config = _smaller_config(old, layers, len(next(iter(kept.values()))))
        new = meta_model_of(type(old), config, source.dtype)
        smaller = _check_layers(new, kept, plan)
        files = PlanFiles.of(os.path.join(os.fspath(out), PLAN_NAME))
        beside: dict[str, Curvature | ExpertStatistics] = {}
        whole = source.load()
        norms = norms_by_layer(find_moe_layers(whole, **plan.patterns))
        if curvature is not None:
            known = as_curvature(curvature).for_layers(shapes)
            known.check_router_norms(norms)
            beside[files.curvature.name] = _cut_curvature(known, kept, smaller)
        if statistics is not None:
            under = as_statistics(statistics).for_layers(shapes)
            under.check_router_norms(norms)
            beside[files.statistics.name] = _cut_statistics(under, kept, smaller)
        left = _cut_plan(plan, kept, smaller)
        sources = _sources(new, layers, kept)
        with folder_replaced_when_done(out) as folder, torch.no_grad():
            tensors = whole.state_dict()
            cut = {
                name: _cut(name, tensor, tensors[sources.get(name, name)], layers, kept)
                for name, tensor in new.state_dict().items()
            }
            new.load_state_dict(cut, assign=True)
            new.tie_weights()
            new.save_pretrained(folder, max_shard_size=max_shard_size)
            copy_other_files(source.folder, folder)
            left.save(folder / PLAN_NAME)
            for name, found in beside.items():
                found.save(folder / name)
    return left


def _kept(plan: PrecisionPlan, keep: int | None) -> dict[str, list[int]]:
    """The experts that stay in each layer, ascending.

    Raises:
        PruneError: As `prune_checkpoint` does.
    """
    kept: dict[str, list[int]] = {}
    for name, layer in plan.layers.items():
        experts, needed = layer.shape.num_experts, layer.shape.top_k or 1
        if keep is None:
            kept[name] = [expert for expert in range(experts) if expert not in layer.dropped]
            continue
        if not needed <= keep < experts:
            raise PruneError(f"keep={keep}: layer {name!r} has {experts} experts, of which {needed} serve a token")
        absent = [by[DROPPED] for by in layer.costs.values() if DROPPED in by]
        if len(absent) < len(layer.shape.projections):
            raise PruneError(
                "keep needs what the absence of each expert costs: give a plan with 0 among its levels, as from "
                "`moe-precision plan CHECKPOINT --curvature-batches 32 --statistics-batches 32 --bits 0 1 2 3 4`"
            )
        costs = torch.tensor(absent, dtype=torch.float64).sum(0)
        tokens = torch.tensor(layer.signals.get("tokens", [torch.inf] * experts), dtype=torch.float32)
        unknown = (costs == 0) | (tokens < (plan.settings.min_tokens if plan.settings else 0))
        if (few := int(unknown.sum())) > keep:
            raise PruneError(
                f"keep={keep}: of {few} experts of layer {name!r} too little is known to cut them (fewer than "
                "min_tokens tokens, or no gradient): keep them too, or make a plan from more text"
            )
        costs[unknown] = torch.inf
        kept[name] = sorted(costs.argsort(descending=True, stable=True)[:keep].tolist())
    counts = {name: len(experts) for name, experts in kept.items()}
    if len(set(counts.values())) > 1:
        least, most = min(counts.values()), max(counts.values())
        raise PruneError(
            f"the plan leaves {least} to {most} experts in a layer, and a checkpoint has as many in all layers: say "
            f"how many with keep (--keep {most}), or quantize with the plan, which may drop any number"
        )
    if not plan.drops and keep is None:
        raise PruneError("the plan drops no expert: there is nothing to prune; say how many to keep (--keep)")
    return kept


def _smaller_config(model: PreTrainedModel, layers: list[MoELayer], keep: int) -> PreTrainedConfig:
    """The config with another number of experts, wherever it states the old one."""
    counts = {layer.num_experts for layer in layers}
    if len(counts) > 1:
        raise PruneError(f"layers have {sorted(counts)} experts: their config states no single number")
    if hashed := [layer.name for layer in layers if layer.caveat == "hash"]:
        raise PruneError(
            f"layer {hashed[0]!r} has a table of experts by token id, which a cut would leave wrong: quantize with the "
            "plan, which drops experts without a smaller router"
        )
    (experts,) = counts
    config = copy.deepcopy(model.config)
    for part in (config, config.get_text_config()):
        if (getattr(part, "n_group", None) or 1) > 1:
            raise PruneError(f"this {config.model_type} chooses among groups of experts, which a cut would tear apart")
        for key, value in part.to_dict().items():
            if type(value) is int and value == experts and _COUNT.search(key):
                setattr(part, key, keep)
    return config


def _check_layers(model: PreTrainedModel, kept: Kept, plan: PrecisionPlan) -> dict[str, LayerShape]:
    """The layers of the smaller model, after checking that its config set their number of experts."""
    found = {layer.name: layer.shape for layer in find_moe_layers(model, **plan.patterns)}
    wrong = [name for name, experts in kept.items() if name not in found or found[name].num_experts != len(experts)]
    if wrong:
        raise PruneError(
            f"the config of {type(model).__name__} does not set the number of experts of layer {wrong[0]!r}: "
            "quantize with the plan, which drops experts without a smaller router"
        )
    return found


def _sources(model: PreTrainedModel, layers: list[MoELayer], kept: Kept) -> dict[str, str]:
    """Tensors of experts that are modules -> their names in the old model."""
    found: dict[str, str] = {}
    for layer in layers:
        before, placed, after = layer.shape.experts.partition("{expert}")
        if not placed:
            continue
        for place, expert in enumerate(kept[layer.name]):
            prefix = f"{before}{place}{after}."
            for name in model.state_dict():
                if name.startswith(prefix):
                    found[name] = f"{before}{expert}{after}.{name.removeprefix(prefix)}"
    return found


def _cut(name: str, new: Tensor, old: Tensor, layers: list[MoELayer], kept: Kept) -> Tensor:
    """A tensor of the old model without the rows of experts that go.

    Raises:
        PruneError: It differs from the new one in another way.
    """
    if new.shape == old.shape:
        return old
    layer = next((one for one in layers if name.startswith(f"{one.name}.") or name == one.router), None)
    axes = [axis for axis, sizes in enumerate(zip(new.shape, old.shape, strict=False)) if sizes[0] != sizes[1]]
    if layer is not None and new.ndim == old.ndim and len(axes) == 1:
        gone = layer.num_experts - len(kept[layer.name])
        if old.shape[axes[0]] - new.shape[axes[0]] == gone and old.shape[axes[0]] >= layer.num_experts:
            rows = [*kept[layer.name], *range(layer.num_experts, old.shape[axes[0]])]  # shared or null experts stay
            return old.index_select(axes[0], torch.tensor(rows))
    raise PruneError(
        f"{name!r} has shape {tuple(old.shape)} and would have {tuple(new.shape)}: it is not one row per expert"
    )


def _cut_plan(plan: PrecisionPlan, kept: Kept, shapes: Mapping[str, LayerShape]) -> PrecisionPlan:
    """The plan of what is left; experts that the plan dropped and `keep` has kept get the least other width."""
    least = min(
        bits for layer in plan.layers.values() for bank in layer.projection_bits.values() for bits in bank if bits
    )
    layers = {}
    for name, layer in plan.layers.items():
        rows = kept[name]
        layers[name] = LayerPlan(
            shape=shapes[name],
            projection_bits={p: [bits[row] or least for row in rows] for p, bits in layer.projection_bits.items()},
            router_norms={key: [norms[row] for row in rows] for key, norms in layer.router_norms.items()},
            signals={key: [values[row] for row in rows] for key, values in layer.signals.items()},
            costs={
                p: {bits: [values[row] for row in rows] for bits, values in by.items() if bits}
                for p, by in layer.costs.items()
            },
        )
    of_the_whole = ("predicted_cost", "gap", "left_over", "without_gradient", "statistics")
    notes = {key: value for key, value in plan.notes.items() if key not in of_the_whole}
    left = replace(plan, layers=layers, settings=None, notes=cast(PlanNotes, notes))
    if plan.settings is None:
        return left
    levels = [bits for bits in plan.settings.levels if bits]
    asked = replace(plan.settings, bits=levels, average_bits=left.average_bits, stored_bits=None, expert_gib=None)
    return replace(left, settings=asked)


def _cut_curvature(curvature: Curvature, kept: Kept, shapes: dict[str, LayerShape]) -> Curvature:
    rows, columns = (
        {name: {p: means[kept[name]] for p, means in of.items()} for name, of in part.items()}
        for part in (curvature.rows, curvature.columns)
    )
    return Curvature(shapes, rows, columns, {name: norms[kept[name]] for name, norms in curvature.router_norms.items()})


def _cut_statistics(statistics: ExpertStatistics, kept: Kept, shapes: dict[str, LayerShape]) -> ExpertStatistics:
    diagonals, correlations = (
        {
            name: {p: torch.stack([of[expert] for expert in kept[name]]) for p, of in part.items()}
            for name, part in whole.items()
        }
        for whole in (statistics.diagonals, statistics.correlations)
    )
    tokens = {name: of[kept[name]] for name, of in statistics.tokens.items()}
    norms = {name: of[kept[name]] for name, of in statistics.router_norms.items()}
    return ExpertStatistics(shapes, diagonals, correlations, tokens, norms, statistics.text, statistics.linears)
