"""Flat banks: an expert computed from its matrices gives what the module that owns them gives.

The modules have the shapes, the order of registration and the formulas of MegaBlocks, without its kernels: in
megablocks/layers/mlp.py and glu.py every parameter is ``(E * neurons, d)``, and a GLU registers ``v1`` last.
"""

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu

from moe_precision import MoELayerError, find_moe_layers
from tests.support.modules import Holder, bank

EXPERTS, WIDTH = 4, 32
PATTERNS = {"router_pattern": r"router\.layer\.weight$", "expert_pattern": r"experts\.mlp\.(w1|v1|w2)$"}


class SparseMLP(nn.Module):
    """``act(x @ w1.T) @ w2``."""

    def __init__(self, neurons):
        super().__init__()
        self.w1 = bank(EXPERTS * neurons, WIDTH)
        self.w2 = bank(EXPERTS * neurons, WIDTH)

    def expert(self, x, index):
        w1, w2 = (weight.view(EXPERTS, -1, WIDTH)[index] for weight in (self.w1, self.w2))
        return gelu(x @ w1.t()) @ w2


class SparseGLU(SparseMLP):
    """``(act(x @ w1.T) * (x @ v1.T)) @ w2``."""

    def __init__(self, neurons):
        super().__init__(neurons)
        self.v1 = bank(EXPERTS * neurons, WIDTH)

    def expert(self, x, index):
        w1, v1, w2 = (weight.view(EXPERTS, -1, WIDTH)[index] for weight in (self.w1, self.v1, self.w2))
        return (gelu(x @ w1.t()) * (x @ v1.t())) @ w2


class DbrxExpertGLU(SparseGLU):
    """transformers' order of registration, and the number of experts, so that no pattern is needed."""

    def __init__(self, neurons):
        super().__init__(neurons)
        w2 = self.w2
        del self.w2
        self.w2 = w2
        self.moe_num_experts = EXPERTS


def layer_of(banks):
    return Holder(ffn=Holder(router=Holder(layer=nn.Linear(WIDTH, EXPERTS, bias=False)), experts=Holder(mlp=banks)))


@pytest.mark.parametrize("neurons", [48, WIDTH, 16], ids=["wide", "square", "narrow"])
@pytest.mark.parametrize(
    ("kind", "patterns", "registered"),
    [
        (SparseMLP, PATTERNS, ["w1", "w2"]),
        (SparseGLU, PATTERNS, ["w1", "w2", "v1"]),
        (DbrxExpertGLU, {}, ["w1", "v1", "w2"]),
    ],
)
def test_every_matrix_is_the_one_that_the_expert_uses(kind, patterns, registered, neurons):
    torch.manual_seed(0)
    banks = kind(neurons)
    assert [name for name, _ in banks.named_parameters()] == registered
    (layer,) = find_moe_layers(layer_of(banks), **patterns)
    assert layer.num_experts == EXPERTS
    up, down = (neurons, WIDTH), (WIDTH, neurons)
    assert layer.projections == {name: down if name == "w2" else up for name in registered}
    assert layer.first == "w1"
    x = torch.randn(5, WIDTH)
    for index in range(EXPERTS):
        w = layer.expert_weights(index)
        hidden = gelu(x @ w["w1"].T) * (x @ w["v1"].T if "v1" in w else 1)
        torch.testing.assert_close(hidden @ w["w2"].T, banks.expert(x, index))


def test_shapes_turn_what_names_alone_would_not():
    """Blocks ``(d, neurons)``: here the bank that maps back is ``(out, in)``, and the one that reads is not."""
    banks = Holder(w1=bank(EXPERTS * WIDTH, 48), w2=bank(EXPERTS * WIDTH, 48), v1=bank(EXPERTS * 48, WIDTH))
    banks.num_experts = EXPERTS
    with pytest.raises(MoELayerError, match="not understood"):  # structure takes only banks of one shape
        find_moe_layers(layer_of(banks))
    banks = Holder(v1=bank(EXPERTS * 48, WIDTH), w1=bank(EXPERTS * WIDTH, 48), w2=bank(EXPERTS * WIDTH, 48))
    (layer,) = find_moe_layers(layer_of(banks), **PATTERNS)
    assert layer.projections == {"v1": (48, WIDTH), "w1": (48, WIDTH), "w2": (WIDTH, 48)}
    torch.testing.assert_close(layer.expert_weights(1)["w1"], banks.w1[WIDTH : 2 * WIDTH].T)
    torch.testing.assert_close(layer.expert_weights(1)["w2"], banks.w2[WIDTH : 2 * WIDTH])


def test_a_sole_bank_reads_the_layers_input():
    (layer,) = find_moe_layers(layer_of(Holder(w1=bank(EXPERTS * 48, WIDTH))), **PATTERNS)
    assert layer.projections == {"w1": (48, WIDTH)}
    with pytest.raises(MoELayerError, match="neither shapes nor names show"):
        find_moe_layers(layer_of(Holder(w1=bank(EXPERTS * WIDTH, WIDTH))), **PATTERNS)


def unnamed():
    banks = SparseGLU(48)
    return Holder(a=banks.w1, b=banks.w2, c=banks.v1)


@pytest.mark.parametrize(
    "banks", [unnamed, lambda: Holder(w2=bank(128, WIDTH), down=bank(128, WIDTH))], ids=["no name", "two names"]
)
def test_what_neither_shapes_nor_names_show_is_asked_for(banks):
    message = r"the flat banks at 'ffn\.experts\.mlp' .* show .* \(\?P<transposed>\.\.\.\) in expert_pattern"
    with pytest.raises(MoELayerError, match=message):
        find_moe_layers(layer_of(banks()), **{**PATTERNS, "expert_pattern": r"experts\.mlp"})
    counted = banks()
    counted.num_experts = EXPERTS
    with pytest.raises(MoELayerError, match=message):
        find_moe_layers(layer_of(counted))


def test_a_group_marks_what_is_stored_in_out():
    banks = unnamed()
    patterns = {**PATTERNS, "expert_pattern": r"experts\.mlp\.([ac]|(?P<transposed>b))$"}
    (layer,) = find_moe_layers(layer_of(banks), **patterns)
    assert layer.projections == {"a": (48, WIDTH), "b": (WIDTH, 48), "c": (48, WIDTH)}
    torch.testing.assert_close(layer.expert_weights(2)["b"], banks.b[96:144].T)
    none = {**PATTERNS, "expert_pattern": r"experts\.mlp\.w[12]$(?P<transposed>(?!))?"}
    plain = Holder(w1=bank(EXPERTS * WIDTH, WIDTH), w2=bank(EXPERTS * WIDTH, WIDTH))
    (layer,) = find_moe_layers(layer_of(plain), **none)
    torch.testing.assert_close(layer.expert_weights(3)["w2"], plain.w2[96:])  # names alone would have turned it


def test_a_group_marks_other_layouts_too():
    slices = Holder(w1=bank(EXPERTS, WIDTH, WIDTH), w2=bank(EXPERTS, WIDTH, WIDTH))
    patterns = {**PATTERNS, "expert_pattern": r"experts\.mlp\.(?P<transposed>w[12])$"}
    (layer,) = find_moe_layers(layer_of(slices), **patterns)
    assert layer.transposed
    torch.testing.assert_close(layer.expert_weights(3)["w1"], slices.w1[3].T)
    own = Holder(**{f"{name}_{e}": bank(WIDTH, WIDTH) for name in ("w1", "w2") for e in range(EXPERTS)})
    patterns = {**PATTERNS, "expert_pattern": r"experts\.mlp\.(w1|(?P<transposed>w2))_(?P<expert>\d)$"}
    (layer,) = find_moe_layers(layer_of(own), **patterns)
    torch.testing.assert_close(layer.expert_weights(3)["w1"], own.w1_3)
    torch.testing.assert_close(layer.expert_weights(3)["w2"], own.w2_3.T)
