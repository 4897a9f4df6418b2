"""The rules that find the router of a list of experts in a module tree, and note where norms of its rows mislead."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .banks import Experts
from .module_tree import MoELayerError, Node, Weight, is_numbered

_ROUTER_NAME = re.compile(r"(?:^|[._])(?:routers?|gate|gating|wg|classifier|switch|route)(?:$|[._])", re.IGNORECASE)
_NOT_ROUTER = re.compile(
    r"noise|shared|gate_proj|per_layer|forget|attn|attention|norm|embed|lora_|bias|original_module", re.IGNORECASE
)
_COSINE = re.compile(r"cosine|cos_sim|sim_matrix", re.IGNORECASE)
_CONTAINERS = ("ModuleList", "ModuleDict")
_MAX_CLIMB = 3  # how many parents above the experts may hold the router

CAVEATS = {
    "hash": "picks experts by token id; its rows only weight the chosen ones, so their change says nothing about "
    "which expert has learned what",
    "mlp": "is a network of several layers; the norms are of its last matrix, whose inputs are learned too",
    "cosine": "looks like a cosine router, which divides by the norm of its rows: the norm does not act on the routing",
}


class NoRouter(str):
    """A message: the experts have no router at all."""


@dataclass(frozen=True, eq=False)
class Router:
    """A router and where it is.

    Attributes:
        weight: ``(rows, d)``, row ``e`` belongs to expert ``e``.
        root: The smallest node that holds router and experts.
        width: Width of the router's input, of its first matrix if it is a network.
        caveat: A key of `CAVEATS` where the norm of a row does not mean what it does elsewhere, else empty.
        transposed: The weight is ``(d, rows)``.
    """

    weight: Weight
    root: Node
    width: int
    caveat: str
    transposed: bool = False


def find_router(tree: Node, experts: Experts, others: list[Experts], pattern: str | None = None) -> Router | str | None:
    """Looks for the router around some experts, from their container itself outwards.

    Args:
        tree: The model's tree.
        experts: The experts.
        others: All that may be experts, these ones included.
        pattern: Regular expression searched in clean names; only matching weights are considered, whatever their name.

    Returns:
        The router; a message if experts that are named as such have no clear router; None if an unnamed list turns out
        not to be a Mixture-of-Experts layer.
    """
    if pattern is not None:
        return _by_pattern(tree, experts, others, pattern)
    path, count, paths = experts.path, experts.num_experts, [other.path for other in others]
    if count == 0:
        raise MoELayerError(
            f"the banks at {path!r} are flat: give router_pattern, whose rows tell how many experts; or, if these are "
            r"the matrices of one expert, mark its index in expert_pattern with a group (?P<expert>\d+)"
        )
    parts = path.split(".") if path else []
    best: dict[tuple[int, ...], list[tuple[Weight, Node]]] = {}  # rank, the lowest is the best
    for climb in range(min(_MAX_CLIMB, len(parts)) + 1):
        root = tree.get(".".join(parts[: len(parts) - climb]))
        if climb and type(root.module).__name__ in _CONTAINERS:
            break
        for name, weight in root.named_weights():
            rank = _rank(name, weight.shape, experts, climb)
            if rank is None or _belongs_elsewhere(root.path, weight.name, path, paths):
                continue
            candidates = best.setdefault(rank, [])
            if all(weight is not other for other, _ in candidates):
                candidates.append((weight, root))
        if any(rank[0] == 0 for rank in best):
            break  # a matrix that is called a router: no need to look further out
    if not best:
        message = NoRouter(f"experts at {path!r} have no router: no matrix with {count} rows near them")
        return message if experts.named else None
    winners = best[min(best)]
    if len(winners) > 1:
        names = ", ".join(weight.name for weight, _ in winners)
        return f"experts at {path!r} have several possible routers: {names}; choose with router_pattern"
    weight, root = winners[0]
    return _router(tree, root, weight)


def _by_pattern(tree: Node, experts: Experts, others: list[Experts], pattern: str) -> Router | str | None:
    """The matching weight that shares the longest path with the experts, unless it is nearer to other ones."""
    matching = [w for name, w in tree.named_weights() if re.search(pattern, name) and len(w.shape) == 2]
    if not matching:
        matrices = sorted((w.shape[0], name) for name, w in tree.named_weights() if len(w.shape) == 2)
        some = ", ".join(name for _, name in matrices[:5])
        raise MoELayerError(f"router_pattern={pattern!r} matches no matrix; the model has {some}, ...")
    matching = [weight for weight in matching if _may_serve(weight, experts, others)]
    if not matching and experts.named:
        return f"experts at {experts.path!r}: what router_pattern matches is a part of experts, or beside other ones"
    if not matching:
        return None  # such as the list of all layers, each of which has experts and a router
    shared = [len(_common(weight.name.rpartition(".")[0], experts.path)) for weight in matching]
    nearest = [weight for weight, length in zip(matching, shared, strict=True) if length == max(shared)]
    if len(nearest) > 1:
        names = ", ".join(weight.name for weight in nearest)
        return f"experts at {experts.path!r} have several routers that match router_pattern: {names}"
    (weight,) = nearest
    rows, columns = weight.shape
    count = experts.num_experts
    if count == 0:  # flat banks do not show it; the columns of one are the width of the layer
        widths = {bank.weights[0].shape[1] for bank in experts.banks.values()}
        if not widths & {rows, columns}:
            some = " or ".join(str(width) for width in sorted(widths))
            return f"router {weight.name!r} has shape {weight.shape}, expected (experts, {some})"
        count = rows if columns in widths else columns
    else:
        widths = {width for bank in experts.banks.values() for width in bank.shape}
    if experts.parallel and rows % count == 0 and columns != count:  # else it has a column for each
        return _router(tree, tree.get(_common(weight.name.rpartition(".")[0], experts.path)), weight)
    beyond = rows in widths and columns not in widths and columns > count  # columns of null experts too
    transposed = rows != count and (columns == count or beyond)
    if rows < count and not transposed:
        return f"router {weight.name!r} has shape {weight.shape}, expected a row for each of {count} experts"
    root = tree.get(_common(weight.name.rpartition(".")[0], experts.path))
    return _router(tree, root, weight, transposed)


def _may_serve(weight: Weight, experts: Experts, others: list[Experts]) -> bool:
    """Whether a weight is no part of these experts, and not nearer to other ones that it could serve."""
    if _is_part(weight.name, experts.path):
        return False
    owner = weight.name.rpartition(".")[0]
    nearness = len(_common(owner, experts.path))
    return not any(
        len(_common(owner, other.path)) > nearness
        and not _is_part(weight.name, other.path)
        and (other.named or other.num_experts in weight.shape)
        for other in others
    )


def _is_part(name: str, path: str) -> bool:
    """Whether a weight is that of one expert in a container."""
    inside = name.removeprefix(f"{path}." if path else "")
    return (inside != name or not path) and is_numbered(inside.split(".")[0])


def _common(first: str, second: str) -> str:
    shared = []
    for one, other in zip(first.split("."), second.split("."), strict=False):
        if one != other:
            break
        shared.append(one)
    return ".".join(shared)


def _rank(name: str, shape: tuple[int, ...], experts: Experts, climb: int) -> tuple[int, ...] | None:
    """How well a weight would do as a router, lower is better; None if it cannot be one.

    Nearer matrices that are named as routers rank higher. Near experts that are named as such, a matrix of any name
    will do, if it reads one of the experts' widths; all of these are equally good, so two of them tie.
    """
    relative, count = name.removesuffix(".weight"), experts.num_experts
    if len(shape) != 2 or shape[1] == 1 or _NOT_ROUTER.search(relative):
        return None
    extra = shape[0] - count  # rows of shared or null experts
    if experts.null_experts and extra != experts.null_experts:
        return None
    if experts.parallel and extra > 0 and shape[0] % count == 0 and _ROUTER_NAME.search(relative):
        return (0, 1, climb, 0, relative.count("."))  # rows for the experts of other processes too
    if _ROUTER_NAME.search(relative):
        unlikely = extra and not (experts.named and 0 < extra <= 2 * count and shape[1] != count)
        return None if unlikely else (0, int(extra > 0), climb, extra, relative.count("."))
    widths = {width for bank in experts.banks.values() for width in bank.shape}
    return (1,) if experts.named and climb <= 1 and not extra and shape[1] in widths else None


def _belongs_elsewhere(root: str, name: str, path: str, containers: list[str]) -> bool:
    """Whether a weight is that of an expert, or sits in a branch with other experts: it is their router then."""
    if name.startswith(path + ".") or not path:
        return _is_part(name, path)
    relative = name.removeprefix(root).lstrip(".").split(".")[0]
    branch = f"{root}.{relative}" if root else relative
    return any(f"{other}.".startswith(f"{branch}.") for other in containers if other != path)


def _router(tree: Node, root: Node, weight: Weight, transposed: bool = False) -> Router:
    """The router, with its kind if its rows alone do not give the logits."""
    owner = tree.get(weight.name.rpartition(".")[0])
    width = weight.shape[0 if transposed else 1]
    inner = weight.name.removeprefix(root.path).lstrip(".")
    if hasattr(owner.module, "tid2eid"):
        return Router(weight, root, width, "hash", transposed)
    if _COSINE.search(f"{inner} {type(owner.module).__name__}"):
        return Router(weight, root, width, "cosine", transposed)
    top = root.children.get(inner.split(".")[0])  # the router's module, if it is one of its own
    if top is not None and inner.count(".") > 1 and top.path != owner.path:
        others = [w for _, w in top.named_weights() if w is not weight and len(w.shape) == 2]
        matrices = [w for w in others if not _NOT_ROUTER.search(w.name)]
        if any(w.shape[0] == width for w in matrices):
            return Router(weight, root, matrices[0].shape[1], "mlp", transposed)
    return Router(weight, root, width, "", transposed)


def product_keys(tree: Node) -> list[str]:
    """Layers whose experts are rows of embeddings, chosen by pairs of keys (doge): no row belongs to one expert."""
    found = []
    for node in tree.nodes():
        tables = [child for child in node.children.values() if type(child.module).__name__ == "Embedding"]
        sizes = [table.weights["weight"].shape[0] for table in tables if "weight" in table.weights]
        for name, child in node.children.items():
            rows = child.weights["weight"].shape[0] if "weight" in child.weights else 0
            if _ROUTER_NAME.search(name) and len(sizes) == 2 and sizes[0] == sizes[1] >= (rows // 2) ** 2 > 1:
                found.append(
                    f"{child.path!r} is a product-key router: {sizes[0]} experts are pairs of its {rows} rows, so "
                    "no expert has a norm of its own, and no plan can be made"
                )
    return found
