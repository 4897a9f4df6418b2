"""Which of a layer's banks hold ``(in, out)`` matrices: flags, shapes and names decide, or else the user.

The banks of `flat` layouts follow MegaBlocks: a matrix of every expert is ``(neurons, d)``, so that the one that maps
back to the layer's width is stored ``(in, out)`` and the others ``(out, in)``. Which one that is depends on its use,
not on the order in which parameters are registered (MegaBlocks' GLU has ``w1, w2, v1``).
"""

from __future__ import annotations

import re
from dataclasses import replace

from .banks import Bank, Experts
from .module_tree import MoELayerError

_MAPS_BACK = re.compile(
    r"(?:^|[._])(?:w2|fc2|linear_?2|lin2|wo|w_?out|down(?:_proj)?|c_proj|out(?:put)?_proj|dense_4h_to_h)(?:_weight)?$",
    re.IGNORECASE,
)


def maps_back(name: str) -> bool:
    """Whether the name of a projection says that it maps back to the layer's width (``w2``, ``down_proj``, ...)."""
    return bool(_MAPS_BACK.search(name))


def oriented(experts: Experts, width: int) -> dict[str, Bank]:
    """The banks of some experts, each with the orientation in which it is stored.

    Args:
        experts: The experts, their number known.
        width: Width of the layer's input, ``d``.

    Raises:
        MoELayerError: Neither shapes nor names show the orientation of flat banks.
    """
    if experts.oriented or experts.layout not in ("fused", "flat"):
        return experts.banks
    turned = _fused(experts, width) if experts.layout == "fused" else _flat(experts, width)
    return {name: replace(bank, transposed=name in turned) for name, bank in experts.banks.items()}


def _fused(experts: Experts, width: int) -> set[str]:
    """Names of the banks that are stored ``(in, out)``.

    transformers' modules have a flag for all banks. Else the name of the bank that maps back to the layer's width and
    the shapes decide, whatever the order of registration; a square matrix goes with the others. Without such a name,
    the first bank reads the layer's input and all banks are stored alike.
    """
    shapes = {name: bank.shape for name, bank in experts.banks.items()}  # (rows, columns) of one expert, as stored
    back = {name for name in shapes if maps_back(name)}
    flag = getattr(experts.node.module, "is_transposed", None)
    if flag is None and len(back) != 1:
        rows, columns = next(iter(shapes.values()))
        flag = rows == width and columns != width
    if flag is not None:
        return set(shapes) if flag else set()
    telling = {name: shape for name, shape in shapes.items() if shape[0] != shape[1] and width in shape}
    turned = {name for name, (rows, _) in telling.items() if (rows == width) != (name in back)}
    square = set(shapes) - set(telling)
    return turned | square if telling and turned == set(telling) else turned


def _flat(experts: Experts, width: int) -> set[str]:
    """Names of the banks that are stored ``(in, out)``.

    A name shows which bank maps back to the layer's width. Its shape then shows where its neurons are: in rows, unless
    only the rows are as many as the layer is wide.
    """
    shapes = {name: bank.shape for name, bank in experts.banks.items()}  # (rows, columns) of one expert
    back = {name for name in shapes if maps_back(name)}
    alone = len(shapes) == 1 and len(set(*shapes.values())) == 2  # a sole matrix reads the layer's input
    if (len(back) != 1 and not alone) or any(width not in shape for shape in shapes.values()):
        raise MoELayerError(
            f"the flat banks at {experts.path!r} hold matrices {shapes} in a layer of width {width}: neither shapes "
            "nor names show which of them are stored (in, out). Mark these with a group (?P<transposed>...) in "
            r"expert_pattern, for example r'experts\.(w1|v1|(?P<transposed>w2))$'; or, if these are the matrices of "
            r"one expert, its index with a group (?P<expert>\d+)"
        )
    neurons_in_rows = {name for name, (_, columns) in shapes.items() if columns == width}
    return (neurons_in_rows & back) | (set(shapes) - neurons_in_rows - back)
