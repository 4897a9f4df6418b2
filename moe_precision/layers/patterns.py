"""Regular expressions by which a user names routers and experts where structure cannot tell."""

from __future__ import annotations

from typing import TypedDict


class Patterns(TypedDict, total=False):
    """Keywords of `find_moe_layers`; each is there only where it was given."""

    router_pattern: str
    expert_pattern: str
