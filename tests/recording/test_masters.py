"""Norms are read from the float32 copies that are trained, where an optimizer or DeepSpeed keeps them."""

import importlib.util

import pytest
import torch

from moe_precision import CurvatureError, find_moe_layers
from moe_precision.present.tables import as_text, layers_table
from moe_precision.recording.masters import Masters, innermost
from moe_precision.recording.optimizer_check import check_second_moments
from moe_precision.recording.router_norms import router_norms
from moe_precision.recording.second_moments import curvature_of
from tests.support import deepspeed_run
from tests.support.models import build
from tests.support.processes import finish, start


class WithCopies(torch.optim.SGD):
    """Transformer Engine's FusedAdam(master_weights=True): copies in the state, from the first step on."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    copy = state.setdefault("master_param", parameter.detach().float())
                    copy -= group["lr"] * parameter.grad.float()
                    parameter.data.copy_(copy)


def trained(model, optimizer, steps=3):
    layers = find_moe_layers(model)
    masters = Masters(layers, [optimizer])
    norms, said = [router_norms(layers).clone()], [masters.news()]
    for step in range(steps):
        model(**deepspeed_run.batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        norms.append(router_norms(layers).clone())
        said.append(masters.news())
    return layers, norms, said


def test_the_optimizers_copies_are_read_as_soon_as_they_are_there():
    model = build("mixtral").bfloat16()
    optimizer = WithCopies(model.parameters(), lr=1e-5)
    layers, norms, said = trained(model, optimizer)
    assert said == ["", "router norms are read from the optimizer's float32 copies of the weights from here on", "", ""]
    assert "float32 (the optimizer's copy)" in as_text(layers_table(layers))
    expected = [optimizer.state[layer.router_is.parameter()]["master_param"].norm(dim=1) for layer in layers]
    torch.testing.assert_close(norms[-1], torch.cat(expected), rtol=0, atol=0)
    assert not torch.equal(norms[-1], router_norms(find_moe_layers(model)))  # the rounded weights' norms are others


def test_megatrons_copy_is_an_attribute_of_the_parameter():
    model = build("mixtral").bfloat16()
    layers = find_moe_layers(model)
    for layer in layers:
        weight = layer.router_is.parameter()
        weight.main_param = weight.detach().float() * (1 + 2**-10)  # is rounded off in bfloat16
    masters = Masters(layers, [])
    expected = (1 + 2**-10) * router_norms(find_moe_layers(model))
    torch.testing.assert_close(router_norms(layers), expected, rtol=1e-6, atol=0)
    assert masters.news() == "router norms are read from Megatron's float32 copies of the weights from here on"
    layers[0].router_is.parameter().main_param = torch.zeros(3)  # a shard of the distributed optimizer
    assert not torch.equal(layers[0].row_norms(), torch.zeros(8))


def test_copies_of_other_weights_than_the_models_are_not_read():
    """The best checkpoint loaded at the end, or averaged weights: the plan is of what the model has then."""
    model = build("mixtral").bfloat16()
    optimizer = WithCopies(model.parameters(), lr=1e-5)
    layers, norms, _ = trained(model, optimizer, steps=1)
    with torch.no_grad():
        for layer in layers:
            layer.router_is.parameter().mul_(2)
    assert torch.equal(router_norms(layers), router_norms(find_moe_layers(model)))
    assert (router_norms(layers) > 1.9 * norms[-1]).all()


def test_an_optimizer_that_is_restored_after_its_copies_were_looked_for():
    model = build("mixtral").bfloat16()
    optimizer = WithCopies(model.parameters(), lr=1e-5)
    trained(model, optimizer, steps=1)
    resumed = WithCopies(model.parameters(), lr=1e-5)
    layers = find_moe_layers(model)
    masters = Masters(layers, [resumed])
    resumed.__setstate__({"state": optimizer.state, "param_groups": resumed.param_groups})  # as load_state_dict ends
    assert "the optimizer's float32 copies" in masters.news()
    copies = [optimizer.state[layer.router_is.parameter()]["master_param"].norm(dim=1) for layer in layers]
    torch.testing.assert_close(router_norms(layers), torch.cat(copies), rtol=0, atol=0)


def test_curvature_of_weights_with_megatrons_copies_is_refused_before_training():
    model = build("mixtral", num_hidden_layers=1).bfloat16()
    for parameter in model.parameters():
        parameter.main_param = parameter.detach().float()
    optimizer = torch.optim.AdamW([parameter.main_param for parameter in model.parameters()])
    with pytest.raises(CurvatureError, match="is trained through Megatron's float32 copy, whose moments are not read"):
        check_second_moments(find_moe_layers(model), [optimizer])


def test_float32_weights_and_plain_optimizers_are_read_as_they_are():
    model = build("mixtral")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    layers, _, said = trained(model, optimizer, steps=1)
    assert said == ["", ""]
    assert layers[0].router_is.master is None

    class Around:
        def __init__(self, inner):
            self.optimizer = inner

    assert innermost([Around(Around(optimizer))]) == [optimizer]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_deepspeed_gives_its_copies_and_its_moments(tmp_path):
    """Against the same three steps in one process with AdamW in float32, at a rate of 3e-6."""
    environment = {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "WORLD_SIZE": "2"}
    logs = [tmp_path / f"rank_{rank}.txt" for rank in (0, 1)]
    ranks = [
        start(deepspeed_run.main, str(tmp_path), r, log=logs[r], RANK=str(r), LOCAL_RANK=str(r), **environment)
        for r in (0, 1)
    ]
    model = build("mixtral")
    optimizer = torch.optim.AdamW(model.parameters(), lr=deepspeed_run.RATE, weight_decay=0.0)
    layers, norms, _ = trained(model, optimizer)
    change, expected = norms[-1] - norms[0], curvature_of(layers, [optimizer])
    finish(*ranks, logs=logs)
    for rank in (0, 1):
        results = torch.load(tmp_path / f"result_{rank}.pt")
        for (stage, half), found in results.items():
            assert ("DeepSpeed's float32 copies" in found["news"]) == half, stage
            for kind in ("rows", "columns"):
                for name, banks in getattr(expected, kind).items():
                    for projection, means in banks.items():
                        error = (found[kind][name][projection] - means).norm() / means.norm()
                        assert error < (0.1 if half else 1e-4), (stage, half, kind, projection)
            if half:  # the change of the copies is that of a float32 run; the rounded weights have hardly moved
                assert (found["change"] - change).norm() < 0.3 * change.norm()
                assert found["of_weights"].norm() < 0.2 * change.norm()
            else:
                torch.testing.assert_close(found["change"], change, rtol=0.05, atol=2e-7)
