"""What `find_moe_layers` asks about the layers that it finds: is anything missing, double, or elsewhere."""

from __future__ import annotations

from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from ..compat import split_by
from .banks import Experts
from .expert_parallel import states_local_count
from .experts import find_experts
from .module_tree import MoELayerError, Node, root_model
from .routers import Router, find_router


def check_all_layers_here(model: nn.Module) -> None:
    """Raises for a model whose layers are on several processes, each with some: a plan of some would look whole."""
    root = root_model(model)
    stages = split_by(root).get("pp_size", 1) if isinstance(root, PreTrainedModel) else 1
    if stages > 1:
        raise MoELayerError(
            f"the layers of this {type(root).__name__} are split over processes by pipeline parallelism "
            f"(pp_size={stages}), so that this one holds only some of them; load it without pp_size"
        )


def not_matched(tree: Node, taken: list[Experts], by: str) -> list[str]:
    """Experts found by structure that a pattern or a layout does not match: no layer may be skipped."""
    known = {id(w.parameter()) for experts in taken for bank in experts.banks.values() for w in bank.weights}
    candidates = find_experts(tree)
    return [
        f"experts at {experts.path!r} are not matched by {by}"
        for experts in candidates
        if experts.identity not in known and isinstance(find_router(tree, experts, candidates), Router)
    ]


def repeated(names: list[str], what: str) -> list[str]:
    """Messages for names that occur more than once."""
    several = sorted({name for name in names if names.count(name) > 1})
    return [f"{what} {name!r} would serve two lists of experts" for name in several]


def top_k_of(experts: Experts, router: Router) -> int | None:
    """How many experts serve a token, as the router, the experts or a module around them states."""
    path, places = router.root, [router.root.module]
    for part in router.weight.name.removeprefix(router.root.path).lstrip(".").split(".")[:-1]:
        path = path.children[part]
        places.append(path.module)
    places = [*reversed(places), experts.node.module]  # the innermost first
    found = [getattr(module, "top_k", None) for module in places]
    found += [getattr(getattr(module, "config", None), "top_k_experts", None) for module in places]
    return next((k for k in found if type(k) is int and 0 < k <= experts.num_experts), None)


def with_processes(tree: Node, experts: Experts) -> Experts:
    """The experts with the note that they may be those of one process."""
    stated = experts.num_experts > 0 and states_local_count(tree, experts.path, experts.num_experts)
    return replace(experts, parallel=True) if stated else experts
