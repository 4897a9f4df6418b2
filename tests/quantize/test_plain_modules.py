"""Modules of one's own: experts in lists beside a router of any name, packed, saved and read again."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from moe_precision import (
    MoELayerError,
    PlanError,
    QuantizationError,
    allocate,
    find_moe_layers,
    load_packed_state,
    quantize_model,
)
from moe_precision.quantize.modules import PackedLinear
from tests.support.models import build

ROUTER = {"router_pattern": r"decide\.weight$"}
EXPERTS = {"expert_pattern": r"parts\.(?P<expert>\d+)\."}


class Block(nn.Module):
    """A router and experts under names that no rule knows."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(32, 32)
        self.decide = nn.Linear(32, 4, bias=False)
        self.parts = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(4))

    def forward(self, x):  # (N, 32)
        weights = self.decide(x).softmax(-1)  # (N, 4)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.parts):
            chosen = weights.argmax(-1) == index
            out[chosen] = weights[chosen, index, None] * expert(x[chosen])
        return x + self.mix(out)


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(32, 8)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize("patterns", [ROUTER, ROUTER | EXPERTS], ids=["router alone", "both"])
def test_experts_beside_a_router_of_any_name(patterns):
    """In a stack of equal layers, which is a list of equal modules itself."""
    model, x = Net(), torch.randn(50, 32)
    layers = find_moe_layers(model, **patterns)
    assert [(layer.name, layer.router, layer.layout) for layer in layers] == [
        (f"blocks.{index}", f"blocks.{index}.decide.weight", "modules") for index in (0, 1)
    ]
    assert layers[0].projections == {"0": (64, 32), "2": (32, 64)}
    expected = model(x)
    quantize_model(model, allocate(model, method="uniform", average_bits=8, group_size=32, **patterns))
    assert isinstance(model.blocks[1].parts[3][2], PackedLinear)
    assert isinstance(model.blocks[1].decide, nn.Linear)
    assert 0 < (model(x) - expected).norm() / expected.norm() < 1e-2


def test_a_pattern_for_some_matrices_of_an_expert_is_refused():
    patterns = ROUTER | {"expert_pattern": r"parts\.(?P<expert>\d+)\.0\."}
    plan = allocate(Net(), method="uniform", average_bits=8, group_size=32, **patterns)
    with pytest.raises(NotImplementedError, match="laid out as 'separate'"):
        quantize_model(Net(), plan)


def test_a_router_network_with_equal_layers_inside():
    """Its own list of matrices is nearer to the last one than the experts are: they are to be named."""
    model = Block()
    model.decide = nn.ModuleDict({"net": nn.ModuleList(nn.Linear(32, 32) for _ in range(2)), "out": nn.Linear(32, 4)})
    router = {"router_pattern": r"decide\.out\.weight"}
    with pytest.raises(MoELayerError, match="would serve two lists of experts"):
        find_moe_layers(model, **router)
    (layer,) = find_moe_layers(model, **router, **EXPERTS)
    assert (layer.experts, layer.router) == ("parts", "decide.out.weight")


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("non_expert_bits", [None, 8])
def test_saved_and_read_again(non_expert_bits, device, tmp_path):
    model, x = Net(), torch.randn(9, 32)
    plan = allocate(model, method="weight_error", average_bits=2.5, group_size=32, **ROUTER)
    plan.save(tmp_path / "plan.json")
    quantize_model(model, plan, non_expert_bits=non_expert_bits)
    save_file(model.state_dict(), tmp_path / "packed.safetensors")
    with torch.device(device):
        fresh = Net(seed=1)
    state = load_file(tmp_path / "packed.safetensors")
    again = load_packed_state(fresh, tmp_path / "plan.json", state, non_expert_bits=non_expert_bits)
    assert torch.equal(again(x), model(x))
    assert again.moe_precision_kernels().keys() == model.moe_precision_kernels().keys()
    assert not again.training


@pytest.mark.slow
def test_states_that_do_not_belong_to_the_module():
    plan = allocate(Net(), method="weight_error", average_bits=2.5, group_size=32, **ROUTER)
    packed = quantize_model(Net(), plan).state_dict()
    other = allocate(Net(), method="uniform", average_bits=4, group_size=32, **ROUTER)
    for arguments in ((plan, Net().state_dict()), (other, packed), (plan, dict(list(packed.items())[1:]))):
        with pytest.raises(QuantizationError, match="the state is not that of this Net, packed by this plan"):
            load_packed_state(Net(), *arguments)
    with pytest.raises(QuantizationError, match="missing, unexpected"):
        load_packed_state(Net(), plan, packed, non_expert_bits=8)
    with pytest.raises(PlanError):
        load_packed_state(Block(), plan, packed)
    with pytest.raises(QuantizationError, match="load it with from_pretrained"):
        load_packed_state(build("mixtral"), plan, packed)
