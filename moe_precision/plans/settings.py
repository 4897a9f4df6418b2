"""What is asked of a plan: the budget, the levels, the method, and what shares a width. Checked once, when made.

Long because every setting is explained and checked in one place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, cast

from ..layers.naming import Patterns, check_layout, check_pattern
from ..layers.shape import LayerShape
from .dropping import check_dropping
from .levels import DEFAULT_LEVELS, DEFAULT_ORDER_LEVELS, check_budget, check_levels, nominal_bits_of, order_levels
from .methods import ALL_METHODS, AUTO, COST_METHODS, DROPPING_METHODS, METHODS, PLAN_METHODS, MethodName, reads
from .numbers import AllocationError, finite_number, whole_number
from .widths import (
    DROPPED,
    GRANULARITIES,
    Granularity,
    check_group_size,
    check_widths,
    stored_bits_per_weight,
)

DEFAULT_AVERAGE_BITS = 2.5
ZETA = 3.0  # how many times larger a MaxVar must be to overtake, as in the paper
MAX_DROPPED, MIN_TOKENS = 0.5, 32


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """What is asked of a plan. Every function and callback that makes plans takes these keywords, in this order.

    Attributes:
        method: How widths are chosen: a key of `METHODS`, or ``auto`` for ``statistics`` where there are any, else
            ``curvature``, else ``router_norm``; see `resolved`.
        average_bits: Budget: nominal bits per expert weight, on average. 2.5 if no budget is given.
        stored_bits: Budget with scales and offsets included, instead of ``average_bits``.
        expert_gib: Budget as the size of all routed experts in the file, in GiB, instead of ``average_bits``.
        total_gib: Budget as the size of the whole model in the file, in GiB, instead of ``average_bits``.
        rest_gib: What everything but the routed experts takes, for ``total_gib``; by default that of the model.
        bits: Levels to choose from, of 1 to 8, or 16 for "left as it is". A method that orders experts takes one, two,
            or three equally spaced levels, 2 and 3 by default; a method that knows costs takes any, 1 to 4 by default.
            ``uniform`` has only its average. With 0 among them an expert may be dropped whole, which ``statistics``
            alone can price.
        group_size: Weights along the input dimension that share a scale and an offset; a multiple of 8.
        granularity: What shares a width: ``expert``, ``expert+projection``, ``layer`` or ``layer+projection``; all but
            ``expert`` need a method that knows costs. By default ``expert+projection`` for these, else ``expert``.
        seed: For ``method="random"`` and ``"shuffled_curvature"``.
        zeta: Factor of the paper's reorder rule: how many times larger a variance must be to overtake.
        max_dropped: Largest share of a layer's experts that may be dropped, where 0 is among the levels; as many
            as serve a token are kept in any case.
        min_tokens: Tokens of the statistics below which an expert is not dropped: too little was seen of it.
        router_pattern: Regular expression that names the routers' weights, as in `find_moe_layers`.
        expert_pattern: Regular expression that names the experts' weights, as in `find_moe_layers`.
        layout: Instead of patterns, the framework whose layout the model has, as in `find_moe_layers`.

    Raises:
        AllocationError: An unknown method or granularity, two budgets, or a budget outside the levels.
        PlanError: A width or a group size that cannot be stored.

    Example:
        >>> PlanSettings(average_bits=2.5, bits=(2, 3)).levels
        (2, 3)
        >>> PlanSettings(method="curvature", stored_bits=2.78125, bits=(1, 2, 3, 4), group_size=64).nominal_bits()
        2.5
    """

    method: MethodName = AUTO
    average_bits: float | None = None
    stored_bits: float | None = None
    expert_gib: float | None = None
    total_gib: float | None = None
    rest_gib: float | None = None
    bits: Sequence[int] | None = None
    group_size: int = 128
    granularity: Granularity | None = None
    seed: int = 0
    zeta: float = ZETA
    max_dropped: float = MAX_DROPPED
    min_tokens: int = MIN_TOKENS
    router_pattern: str | None = None
    expert_pattern: str | None = None
    layout: str | None = None

    @classmethod
    def among(cls, given: Mapping[str, Any]) -> PlanSettings:
        """The settings among other keywords, such as the ``locals()`` of a function that takes them all."""
        return cls(**{one.name: given[one.name] for one in fields(cls)})

    def __post_init__(self) -> None:
        if self.method not in (AUTO, *METHODS):
            known = ", ".join((AUTO, *ALL_METHODS))
            raise AllocationError(f"unknown method {self.method!r}, expected one of {known}")
        if self.bits is None:
            object.__setattr__(self, "bits", DEFAULT_LEVELS if self.knows_costs else DEFAULT_ORDER_LEVELS)
        if self.granularity is None:
            object.__setattr__(self, "granularity", "expert+projection" if self.knows_costs else "expert")
        self._coerce()
        given = {key: getattr(self, key) for key in BUDGETS if getattr(self, key) is not None}
        if len(given) > 1:
            several = " and ".join(f"{key}={value}" for key, value in given.items())
            raise AllocationError(f"{several} are {len(given)} budgets; give one")
        if self.rest_gib is not None and self.total_gib is None:
            raise AllocationError(f"rest_gib={self.rest_gib} is a part of total_gib, which is not given")
        if not given:
            object.__setattr__(self, "average_bits", DEFAULT_AVERAGE_BITS)
        for name in PATTERNS[:2]:
            check_pattern(name, getattr(self, name))
        check_layout(self.layout, self.router_pattern, self.expert_pattern)
        if self.granularity not in GRANULARITIES:
            raise AllocationError(
                f"unknown granularity {self.granularity!r}, expected one of {', '.join(GRANULARITIES)}"
            )
        if not self.knows_costs and self.granularity != "expert":
            raise AllocationError(
                f"method {self.method!r} orders the experts of a layer: granularity={self.granularity!r} needs a "
                f"method that knows costs, one of {', '.join(COST_METHODS)}"
            )
        if not self.zeta > 0:
            raise AllocationError(f"zeta must be positive, got {self.zeta}")
        if self.may_drop:
            check_dropping(self.method, str(self.granularity), self.levels, self.max_dropped, self.min_tokens)
        self._check_budget()
        decided = self.may_drop or self._is_size or str(self.granularity).startswith("layer")
        if self.method == AUTO and not decided:
            self.resolved("router_norm")

    def _coerce(self) -> None:
        """Plain Python numbers instead of numpy's and torch's, so that what is checked is what is saved."""
        if self.bits is None or isinstance(self.bits, str | int) or not hasattr(self.bits, "__iter__"):
            raise AllocationError(f"bits must list the levels to choose from, as in (2, 3); got {self.bits!r}")
        plain: dict[str, Any] = {"bits": tuple(sorted({whole_number("bits", bits) for bits in self.bits}))}
        plain |= {key: whole_number(key, getattr(self, key)) for key in ("group_size", "seed", "min_tokens")}
        numbers = [key for key in (*BUDGETS, "rest_gib", "zeta", "max_dropped") if getattr(self, key) is not None]
        plain |= {key: finite_number(key, getattr(self, key)) for key in numbers}
        for key, value in plain.items():
            object.__setattr__(self, key, value)
        if not self.bits:
            raise AllocationError("bits must list the levels to choose from, as in (2, 3); got none")

    def _check_budget(self) -> None:
        levels = self.levels
        object.__setattr__(self, "bits", levels)  # of ``uniform`` its width alone
        check_widths(levels)
        if self.average_bits is not None:
            (check_levels if self.knows_costs else check_budget)(self.average_bits, levels)
        elif not self.knows_costs:
            check_budget(levels[-1], levels)
        if self.stored_bits is not None:
            self.nominal_bits()
        stored_bits_per_weight(levels[0], self.group_size)

    @property
    def knows_costs(self) -> bool:
        """Whether the method knows what each width costs, and solves one knapsack over all layers; ``auto`` may."""
        return self.method == AUTO or self.method in COST_METHODS

    @property
    def may_drop(self) -> bool:
        """Whether experts may be dropped: 0 is among the levels."""
        return DROPPED in self.levels

    def resolved(self, method: MethodName, layers: Mapping[str, LayerShape] | None = None) -> PlanSettings:
        """The settings of the method that ``auto`` stands for; others are returned as they are.

        A method that orders experts gives each expert one width, for all of its matrices. Where it cannot take these
        levels, it takes the two around the budget.

        Args:
            method: What was chosen, see `methods.chosen`.
            layers: Layer name -> shape; needed for a budget in GiB.

        Raises:
            AllocationError: The budget is outside the levels, or whole layers were to share a width or experts were to
                be dropped, which needs costs.
        """
        if self.method != AUTO:
            return self
        if self.may_drop and method not in DROPPING_METHODS:
            raise AllocationError(
                f"0 bits drop an expert, and 'auto' has only {method!r} here, which cannot tell what that costs: it "
                "takes the trained weights, their curvature and expert statistics, or levels from 1"
            )
        if method in COST_METHODS:
            return replace(self, method=method)
        if str(self.granularity).startswith("layer"):
            raise AllocationError(
                f"granularity={self.granularity!r} needs what each width costs, and 'auto' has only {method!r} here: "
                "give the model and its curvature"
            )
        levels = order_levels(self.nominal_bits(layers), self.levels)
        return replace(self, method=method, bits=levels, granularity="expert")

    @property
    def levels(self) -> tuple[int, ...]:
        """The widths to choose from, ascending; for ``uniform`` only the average.

        Raises:
            AllocationError: The average of ``uniform`` is not a width.
        """
        if self.method != "uniform":
            return tuple(self.bits or ())
        width = max(self.bits or (0,)) if self.average_bits is None else self.average_bits
        if width not in range(1, 17):
            raise AllocationError(f"method 'uniform' gives all experts one width: average_bits={width} is not a width")
        return (int(width),)

    @property
    def patterns(self) -> Patterns:
        """``router_pattern``, ``expert_pattern`` and ``layout`` where they are given, for `find_moe_layers`."""
        return cast(Patterns, {key: value for key in PATTERNS if (value := getattr(self, key)) is not None})

    @property
    def budget(self) -> str:
        """The budget in words, as in ``2.5 bits``, ``2.28 stored bits``, ``24 GiB`` or ``27 GiB in total``."""
        if self._is_size:
            return f"{self.expert_gib:g} GiB" if self.total_gib is None else f"{self.total_gib:g} GiB in total"
        return f"{self.average_bits:g} bits" if self.stored_bits is None else f"{self.stored_bits:g} stored bits"

    def check_rest_known(self) -> None:
        """Raises `AllocationError` if the budget is ``total_gib`` and what is beside the experts is not known."""
        if self.total_gib is not None and self.rest_gib is None:
            raise AllocationError(
                f"total_gib={self.total_gib:g} is of the whole model, and what is beside its experts is not known: "
                "give the model or its checkpoint folder, or rest_gib, which `moe-precision estimate` prints"
            )

    def check_plannable(self) -> None:
        """Raises `AllocationError` for a method that only ``moe-precision compare`` can carry out."""
        if self.method not in PLAN_METHODS:
            raise AllocationError(
                f"method {self.method!r} needs measured costs, as `moe-precision compare` takes them; expected one of "
                f"{', '.join(PLAN_METHODS)}"
            )

    def check_fits(self, layers: Mapping[str, LayerShape]) -> None:
        """Checks that a model's experts can have such a plan.

        Raises:
            PlanError: The group size does not divide an expert's input width.
            AllocationError: The budget, as a size of all experts, is outside the levels.
        """
        for name, shape in layers.items():
            check_group_size(self.group_size, name, shape.projections)
        self.nominal_bits(layers)

    def with_patterns(self, patterns: Patterns) -> PlanSettings:
        """Settings with the patterns that the layers were found with, which a history may have brought."""
        return replace(self, **patterns) if patterns != self.patterns else self

    def stored_budget(self, layers: Mapping[str, LayerShape]) -> float | None:
        """Bits per expert weight, scales and offsets included, that a budget in bytes leaves; None for a nominal one.

        Args:
            layers: Layer name -> shape; only a budget in GiB depends on them.

        Raises:
            AllocationError: With ``total_gib``, the rest of the model is not known.
        """
        if not self._is_size:
            return self.stored_bits
        self.check_rest_known()
        gib = self.expert_gib if self.total_gib is None else self.total_gib - (self.rest_gib or 0.0)
        return (gib or 0.0) * 2**33 / expert_weights(layers.values())

    @property
    def _is_size(self) -> bool:
        return self.expert_gib is not None or self.total_gib is not None

    def nominal_bits(self, layers: Mapping[str, LayerShape] | None = None) -> float:
        """The average width that the budget leaves for codes.

        Args:
            layers: Layer name -> shape; needed for a budget in GiB.

        Raises:
            AllocationError: The budget is outside the levels, or the rest of the model is not known.
        """
        if self.average_bits is not None:
            return self.average_bits
        stored = self.stored_budget(layers or {})
        assert stored is not None
        try:
            return nominal_bits_of(stored, self.levels, self.group_size, self.knows_costs)
        except AllocationError as error:
            if not self._is_size:
                raise
            weights, rest = expert_weights((layers or {}).values()), self.rest_gib
            given = f"{self.expert_gib} GiB" if rest is None else f"{self.total_gib} GiB less {rest:.4g} for the rest,"
            raise AllocationError(f"{given} for {weights} expert weights: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """What the plan's file holds: the budget, the levels, and what else the method takes."""
        optional = {key: getattr(self, key) for key in (*BUDGETS, "rest_gib", *PATTERNS)}
        found: dict[str, Any] = {key: value for key, value in optional.items() if value is not None}
        found |= {"bits": list(self.levels), "granularity": self.granularity}
        if (known := METHODS.get(self.method)) is not None and known.seeded:
            found["seed"] = self.seed
        if not self.knows_costs and reads(self.method, "max_variance") and self.method != "max_variance":
            found["zeta"] = self.zeta
        if self.may_drop:
            found |= {"max_dropped": self.max_dropped, "min_tokens": self.min_tokens}
        return found

    @classmethod
    def recorded(cls, data: Mapping[str, Any], method: str, group_size: int) -> PlanSettings:
        """The settings in a plan's file, of this release or a later one: only the plan's bits are carried out.

        Args:
            data: What `to_dict` returned.
            method: The plan's method, which this release may not have.
            group_size: The plan's group size.
        """
        settings = object.__new__(cls)
        known = {**data, "method": method, "group_size": group_size, "bits": tuple(data.get("bits", ()))}
        for one in fields(cls):
            default = None if one.default is MISSING else one.default
            object.__setattr__(settings, one.name, known.get(one.name, default))
        return settings


BUDGETS = ("average_bits", "stored_bits", "expert_gib", "total_gib")
PATTERNS = ("router_pattern", "expert_pattern", "layout")


def expert_weights(layers: Iterable[LayerShape]) -> int:
    """Number of weights of all routed experts."""
    return sum(shape.expert_size * shape.num_experts for shape in layers)
