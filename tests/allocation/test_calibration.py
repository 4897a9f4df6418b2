"""Costs scaled to the measured divergence, against the divergence of packed models."""

import copy

import pytest
import torch
from torch import nn

from moe_precision import AllocationError, allocate, find_moe_layers, quantize_model, replan
from moe_precision.allocation import calibration as module
from moe_precision.allocation.calibration import Calibration, calibrated_costs, calibration_on
from moe_precision.allocation.costs import CostError, costs_of_matrices, expert_costs
from tests.support.models import build


def batches(count=3, seed=0):
    ids = torch.randint(3, 128, (count, 2, 12), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": rows, "labels": rows} for rows in ids]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "switch_transformers"])
def test_the_costs_of_a_projection_add_up_to_its_divergence(family):
    model = build(family)
    layers = find_moe_layers(model)
    given = batches()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calibration = calibration_on(model, given)
    costs = calibrated_costs(layers, (1, 3, 16), 64, None, None, calibration)
    plain = expert_costs(layers, (1, 3, 16), 64)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    whole = allocate(model, method="uniform", average_bits=16, bits=(16,), group_size=64)
    layer, projection = layers[-1], list(layers[-1].projections)[-1]
    for index, bits in enumerate((1, 3)):
        plan = whole.with_bits({layer.name: {projection: [bits] * layer.num_experts}})
        packed = quantize_model(copy.deepcopy(model), plan)
        with torch.no_grad():
            found = []
            for row in given:
                wanted, got = (m(input_ids=row["input_ids"], **decoder(m, row)).logits for m in (model, packed))
                if not model.config.is_encoder_decoder:  # the last position predicts no label
                    wanted, got = wanted[:, :-1], got[:, :-1]
                found.append(nn.functional.kl_div(got.log_softmax(-1), wanted.softmax(-1), reduction="sum"))
        expected = float(torch.stack(found).sum()) / calibration.tokens
        total = float(costs[layer.name][projection][:, index].sum())
        assert total == pytest.approx(expected, rel=0.02)  # numbers around 1e-6, in float32
        one, other = (of[layer.name][projection][:, index] for of in (costs, plain))
        torch.testing.assert_close(one / one.sum(), other / other.sum())
    assert (costs[layer.name][projection][:, 2] == 0).all()


def decoder(model, row):
    return {"labels": row["labels"]} if model.config.is_encoder_decoder else {}


def test_padding_is_not_compared():
    model = build("mixtral", num_hidden_layers=1)
    ids = batches(1)[0]["input_ids"]
    mask = torch.ones_like(ids)
    mask[:, 9:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    assert calibration_on(model, [{"input_ids": ids, "attention_mask": mask}]).tokens == 18
    assert calibration_on(model, [{"input_ids": ids, "labels": labels}]).tokens == 16  # those that predict a label
    assert calibration_on(model, [{"input_ids": ids}]).tokens == 24


def test_no_more_batches_than_needed(monkeypatch):
    monkeypatch.setattr(module, "TOKENS", 30)
    taken = []
    model = build("mixtral", num_hidden_layers=1)

    def given():
        for batch in batches(5):
            taken.append(batch)
            yield batch

    assert calibration_on(model, given()).tokens == 44
    assert len(taken) == 2
    monkeypatch.setattr(module, "_KEPT_BYTES", 4 * 128 * 8)  # room for 8 of 30 tokens: every fourth is kept
    assert calibration_on(model, batches(5)).tokens == 12


@pytest.mark.slow
def test_a_plan_of_calibrated_costs():
    model = build("mixtral")
    asked = {"method": "weight_error", "bits": (1, 2, 3, 4), "group_size": 64}
    plan = allocate(model, average_bits=2, calibration=batches(), **asked)
    assert plan.notes["calibration_tokens"] == 66
    costs = calibrated_costs(find_moe_layers(model), (1, 2, 3, 4), 64, None, None, calibration_on(model, batches()))
    for name, layer in plan.layers.items():
        for projection, by in layer.costs.items():
            for index, bits in enumerate((1, 2, 3, 4)):
                assert by[bits] == pytest.approx(costs[name][projection][:, index].tolist(), rel=1e-3)
    again = replan(plan, average_bits=3)
    assert again.diff(allocate(model, average_bits=3, calibration=batches(), **asked)) == []
    assert again.settings.average_bits == 3
    assert plan.average_bits == 2  # as it was
    assert replan(again, stored_bits=2.5).stored_bits <= 2.5


def test_weights_come_back_when_it_fails():
    model = build("mixtral")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls = []

    class Failing(Calibration):
        def divergence(self):
            calls.append(1)
            if len(calls) == 3:
                raise RuntimeError("out of memory")
            return super().divergence()

    failing = Failing(model, [lambda: model(**batches()[0])])
    with pytest.raises(RuntimeError, match="out of memory"):
        calibrated_costs(find_moe_layers(model), (2, 3), 64, None, None, failing)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_what_cannot_be_calibrated(tmp_path):
    model = build("mixtral", num_hidden_layers=1)
    model.save_pretrained(tmp_path / "float")
    asked = {"method": "weight_error", "group_size": 64}
    with pytest.raises(AllocationError, match="give it in memory, not its folder"):
        allocate(tmp_path / "float", calibration=batches(), **asked)
    with pytest.raises(AllocationError, match="at least one batch"):
        allocate(model, calibration=[], **asked)
    with pytest.raises(AllocationError, match="logits of a transformers model, got Linear"):
        calibration_on(nn.Linear(2, 2), [torch.zeros(1, 2)])
    with pytest.raises(AllocationError, match="gives none"):
        calibration_on(model.model, [{"input_ids": batches(1)[0]["input_ids"]}])
    with pytest.raises(AllocationError, match="has no use for calibration"):
        allocate(model, method="max_variance", calibration=batches(), group_size=64)
    with pytest.raises(AllocationError, match="replan needs a plan that holds costs"):
        replan(allocate(model, method="uniform", average_bits=2, group_size=64), average_bits=3)
    plan = allocate(model, average_bits=2, bits=(1, 2, 3), **asked)
    with pytest.raises(AllocationError, match="give one of average_bits"):
        replan(plan)


def test_adapters_are_refused():
    peft = pytest.importorskip("peft")
    model = build("mixtral", num_hidden_layers=1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_parameters=["experts.gate_up_proj"], r=2))
    layers = find_moe_layers(adapted)
    with pytest.raises(CostError, match="behind an adapter"):
        calibrated_costs(layers, (2,), 64, None, None, calibration_on(adapted, batches()))


def test_a_step_that_disturbs_its_batch_at_random_does_so_equally_each_time():
    model, ids = build("mixtral"), batches(1)[0]["input_ids"]

    def step():
        return model(input_ids=torch.where(torch.rand(ids.shape) < 0.5, torch.randint(3, 128, ids.shape), ids))

    before = torch.get_rng_state()
    assert Calibration(model, [step]).divergence() < 1e-9
    assert torch.equal(torch.get_rng_state(), before)
    own = torch.Generator()
    with pytest.raises(AllocationError, match="from one pass to the next"):
        Calibration(model, [lambda: model(input_ids=torch.randint(3, 128, ids.shape, generator=own))])


@pytest.mark.slow
def test_tokens_that_the_model_rules_out_have_no_part():
    model = build("mixtral")
    model.lm_head.register_forward_hook(
        lambda module, args, logits: logits.index_fill(-1, torch.tensor([5]), -torch.inf)
    )
    costs = calibrated_costs(find_moe_layers(model), (1,), 64, None, None, calibration_on(model, batches()))
    assert all(0 < found.sum() < torch.inf for of in costs.values() for found in of.values())


@pytest.mark.slow
def test_autocast_around_it_keeps_no_weights_of_the_pass_before():
    model = build("switch_transformers")  # its experts are linear layers, whose cast weights autocast keeps
    with torch.autocast("cpu", torch.bfloat16):
        costs = calibrated_costs(find_moe_layers(model), (1,), 64, None, None, calibration_on(model, batches()))
    assert all(found.sum() > 0 for of in costs.values() for found in of.values())


def test_matrices_are_read_while_their_layer_is_whole():
    """Costs of gathered experts: what a layer has gathered is gone once all its matrices were given out."""
    layers = find_moe_layers(build("mixtral", num_local_experts=5))
    ends = []

    def read(layer, projection):
        gathered = [layer.banks[projection].read(expert).clone() for expert in range(5)]
        try:
            yield from gathered
        finally:
            ends.append((layer.name, projection))
            for matrix in gathered:
                matrix.fill_(float("nan"))

    expected = expert_costs(layers, (2, 3), 64)
    found = costs_of_matrices(layers, read, (2, 3), 64, None)
    assert ends == [(layer.name, name) for layer in layers for name in layer.banks]
    for layer in layers:
        for name, costs in expected[layer.name].items():
            assert torch.equal(found[layer.name][name], costs)


@pytest.mark.parametrize("count", [4, 6])
def test_matrices_that_are_missing_or_too_many_are_an_error(count):
    """An expert without a matrix would cost nothing, and be given the fewest bits."""
    layers = find_moe_layers(build("mixtral", num_local_experts=5))
    with pytest.raises(ValueError, match=r"shorter|longer"):
        costs_of_matrices(layers, lambda layer, projection: [torch.randn(256, 64)] * count, (2, 3), 64, None)
