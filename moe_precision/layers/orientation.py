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
    """All or none of the banks: transformers' modules have a flag, else the first one reads the layer's input."""
    out, inp = next(iter(experts.banks.values())).shape
    transposed = getattr(experts.node.module, "is_transposed", out == width and inp != width)
    return set(experts.banks) if transposed else set()


def _flat(experts: Experts, width: int) -> set[str]:
    """Names of the banks that are stored ``(in, out)``.

    A name shows which bank maps back to the layer's width. Its shape then shows where its neurons are: in rows, unless
    only the rows are as many as the layer is wide.
    """
    shapes = {name: bank.shape for name, bank in experts.banks.items()}  # (rows, columns) of one expert
    back = {name for name in shapes if _MAPS_BACK.search(name)}
    alone = len(shapes) == 1 and len(set(*shapes.values())) == 2  # a sole matrix reads the layer's input
    if (len(back) != 1 and not alone) or any(width not in shape for shape in shapes.values()):
        raise MoELayerError(
            f"the flat banks at {experts.path!r} hold matrices {shapes} in a layer of width {width}: neither shapes "
            "nor names show which of them are stored (in, out). Mark these with a group (?P<transposed>...) in "
            r"expert_pattern, for example r'experts\.(w1|v1|(?P<transposed>w2))$'"
        )
    neurons_in_rows = {name for name, (_, columns) in shapes.items() if columns == width}
    return (neurons_in_rows & back) | (set(shapes) - neurons_in_rows - back)
