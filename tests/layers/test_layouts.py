"""Named layouts: mocks with the names, classes and shapes of the frameworks' own modules, and their formulas.

Shapes and formulas are those of OLMo-core 3.0.0 (nn/moe/mlp.py, nn/moe/v2/routed_experts.py), MegaBlocks
(layers/mlp.py), megatron-core 0.16.1 (transformer/moe/experts.py) and torchtitan 0.3.0 (models/common/moe.py).
"""

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, silu

from moe_precision import MoELayerError, PlanSettings, allocate, find_moe_layers
from moe_precision.layers.naming import LAYOUTS
from moe_precision.quantize.replace import UnsupportedLayoutError, check_packable
from moe_precision.recording.gradients import curvature_of_losses
from moe_precision.recording.second_moments import curvature_of
from tests.support.modules import Holder, bank

EXPERTS, WIDTH = 4, 32


class MoELinearRouter(nn.Module):
    """OLMo-core's: all rows one behind the other."""

    def __init__(self):
        super().__init__()
        self.num_experts, self.d_model, self.top_k = EXPERTS, WIDTH, 2
        self.weight = bank(EXPERTS * WIDTH)


class MoEMLP(nn.Module):
    """OLMo-core's default: ``(silu(x @ w1) * (x @ w3)) @ w2``."""

    def __init__(self, neurons):
        super().__init__()
        self.num_experts = self.num_local_experts = EXPERTS
        self.w1 = bank(EXPERTS * WIDTH, neurons)
        self.w2 = bank(EXPERTS * neurons, WIDTH)
        self.w3 = bank(EXPERTS * WIDTH, neurons)

    def expert(self, x, index):
        w1, w3 = (weight.view(EXPERTS, WIDTH, -1)[index] for weight in (self.w1, self.w3))
        return (silu(x @ w1) * (x @ w3)) @ self.w2.view(EXPERTS, -1, WIDTH)[index]


class DroplessMoEMLP(nn.Module):
    """OLMo-core's other: ``(silu(x @ w1.T) * (x @ w3.T)) @ w2``."""

    def __init__(self, neurons):
        super().__init__()
        self.num_experts = self.num_local_experts = EXPERTS
        self.w1, self.w2, self.w3 = (bank(EXPERTS * neurons, WIDTH) for _ in range(3))

    def expert(self, x, index):
        w1, w2, w3 = (weight.view(EXPERTS, -1, WIDTH)[index] for weight in (self.w1, self.w2, self.w3))
        return (silu(x @ w1.T) * (x @ w3.T)) @ w2


class RoutedExperts(nn.Module):
    """OLMo-core's second version: ``(silu(gate) * up) @ w_down``, gate and up behind each other."""

    def __init__(self, neurons):
        super().__init__()
        self.num_experts = self.num_local_experts = EXPERTS
        self.w_up_gate, self.w_down = bank(EXPERTS, 2 * neurons, WIDTH), bank(EXPERTS, neurons, WIDTH)


class MLP(nn.Module):
    """MegaBlocks' with a capacity: ``gelu(x @ w1) @ w2``."""

    def __init__(self, neurons):
        super().__init__()
        self.w1, self.w2 = bank(EXPERTS, WIDTH, neurons), bank(EXPERTS, neurons, WIDTH)

    def expert(self, x, index):
        return gelu(x @ self.w1[index]) @ self.w2[index]


class SparseGLU(nn.Module):
    """MegaBlocks' without one: ``(gelu(x @ w1.T) * (x @ v1.T)) @ w2``."""

    def __init__(self, neurons):
        super().__init__()
        self.w1, self.w2, self.v1 = (bank(EXPERTS * neurons, WIDTH) for _ in range(3))

    def expert(self, x, index):
        w1, w2, v1 = (weight.view(EXPERTS, -1, WIDTH)[index] for weight in (self.w1, self.w2, self.v1))
        return (gelu(x @ w1.T) * (x @ v1.T)) @ w2


class TEGroupedLinear(nn.Module):
    def __init__(self, out, inp):
        super().__init__()
        for expert in range(EXPERTS):
            self.register_parameter(f"weight{expert}", bank(out, inp))


def olmo(experts):
    return Holder(feed_forward_moe=Holder(router=MoELinearRouter(), experts=Holder(mlp=experts)))


def megablocks(experts):
    router = Holder(layer=nn.Linear(WIDTH, EXPERTS, bias=False))
    return Holder(ffn=Holder(router=router, experts=Holder(mlp=experts)))


def megatron(sequential=False):
    if sequential:
        experts = [
            Holder(linear_fc1=Holder(weight=bank(96, WIDTH)), linear_fc2=Holder(weight=bank(WIDTH, 48)))
            for _ in range(EXPERTS)
        ]
        experts = Holder(local_experts=nn.ModuleList(experts))
    else:
        experts = Holder(linear_fc1=TEGroupedLinear(96, WIDTH), linear_fc2=TEGroupedLinear(WIDTH, 48))
    experts.num_local_experts = EXPERTS
    return Holder(mlp=Holder(router=Holder(weight=bank(EXPERTS, WIDTH)), experts=experts))


def torchtitan(old=False):
    shapes = {"w1": (48, WIDTH), "w2": (WIDTH, 48), "w3": (48, WIDTH)}
    suffixes = dict.fromkeys(shapes, "") if old else {"w1": "_EFD", "w2": "_EDF", "w3": "_EFD"}
    banks = Holder(**{name + suffixes[name]: bank(EXPERTS, *shape) for name, shape in shapes.items()})
    router = Holder(gate=nn.Linear(WIDTH, EXPERTS, bias=False))
    shared = Holder(w1=nn.Linear(WIDTH, 48, bias=False), w2=nn.Linear(48, WIDTH, bias=False))
    parts = {"experts": banks} if old else {"routed_experts": Holder(inner_experts=banks)}
    return Holder(layers=nn.ModuleDict({"0": Holder(moe=Holder(router=router, shared_experts=shared, **parts))}))


@pytest.mark.parametrize("neurons", [48, WIDTH], ids=["wide", "square"])
@pytest.mark.parametrize(
    ("kind", "layout", "act", "gate"),
    [
        (MoEMLP, "olmo-core", silu, "w3"),
        (DroplessMoEMLP, "olmo-core", silu, "w3"),
        (MLP, "megablocks", gelu, None),
        (SparseGLU, "megablocks", gelu, "v1"),
    ],
)
def test_an_expert_computed_from_its_matrices_is_that_of_the_module(kind, layout, act, gate, neurons):
    torch.manual_seed(0)
    banks = kind(neurons)
    (layer,) = find_moe_layers((olmo if layout == "olmo-core" else megablocks)(banks), layout=layout)
    assert (layer.num_experts, layer.width, layer.first) == (EXPERTS, WIDTH, "w1")
    x = torch.randn(5, WIDTH)
    for index in range(EXPERTS):
        w = layer.expert_weights(index)
        hidden = act(x @ w["w1"].T) * (x @ w[gate].T if gate else 1)
        torch.testing.assert_close(hidden @ w["w2"].T, banks.expert(x, index))


def test_olmo_cores_flat_router_has_a_norm_for_each_row():
    model = olmo(MoEMLP(48))
    with pytest.raises(MoELayerError, match=r"names of olmo-core: layout='olmo-core' finds them"):
        find_moe_layers(model)
    (layer,) = find_moe_layers(model, layout="olmo-core")
    rows = model.feed_forward_moe.router.weight.detach().view(EXPERTS, WIDTH)
    torch.testing.assert_close(layer.row_norms(), rows.square().sum(1).sqrt())
    assert (layer.name, layer.shape.top_k) == ("feed_forward_moe", 2)
    model.feed_forward_moe.router.d_model = 31
    with pytest.raises(MoELayerError, match=r"is 1-D with 128 values, .* which are 4 and 31"):
        find_moe_layers(model, layout="olmo-core")


def test_olmo_cores_second_version():
    experts = RoutedExperts(48)
    block = Holder(routed_experts_router=MoELinearRouter(), routed_experts=experts)
    (layer,) = find_moe_layers(Holder(blocks=nn.ModuleDict({"0": block})), layout="olmo-core")
    assert layer.projections == {"w_up_gate": (96, WIDTH), "w_down": (WIDTH, 48)}
    torch.testing.assert_close(layer.expert_weights(3)["w_down"], experts.w_down[3].T)


@pytest.mark.parametrize("sequential", [False, True], ids=["TEGroupedMLP", "SequentialMLP"])
def test_megatron(sequential):
    model = megatron(sequential)
    (layer,) = find_moe_layers(model, layout="megatron")
    assert (layer.name, layer.router) == ("mlp", "mlp.router.weight")
    assert layer.projections == {"linear_fc1": (96, WIDTH), "linear_fc2": (WIDTH, 48)}
    name = "mlp.experts.local_experts.3.linear_fc2.weight" if sequential else "mlp.experts.linear_fc2.weight3"
    torch.testing.assert_close(layer.expert_weights(3)["linear_fc2"], model.get_parameter(name))


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("given", [{}, {"layout": "torchtitan"}])
def test_torchtitan(old, given):
    model = torchtitan(old)
    (layer,) = find_moe_layers(model, **given)
    assert (layer.name, layer.router) == ("layers.0.moe", "layers.0.moe.router.gate.weight")
    assert list(layer.projections.values()) == [(48, WIDTH), (WIDTH, 48), (48, WIDTH)]


def test_a_layout_is_a_setting_and_stays_in_the_plan(tmp_path):
    model = megatron()
    plan = allocate(model, method="weight_error", average_bits=2.5, group_size=16, layout="megatron")
    plan.save(tmp_path / "plan.json")
    assert type(plan).load(tmp_path / "plan.json").patterns == {"layout": "megatron"}
    with pytest.raises(UnsupportedLayoutError, match="laid out as 'separate'"):
        check_packable(model, find_moe_layers(model, layout="megatron"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layout": "nemo"}, r"unknown layout 'nemo', expected one of megatron, megablocks, olmo-core, torchtitan"),
        ({"layout": "megatron", "router_pattern": "x"}, "give no router_pattern or expert_pattern"),
    ],
)
def test_what_does_not_go_together(given, message):
    for take in (PlanSettings, lambda **some: find_moe_layers(megatron(), **some)):
        with pytest.raises(MoELayerError, match=message):
            take(**given)


def test_a_layout_that_does_not_fit_says_so():
    with pytest.raises(MoELayerError, match=r"layout='torchtitan' does not fit this model: .* the model has, for exam"):
        find_moe_layers(megatron(), layout="torchtitan")
    two = nn.Sequential(megatron(), torchtitan())
    with pytest.raises(MoELayerError, match=r"experts at '1\.layers\.0\..*' are not matched by layout='megatron'"):
        find_moe_layers(two, layout="megatron")
    assert set(LAYOUTS) == {"megatron", "megablocks", "olmo-core", "torchtitan"}


def test_megablocks_under_expert_parallelism_is_refused():
    model = megablocks(SparseGLU(48))
    model.ffn.experts.mlp.w1.expert_model_parallel = True  # as megablocks/layers/mpu.py marks it
    with pytest.raises(MoELayerError, match="flat banks under expert parallelism cannot be recorded"):
        find_moe_layers(model, layout="megablocks")


def test_flat_banks_that_say_how_many_experts_are_local_are_not_cut_into_more():
    """4 experts of 8, in banks whose rows are a multiple of 8 too."""
    model = olmo(MoEMLP(48))
    router = model.feed_forward_moe.router
    router.num_experts, router.weight = 2 * EXPERTS, bank(2 * EXPERTS * WIDTH)
    with pytest.raises(MoELayerError, match="flat banks under expert parallelism cannot be recorded"):
        find_moe_layers(model, layout="olmo-core")


def test_a_router_with_a_column_for_each_expert_is_not_taken_for_one_of_more_processes():
    """Experts that say how many are local, and a pattern for the router; its 32 rows are a multiple of 4 experts."""
    router = bank(WIDTH, EXPERTS)
    experts = Holder(w1=bank(EXPERTS, 48, WIDTH), w2=bank(EXPERTS, WIDTH, 48))
    experts.num_local_experts = EXPERTS
    model = Holder(mlp=Holder(router=Holder(kernel=router), experts=experts))
    (layer,) = find_moe_layers(model, router_pattern=r"router\.kernel$")
    assert (layer.num_experts, layer.parts, layer.router_transposed) == (EXPERTS, 1, True)
    torch.testing.assert_close(layer.row_norms(), router.detach().norm(dim=0))


@pytest.mark.parametrize("kind", [MoEMLP, DroplessMoEMLP])
def test_curvature_of_flat_banks_is_that_of_each_expert(kind):
    """From the optimizer and from losses: means of the squared gradient of one expert's block of rows."""
    torch.manual_seed(0)
    banks = kind(48)
    layers = find_moe_layers(olmo(banks), layout="olmo-core")
    x = torch.randn(9, WIDTH)

    def loss():
        return sum(banks.expert(x, index).square().mean() * (index + 1) for index in range(EXPERTS))

    optimizer = torch.optim.AdamW(banks.parameters(), lr=0.0, weight_decay=0.0)
    loss().backward()
    squared = {name: weight.grad.square() for name, weight in banks.named_parameters()}
    optimizer.step()
    read, taken = curvature_of(layers, [optimizer]), curvature_of_losses(layers, [loss])
    for name, bank_of in layers[0].banks.items():
        for index, one in enumerate(squared[name].chunk(EXPERTS)):
            expected = one.T if bank_of.transposed else one
            for found in (read, taken):
                torch.testing.assert_close(
                    found.rows["feed_forward_moe"][name][index], expected.mean(1), rtol=1e-4, atol=0
                )
                columns = found.columns["feed_forward_moe"][name][index]
                torch.testing.assert_close(columns, expected.mean(0), rtol=1e-4, atol=0)
