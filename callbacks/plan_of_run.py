"""The plan at the end of a run, from what was recorded: what the method asked for needs, and no more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from pytorch_lightning.utilities.seed import isolate_rng
from torch import nn

from moe_precision.allocation.allocator import make_plan
from moe_precision.allocation.calibration import Calibration
from moe_precision.callbacks.extra_batches import Gradients
from moe_precision.callbacks.restored import keeps_two_weights
from moe_precision.layers.moe_layers import MoELayer
from moe_precision.plans.methods import AUTO, reads
from moe_precision.plans.plan import PrecisionPlan
from moe_precision.plans.settings import PlanSettings, expert_weights
from moe_precision.recording.curvature import Curvature, CurvatureError
from moe_precision.recording.history import RouterNormHistory
from moe_precision.recording.optimizer_check import check_second_moments
from moe_precision.recording.processes import world_size
from moe_precision.recording.statistics import ExpertStatistics

UNASKED_WEIGHTS = 10**9  # of all experts, up to which "auto" measures what widths cost: minutes on a CPU
UNASKED_BATCHES = 64  # whose squared gradients "auto" takes where an optimizer keeps none


def check_run(
    settings: PlanSettings,
    layers: list[MoELayer],
    optimizers: Sequence[Any],
    curvature_batches: int | None = None,
    obstacle: str = "",
) -> Gradients:
    """Before training: checks that its optimizers will leave what the method reads.

    With ``method="auto"`` and an optimizer that keeps no second moment (SGD, Muon, Lion), squared gradients of our own
    take their place: of training batches after the last step, on a single process and for up to `UNASKED_WEIGHTS`.

    Args:
        settings: What is asked.
        layers: Of the model.
        optimizers: That train it, as far as they are known.
        curvature_batches: From how many batches curvature is taken instead of from the optimizers.
        obstacle: Why the run's loss cannot be computed without a step; empty if it can.

    Returns:
        From how many batches curvature will be taken, if it is not read from the optimizers.

    Raises:
        CurvatureError: The method reads second moments, and there will be none.
        AllocationError: With ``method="auto"``, there will be none, and without costs no plan can be as it is asked.
    """
    if keeps_two_weights(optimizers):
        rank_zero_warn(
            "the optimizer is schedule-free: norms on the way are of the weights where gradients are taken, and the "
            "last norms, the plan and the checkpoint of what is in the model when training ends. Have the averaged "
            "weights there: call optimizer.eval() in the module's on_train_epoch_end, which comes before on_train_end"
        )
    named = reads(settings.method, "curvature")
    if curvature_batches is not None or (not named and settings.method != AUTO):
        return Gradients(curvature_batches)
    try:
        check_second_moments(layers, optimizers)
    except CurvatureError as error:
        if named:
            raise
        shapes = {layer.name: layer.shape for layer in layers}
        weights = [weight for layer in layers for bank in layer.banks.values() for weight in bank.weights]
        plain = not any(weight.gathers or weight.is_adapted for weight in weights)
        if plain and not obstacle and world_size() == 1 and expert_weights(shapes.values()) <= UNASKED_WEIGHTS:
            reason = str(error).split(". Train the experts")[0]
            rank_zero_info(
                f"{reason}: squared gradients of {UNASKED_BATCHES} training batches after the last step take the place "
                "of its moments. curvature_batches= sets their number; method='router_norm' needs none"
            )
            return Gradients(UNASKED_BATCHES, asked=False)
        settings.resolved("router_norm", shapes)
        rank_zero_warn(f"the plan will be by the paper's rule, since there will be no curvature: {error}")
    return Gradients(None)


def plan_of_run(
    settings: PlanSettings,
    model: nn.Module,
    history: RouterNormHistory,
    curvature: Curvature | None,
    statistics: ExpertStatistics | None,
    steps: Iterable[Callable[[], object]] | None = None,
) -> PrecisionPlan:
    """Makes the plan; reads weights, a collective where they are sharded, only if widths have costs.

    With ``method="auto"`` and more than `UNASKED_WEIGHTS`, the paper's rule is taken, and the plan says how to get the
    other one: measuring costs quantizes every expert at every width, which nobody expects at the end of a large run.
    Where whole layers are to share a width, or experts may be dropped, costs are measured all the same.

    Args:
        settings: What is asked.
        model: The trained model, or what is around it.
        history: The recorded norms.
        curvature: Of the trained model, if it is known.
        statistics: Of the experts' inputs, if they are known.
        steps: Forward passes of training batches, to calibrate costs with; None for none. Where that cannot be done
            (several processes, sharded experts, a model that gives no logits), costs stay as they are, and the log
            says why.

    Raises:
        AllocationError: What the method reads is missing, or a norm is not finite.
    """
    method, weights = settings.method, expert_weights(history.layers.values())
    unknown = settings.may_drop or str(settings.granularity).startswith("layer")  # to the paper's rule
    if method == AUTO and curvature is not None and weights > UNASKED_WEIGHTS and not unknown:
        plan = make_plan(settings.resolved("router_norm", history.layers), history=history)
        plan.notes["auto"] = (
            f"measuring what each width costs takes long for {weights / 1e9:.1f} billion expert weights; to have it "
            "measured, name a method, or run `moe-precision plan HISTORY --final CHECKPOINT`"
        )
        return plan
    priced = curvature is not None if method == AUTO else settings.knows_costs
    known = statistics if method == AUTO or reads(method, "curvature") else None
    if not priced:
        return make_plan(settings, None, history, curvature, known)
    with isolate_rng():
        if steps is not None and world_size() > 1:
            rank_zero_info("costs are not calibrated: that runs in one process alone")
        elif steps is not None:
            try:
                return make_plan(settings, model, history, curvature, known, Calibration(model, steps))
            except Exception as error:  # whatever a training step raises here, the plan is still to be written
                rank_zero_info(f"costs are not calibrated: {error}")
        return make_plan(settings, model, history, curvature, known)
