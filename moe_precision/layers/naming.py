"""How users name routers and experts where structure does not show them. No torch: plans need no more of `layers`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypedDict

from ..errors import MoEPrecisionError


class MoELayerError(MoEPrecisionError, ValueError):
    """The model has no Mixture-of-Experts layer, or one that cannot be described or read without guessing."""


class Patterns(TypedDict, total=False):
    """Keywords of `find_moe_layers`; each is present only if it was given."""

    router_pattern: str
    expert_pattern: str
    layout: str


def check_pattern(argument: str, pattern: str | None) -> None:
    """Raises `MoELayerError` if a pattern is not a regular expression."""
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise MoELayerError(f"{argument}={pattern!r} is not a regular expression: {error}") from error


@dataclass(frozen=True)
class Layout:
    """How a framework lays out a Mixture-of-Experts layer.

    Attributes:
        router: Regular expression searched in clean weight names, as ``router_pattern``.
        experts: The same for the experts' weights, as ``expert_pattern``.
        in_out: Part of the class name of the module that owns the banks -> regular expression of the projections that
            it stores as ``(in, out)``; the first part that occurs counts, and "" is in every name.
    """

    router: str
    experts: str
    in_out: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def stored_in_out(self, owner: str, projection: str) -> bool:
        """Whether a module of class ``owner`` holds ``(in, out)`` matrices under this name."""
        pattern = next((pattern for part, pattern in self.in_out.items() if part in owner), None)
        return pattern is not None and re.fullmatch(pattern, projection) is not None


LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        # megatron-core: TEGroupedMLP, one numbered weight per expert or one 3-D; SequentialMLP, one module per expert
        "megatron": Layout(
            r"mlp\.router\.weight$",
            r"mlp\.experts\.(?:local_experts\.)?(?:linear_fc[12]\.weight)?(?P<expert>\d+)?(?:\.linear_fc[12]\.weight)?$",
        ),
        # MegaBlocks: SparseMLP, SparseGLU and their Grouped forms, flat; MLP, 3-D
        "megablocks": Layout(
            r"router\.layer\.weight$",
            r"experts\.mlp\.(?:w1|w2|v1)$",
            MappingProxyType({"Sparse": "w2", "Grouped": "w2", "": "w1|w2|v1"}),
        ),
        # OLMo-core: MoEMLP and DroplessMoEMLP, flat; RoutedExperts of its second version, 3-D; the router is 1-D
        "olmo-core": Layout(
            r"(?<!shared_experts_)router\.weight$",
            r"(?:experts\.mlp\.w[123]|routed_experts\.w_(?:up_gate|down))$",
            MappingProxyType({"Dropless": "w2", "RoutedExperts": "w_down", "": "w[123]"}),
        ),
        # torchtitan: GroupedExperts, 3-D, all (out, in); before 0.3 in ``experts``, without the suffixes of shapes
        "torchtitan": Layout(
            r"router\.gate\.weight$", r"(?:routed_experts\.inner_experts|moe\.experts)\.w[123](?:_E[DF]{2})?$"
        ),
    }
)


def check_layout(layout: str | None, *patterns: str | None) -> None:
    """Checks the name of a layout.

    Raises:
        MoELayerError: There is none of this name, or patterns are given beside it.
    """
    if layout is None:
        return
    if layout not in LAYOUTS:
        raise MoELayerError(
            f"unknown layout {layout!r}, expected one of {', '.join(LAYOUTS)}; router_pattern and expert_pattern name "
            "the weights of any other"
        )
    if any(pattern is not None for pattern in patterns):
        raise MoELayerError(f"layout={layout!r} names routers and experts: give no router_pattern or expert_pattern")
