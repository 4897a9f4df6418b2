"""How long to anneal and at which rate: values by hand, and the cooldown on plain optimizers."""

import math

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, ReduceLROnPlateau
from transformers import get_constant_schedule_with_warmup

from moe_precision.annealing.covers import AnnealError
from moe_precision.annealing.schedule import LEAST_SHARE, annealed_share, cooldown_factor, tokens_of
from moe_precision.annealing.teacher_weights import digest_of
from moe_precision.callbacks import PrecisionAnneal
from moe_precision.callbacks.anneal_start import AnnealStart, stored_bits_asked
from moe_precision.callbacks.rate_cooldown import RateCooldown, constant_rate
from moe_precision.layers.moe_layers import find_moe_layers
from moe_precision.plans.settings import PlanSettings
from tests.support.models import build


def test_the_share_is_that_of_the_paper_and_a_tenth_at_least():
    """S tokens per byte, of which exp(ln S - 6.7297 / ln S) are annealed."""
    for size in (20.0, 80.0, 1e3, 1e5):
        assert annealed_share(size) * size == pytest.approx(math.exp(math.log(size) - 6.7297 / math.log(size)))
    assert annealed_share(math.exp(6.7297)) == pytest.approx(1 / math.e)
    assert {annealed_share(size) for size in (0, 0.5, 1, 1.0001, 3, 18)} == {LEAST_SHARE}


def test_tokens_are_counted_without_padding_and_with_a_decoders():
    ids = torch.ones(2, 5, dtype=torch.long)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    labels = torch.tensor([[3, 4, -100], [3, -100, -100]])
    assert tokens_of(ids) == tokens_of([ids, ids]) == tokens_of({"input_ids": ids, "labels": ids}) == 10
    assert tokens_of({"input_ids": ids, "attention_mask": mask, "labels": ids}) == 8
    assert tokens_of({"inputs_embeds": torch.ones(2, 5, 8)}) == 10
    assert tokens_of({"input_ids": ids, "attention_mask": mask, "labels": labels}) == 8 + 3
    assert tokens_of({"input_ids": ids, "decoder_input_ids": ids[:, :2], "labels": labels[:, :2]}) == 10 + 4
    assert {tokens_of(one) for one in (torch.ones(2, 5), {"pixels": ids}, "text", None, [])} == {0}


def started(total=1000, asked="auto", whole=False, step=0):
    start = AnnealStart("Test", asked, whole)
    start.check(total, step, None)
    return start


def found(total, size, step=0):
    """What ``auto`` finds in a run with so many tokens per byte of the experts of a small model at 2 bits."""
    model, settings = build("mixtral"), PlanSettings(average_bits=2.0, group_size=64)
    layers = find_moe_layers(model)
    stored = 2 + 18 / 64
    assert stored_bits_asked(settings, {}) == stored
    assert stored_bits_asked(PlanSettings(stored_bits=2.5, group_size=64), {}) == 2.5
    weights = 2 * 8 * 3 * 64 * 128
    start = started(total, step=step)
    due = 0
    while not start.is_due(step + due):
        start.see(torch.empty(1, round(size * weights * stored / 8 / total), dtype=torch.long))
        due += 1
    start.find(model, layers, step + due, settings)
    assert not start.is_due(step + due + 1)
    return start, due


@pytest.mark.parametrize(("total", "size", "first", "due"), [(1000, 80, 785, 10), (1000, 1, 900, 10), (40, 80, 31, 2)])
def test_auto_follows_from_the_tokens_of_the_first_steps(total, size, first, due):
    """exp(-6.7297 / ln 80) = 0.2153."""
    start, after = found(total, size, step=5 if total == 1000 else 0)
    assert (start.first, after) == (first, due)
    assert start.found["tokens_per_byte"] == pytest.approx(size, rel=0.01)
    again = AnnealStart("Test", "auto", False)
    again.restore({**start.found, "plan": "of a grid"})
    again.check(total, 20, None)
    assert again.first == first
    assert not again.is_due(1000)


def test_auto_where_nothing_is_known_of_the_batches_or_all_of_the_model():
    start, _ = found(2, 0)
    assert (start.found, start.first) == ({"share": LEAST_SHARE}, 1)
    assert (started(whole=True).first, started(whole=True).found) == (0, {"share": 1.0})
    assert [started(1000, asked).first for asked in (0, 0.25, 7)] == [0, 250, 7]


def test_what_auto_has_found_in_a_file(tmp_path):
    path = tmp_path / "annealing_start.json"
    start, _ = found(1000, 80)
    start.save(path)
    again, numeric = AnnealStart("Test", "auto", False), AnnealStart("Test", 0.5, False)
    for one in (again, numeric):
        one.load(path)
        one.check(1000, 20, None)
    assert (again.found, again.first) == (start.found, start.first)
    assert (numeric.found, numeric.first) == ({}, 500)
    for text in ("[", "5", '{"share": "half"}'):
        path.write_text(text)
        with pytest.raises(AnnealError, match=r"is damaged: .* Without it, the start is found anew"):
            again.load(path)


def test_a_start_that_cannot_be():
    for asked in ("auto", 0.9):
        with pytest.raises(AnnealError, match=rf"start='?{asked}'? depends on the number of steps"):
            started(math.inf, asked)
    assert started(math.inf, 7).first == 7
    with pytest.raises(ValueError, match="or 'auto'; got 'late'"):
        PrecisionAnneal(start="late")


def trained(cooldown, schedule, steps=6, first=2, tensor=False):
    """Rates that two parameters moved by, and those that the optimizer had between its steps."""
    one, two = (torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
    rates = [torch.tensor(rate) if tensor else rate for rate in (1.0, 10.0)]
    groups = [{"params": [one], "lr": rates[0]}, {"params": [two], "lr": rates[1]}]
    optimizer = torch.optim.SGD(groups, foreach=False)
    scheduler = LambdaLR(optimizer, schedule)
    moved, between = [], []
    for step in range(steps):
        if step >= first:
            cooldown.before_step([optimizer], step - first, steps - first)
        before = float(one), float(two)
        one.grad, two.grad = torch.ones_like(one), torch.ones_like(two)
        optimizer.step()
        moved.append((before[0] - float(one), before[1] - float(two)))
        between.append(float(optimizer.param_groups[0]["lr"]))
        scheduler.step()
    return moved, between, optimizer


@pytest.mark.parametrize("tensor", [False, True])
def test_the_factor_is_over_what_the_schedule_sets_and_is_taken_back(tensor):
    cooldown = RateCooldown("Test", True)
    moved, between, optimizer = trained(cooldown, lambda step: 1 / (step + 1), tensor=tensor)
    factors = [1, 1, 1, 1 - math.sqrt(1 / 4), 1 - math.sqrt(2 / 4), 1 - math.sqrt(3 / 4)]
    schedule = [1 / (step + 1) for step in range(6)]
    for step, (a, b) in enumerate(moved):
        assert a == pytest.approx(factors[step] * schedule[step], rel=1e-5)
        assert b == pytest.approx(10 * a, rel=1e-5)
    assert between == pytest.approx(schedule)
    assert cooldown.metrics() == {"anneal/rate_factor": pytest.approx(factors[-1])}
    cooldown.check_used(20)
    cooldown.close()
    before = float(optimizer.param_groups[0]["params"][0])
    optimizer.step()
    assert before - float(optimizer.param_groups[0]["params"][0]) == pytest.approx(1 / 7)
    assert cooldown.metrics() == {}


def test_a_step_that_was_interrupted_leaves_no_lowered_rate():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)

    def stop():
        raise InterruptedError

    cooldown = RateCooldown("Test", True)
    for _ in range(2):
        cooldown.before_step([optimizer], 1, 4)
        with pytest.raises(InterruptedError):
            optimizer.step(stop)
        assert optimizer.param_groups[0]["lr"] == 0.5
    cooldown.close()
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_a_rate_that_all_groups_share_is_lowered_once():
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = torch.optim.SGD([{"params": [weight]} for weight in weights], lr=torch.tensor(0.5))
    assert optimizer.param_groups[0]["lr"] is optimizer.param_groups[2]["lr"]
    cooldown = RateCooldown("Test", True)
    for done in range(3):
        before = weights[0][0].item()
        for weight in weights:
            weight.grad = torch.ones(2)
        cooldown.before_step([optimizer], done, 4)
        optimizer.step()
        for weight in weights:
            assert before - weight[0].item() == pytest.approx(0.5 * cooldown_factor(done, 4))
        assert optimizer.param_groups[1]["lr"].item() == 0.5


@pytest.mark.parametrize("rate", [0.5, torch.tensor(0.5)])
def test_a_rate_that_changes_inside_a_step_is_an_error(rate):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=rate)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    weight.grad = torch.ones(2)
    cooldown = RateCooldown("Test", True)
    cooldown.before_step([optimizer], 1, 4)
    with pytest.raises(AnnealError, match="changed while the optimizer took a step"):
        optimizer.step(lambda: schedule.step())


def test_a_cooldown_that_cannot_be():
    with pytest.raises(AnnealError, match="nobody knows when that is"):
        RateCooldown("Test", True).check(math.inf, [], [])
    without = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    without.param_groups[0]["lr"] = None  # as transformers' Adafactor has it
    for optimizer in (object(), without):
        with pytest.raises(AnnealError, match="lowers the learning rates of torch's optimizers"):
            RateCooldown("Test", True).check(10, [optimizer], [])
    cooldown = RateCooldown("Test", True)
    cooldown.before_step([torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])], 0, 30)
    cooldown.check_used(19)
    with pytest.raises(AnnealError, match="at a lowered rate in 20 annealed steps"):
        cooldown.check_used(20)


def test_whether_a_schedule_leaves_the_rate_as_it_is():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    warm = get_constant_schedule_with_warmup(optimizer, 3)
    assert not constant_rate([warm], 5)
    for _ in range(3):
        optimizer.step()
        warm.step()
    assert constant_rate([warm], 5)
    assert constant_rate([], 5)
    assert not constant_rate([LambdaLR(optimizer, lambda step: 1.0 if step < 5 else 0.1)], 10)
    assert not constant_rate([LambdaLR(optimizer, lambda step: [1.0, 1.0][step])], 10)
    assert not constant_rate([warm, CosineAnnealingLR(optimizer, 10)], 5)
    assert not constant_rate([ReduceLROnPlateau(optimizer)], 5)


def test_the_cooldown_falls_to_nothing():
    factors = [cooldown_factor(done, 10) for done in range(11)]
    assert (factors[0], factors[10]) == (1, 0)
    assert factors == sorted(factors, reverse=True)
    assert cooldown_factor(12, 10) == 0  # a run that goes on past the end that it was to have


def test_a_teacher_is_known_by_its_weights_in_any_dtype():
    weights = {
        "a": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
        "b": torch.arange(3),
        "c": torch.ones(()),
    }
    half = {name: one.bfloat16() if one.is_floating_point() else one for name, one in weights.items()}
    assert digest_of(half) == digest_of(weights) == digest_of(dict(reversed(weights.items())))
    others = ({"a": weights["a"] * 1.1}, {"b": torch.arange(3) + 1}, {"a": weights["a"].T.contiguous()})
    assert len({digest_of(weights | other) for other in others} | {digest_of(weights)}) == 4
