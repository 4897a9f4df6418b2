"""Curvature read from optimizers, against their own state and each other."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from pytorch_lightning.core.optimizer import LightningOptimizer
from transformers.optimization import Adafactor

from moe_precision import find_moe_layers
from moe_precision.recording.curvature import CurvatureError
from moe_precision.recording.second_moments import curvature_of
from tests.support.models import build
from tests.support.optimizers import trained_with


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "switch_transformers"])
def test_means_of_the_second_moment(family):
    model = build(family)
    optimizer = trained_with(torch.optim.AdamW, model, betas=(0.9, 0.95))
    layers = find_moe_layers(model)
    curvature = curvature_of(layers, [optimizer])
    layer = layers[-1]
    for name, bank in layer.banks.items():
        parameters = [weight.parameter() for weight in bank.weights]
        moments = [optimizer.state[p]["exp_avg_sq"].double() / (1 - 0.95**3) for p in parameters]
        moment = moments[0] if len(moments) == 1 else torch.stack(moments)  # (E, rows, columns)
        if layer.transposed:
            moment = moment.transpose(1, 2)
        torch.testing.assert_close(curvature.rows[layer.name][name].double(), moment.mean(2), rtol=1e-4, atol=0)
        torch.testing.assert_close(curvature.columns[layer.name][name].double(), moment.mean(1), rtol=1e-4, atol=0)
        assert curvature.columns[layer.name][name].shape == (8, layer.projections[name][1])


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.Adagrad])
def test_other_optimizers_are_named(optimizer_class):
    model = build("mixtral")
    found = r"no second moment of shape \(8, 256, 64\) for .*gate_up_proj'.*torch.\w+ is not among.*curvature_batches=N"
    with pytest.raises(CurvatureError, match=found):
        curvature_of(find_moe_layers(model), [trained_with(optimizer_class, model)])


class Renamed(torch.optim.AdamW):
    """AdamW under another name is AdamW."""


class Normalizing(torch.optim.AdamW):
    """Holds the same keys, of another gradient."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad /= parameter.grad.norm()
        return super().step(closure)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer_class", "settings", "problem"),
    [
        (torch.optim.Adam, {"weight_decay": 0.01}, "torch.optim.Adam adds the weight decay of 0.01 to the gradient"),
        (torch.optim.NAdam, {"weight_decay": 0.01}, "torch.optim.NAdam adds the weight decay"),
        (torch.optim.RAdam, {"weight_decay": 0.01}, "torch.optim.RAdam adds the weight decay"),
        (Normalizing, {}, "Normalizing is not among the optimizers"),
        (torch.optim.Adam, {}, None),
        (torch.optim.AdamW, {"weight_decay": 0.1}, None),
        (torch.optim.AdamW, {"weight_decay": 0.1, "amsgrad": True}, None),
        (torch.optim.NAdam, {"weight_decay": 0.01, "decoupled_weight_decay": True}, None),
        (torch.optim.RAdam, {}, None),
        (Renamed, {}, None),
    ],
)
def test_only_running_means_of_squared_gradients_are_read(optimizer_class, settings, problem):
    """Against means that are taken here, of the gradients themselves."""
    model = build("mixtral", num_hidden_layers=1)
    layers = find_moe_layers(model)
    optimizer = optimizer_class(model.parameters(), lr=1e-3, betas=(0.9, 0.95), **settings)
    bank = layers[0].banks["down_proj"].weights[0].parameter()
    mean, rate = 0.0, 0.05
    for seed in range(5):
        ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        mean = (1 - rate) * mean + rate * bank.grad.double().square()
        optimizer.step()
    if problem is not None:
        with pytest.raises(CurvatureError, match=problem):
            curvature_of(layers, [optimizer])
        return
    rows = curvature_of(layers, [optimizer]).rows[layers[0].name]["down_proj"]
    torch.testing.assert_close(rows.double(), mean.mean(2) / (1 - 0.95**5), rtol=1e-4, atol=0)


def test_sixteen_bit_moments_that_cannot_decay_are_refused():
    model = build("mixtral").bfloat16()
    curvature_of(find_moe_layers(model), [trained_with(torch.optim.AdamW, model, betas=(0.9, 0.95))])
    optimizer = trained_with(torch.optim.AdamW, model, betas=(0.9, 0.999))
    with pytest.raises(CurvatureError, match=r"torch.bfloat16 hardly decays with beta2=0.999"):
        curvature_of(find_moe_layers(model), [optimizer])


def test_adafactor_of_torch_in_sixteen_bits_is_refused():
    """Its state is of the parameters' dtype; transformers' is float32."""
    model = build("mixtral").bfloat16()
    curvature_of(find_moe_layers(model), [trained_with(Adafactor, model, relative_step=False, scale_parameter=False)])
    optimizer = trained_with(torch.optim.Adafactor, model)
    with pytest.raises(CurvatureError, match=r"Adafactor's moments in torch.bfloat16 hardly decay"):
        curvature_of(find_moe_layers(model), [optimizer])


def test_a_wrapper_that_nobody_knows_is_not_looked_through():
    """It may change the gradients before the optimizer inside sees them, as OrthoGrad does."""

    class OrthoGrad:
        def __init__(self, optimizer):
            self.optimizer, self.param_groups = optimizer, optimizer.param_groups

    model = build("mixtral")
    optimizer = trained_with(torch.optim.AdamW, model)
    curvature_of(find_moe_layers(model), [LightningOptimizer(optimizer)])
    Accelerator(cpu=True)
    curvature_of(find_moe_layers(model), [AcceleratedOptimizer(optimizer)])
    with pytest.raises(CurvatureError, match="OrthoGrad is not among"):
        curvature_of(find_moe_layers(model), [OrthoGrad(optimizer)])


def test_a_state_of_another_shape_is_an_error_of_curvature():
    """And not one that ends a run before its model is saved."""
    model = build("mixtral")
    optimizer = trained_with(Adafactor, model, relative_step=False, scale_parameter=False)
    for state in optimizer.state.values():
        if "exp_avg_sq_row" in state:
            state["exp_avg_sq_row"] = state["exp_avg_sq_row"].flatten()[:-1]
    with pytest.raises(CurvatureError, match="the optimizer's state is unlike any known one"):
        curvature_of(find_moe_layers(model), [optimizer])


def test_experts_unfrozen_late_cost_what_others_do():
    model = build("mixtral", num_hidden_layers=2)
    layers = find_moe_layers(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95))
    for step in range(10):
        for layer in layers if step > 6 else layers[:1]:
            for parameter in (*layer.container().parameters(), layer.router_is.parameter()):
                parameter.grad = torch.full_like(parameter, 0.1)
        optimizer.step()
    early, late = (curvature_of(layers, [optimizer]).rows[layer.name]["down_proj"] for layer in layers)
    torch.testing.assert_close(late, early, rtol=1e-4, atol=0)
    torch.testing.assert_close(early, torch.full_like(early, 0.01), rtol=1e-4, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "switch_transformers"])
@pytest.mark.parametrize("optimizer_class", [torch.optim.Adafactor, Adafactor])
def test_adafactor_keeps_these_means_itself(optimizer_class, family):
    settings = {"relative_step": False, "scale_parameter": False} if optimizer_class is Adafactor else {}
    model = build(family)
    optimizer = trained_with(optimizer_class, model, steps=1, **settings)
    layers = find_moe_layers(model)
    curvature = curvature_of(layers, [optimizer])
    reference = build(family)  # after one step of any optimizer the moment is the gradient's square
    adam = trained_with(torch.optim.Adam, reference, steps=1)
    expected = curvature_of(find_moe_layers(reference), [adam])
    for name in expected.layers:
        for projection in expected.rows[name]:
            pairs = (
                (found[name][projection], other[name][projection])
                for found, other in ((curvature.rows, expected.rows), (curvature.columns, expected.columns))
            )
            for found, other in pairs:
                torch.testing.assert_close(found, other, rtol=1e-3, atol=1e-20)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["torchao.optim", "bitsandbytes.optim"])
def test_states_in_eight_bits_are_read(module):
    optimizer_class = pytest.importorskip(module).AdamW8bit
    reference, model = build("mixtral"), build("mixtral")
    expected = curvature_of(find_moe_layers(reference), [trained_with(torch.optim.AdamW, reference)])
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its step, a minute for the same states
        found = curvature_of(find_moe_layers(model), [trained_with(optimizer_class, model)])
    for name in expected.layers:
        ratio = found.rows[name]["down_proj"].sum() / expected.rows[name]["down_proj"].sum()
        assert 0.95 < ratio < 1.05


@pytest.mark.slow
def test_rarely_used_experts_are_on_the_same_scale():
    """Adam skips the parameters of an expert without a token, but not a gradient of zero."""
    found = []
    for none in (True, False):
        model = build("switch_transformers")
        layers = find_moe_layers(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        experts = layers[0].container()
        for step in range(40):
            for index, expert in enumerate(experts.children()):
                used = index in (0, 1) or (index == 2 and step % 10 == 9)
                for parameter in expert.parameters():
                    gradient = torch.full_like(parameter, 0.1 if used else 0.0)
                    parameter.grad = gradient if used or not none else None
            for parameter in layers[1].container().parameters():
                parameter.grad = torch.full_like(parameter, 0.1)
            optimizer.step()
        found.append(curvature_of(layers, [optimizer]).rows[layers[0].name]["wi"])
    skipped, zeros = found
    assert zeros[2].mean() < 0.2 * zeros[0].mean()
    torch.testing.assert_close(skipped[2].mean(), zeros[2].mean(), rtol=0.15, atol=0)
    assert (skipped[3:] == 0).all()  # never used: known, and zero
    with pytest.raises(CurvatureError, match="no gradient has reached any expert"):
        curvature_of(find_moe_layers(model), [torch.optim.AdamW(model.parameters())])


def test_weight_decay_of_groups_without_experts_does_not_matter():
    model = build("mixtral")
    layers = find_moe_layers(model)
    experts = [weight.parameter() for layer in layers for bank in layer.banks.values() for weight in bank.weights]
    others = [p for p in model.parameters() if not any(p is expert for expert in experts)]
    groups = [{"params": experts}, {"params": others, "weight_decay": 0.1}]
    optimizer = torch.optim.Adam(groups, lr=1e-3)
    ids = torch.randint(3, 128, (2, 12))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert curvature_of(layers, [optimizer]).rows[layers[0].name]["down_proj"].sum() > 0
