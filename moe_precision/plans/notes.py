"""What was found while a plan was made, apart from what was asked: the typed ``notes`` of a plan."""

from __future__ import annotations

from typing import Literal, TypedDict


class SpreadOfNorms(TypedDict):
    """(largest - smallest) / mean of a layer's final router norms: of the median layer and of the largest."""

    median: float
    largest: float


class StatisticsNote(TypedDict):
    """What expert statistics rest on: their text in words, and tokens per expert.

    ``tokens`` is layer -> those of the expert with the least, of the median one, and of the one with the most.
    """

    text: str
    tokens: dict[str, list[int]]


class StatisticsUsed(StatisticsNote, total=False):
    """Also how many second moments have negative eigenvalues; their matrices were fitted and priced without them."""

    indefinite: int


class AnnealingNote(TypedDict, total=False):
    """How training ended on the plan.

    Attributes:
        start: The first annealed step.
        steps: How many there were to be, where the run's length was known.
        share: With ``start="auto"``, that of all steps.
        tokens_per_byte: From which the share follows, where batches showed their tokens.
        teacher: Digest of the teacher's weights.
    """

    start: int
    steps: int
    share: float
    tokens_per_byte: float
    teacher: str


class PlanNotes(TypedDict, total=False):
    """Each key is present only where it applies.

    Attributes:
        auto: Why ``method="auto"`` stands for the plan's method.
        initial: Name of the checkpoint folder from which the change of norm was measured.
        final: Name of the checkpoint folder that was measured.
        statistics: What the expert statistics rest on that costs were measured with.
        text: What gradients, statistics or calibration were taken from, where `moe-precision plan` ran the model.
        calibration_tokens: Number of tokens on which costs were scaled to the measured divergence; they are then in
            nats per token.
        predicted_cost: Sum of the costs of the chosen widths, for a method that knows costs.
        gap: How far that sum may be above the least possible one, as a share of it.
        without_gradient: Number of choices for which all widths cost the same.
        left_over: Bits per expert weight of the budget that no expert could use, in the budget's own kind of bits.
        spread_of_final_norms: Without a baseline: experts are ranked as if their norms had been equal at the start.
        layers_without_change: Layers whose routers did not move at all.
        max_variance: The order rests on the change alone.
        router_caveats: Layer -> key of `CAVEATS`: there a row's norm does not mean what it means elsewhere.
        annealing: Training ended on it.
        edited: Widths were changed by hand, with `PrecisionPlan.with_bits`.
        read_from: Name of the folder of another tool's checkpoint whose widths these are.
        group_sizes: Group sizes found there.
    """

    auto: str
    initial: str
    final: str
    statistics: StatisticsUsed
    text: str
    calibration_tokens: int
    predicted_cost: float
    gap: float
    without_gradient: int
    left_over: float
    spread_of_final_norms: SpreadOfNorms
    layers_without_change: list[str]
    max_variance: Literal["not measured"]
    router_caveats: dict[str, str]
    annealing: AnnealingNote
    edited: bool
    read_from: str
    group_sizes: list[int]
