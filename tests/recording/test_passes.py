"""Statistics within a bound on memory, under autocast and checkpointing, and what a collector refuses."""

import copy

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

from moe_precision import find_moe_layers
from moe_precision.recording.collecting import collect_statistics, memory_bytes, passes, peak_bytes
from moe_precision.recording.collector import Collector
from moe_precision.recording.in_turn import StatisticsInTurn, Turn, most_bytes, stride, turns
from moe_precision.recording.loads import not_counted
from moe_precision.recording.statistics import ExpertStatistics, StatisticsError
from tests.recording.test_collecting import captured, inputs
from tests.support.models import PlainMoE, build


@pytest.mark.slow
def test_several_passes_give_what_one_gives():
    model = build("deepseek_v3", num_hidden_layers=5)
    layers = find_moe_layers(model)
    bound = 2.5 * memory_bytes(layers[:1]) / 2**30
    assert [len(group.layers) for group in passes(layers, bound)] == [2, 2]
    assert peak_bytes(layers, bound) == memory_bytes(layers[:2])
    batches = [inputs(model, seed=seed) for seed in (1, 2)]
    whole = collect_statistics(model, batches)
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    parts = collect_statistics(model, batches, memory_gib=bound)
    handle.remove()
    assert len(calls) == 2 * 2
    assert list(parts.tokens) == list(whole.tokens) == [layer.name for layer in layers]
    for name, tokens in whole.tokens.items():
        assert torch.equal(parts.tokens[name], tokens)
        assert torch.equal(parts.router_norms[name], whole.router_norms[name])
        for projection in whole.diagonals[name]:
            assert torch.equal(parts.diagonals[name][projection], whole.diagonals[name][projection])
            assert torch.equal(parts.correlations[name][projection], whole.correlations[name][projection])


def test_several_passes_need_batches_that_can_begin_anew():
    model = build("mixtral")
    bound = 1.5 * memory_bytes(find_moe_layers(model)[:1]) / 2**30
    with pytest.raises(StatisticsError, match=r"needs 2 passes over the batches, .* only once: give a list"):
        collect_statistics(model, iter([inputs(model)]), memory_gib=bound)
    collect_statistics(model, iter([inputs(model)]))
    with pytest.raises(StatisticsError, match=r"second moments of layer 'model\.layers\.0\.mlp' alone take"):
        collect_statistics(model, [inputs(model)], memory_gib=bound / 2)


def test_sums_are_in_float32_under_autocast():
    model = build("mixtral")
    (layer, _), batch = find_moe_layers(model), inputs(model)
    with torch.autocast("cpu", torch.bfloat16):
        ((hidden, index, weights),) = captured(model, layer, [batch])
        collector = Collector(model, [layer])
        with torch.no_grad():
            model(**batch)
        collector.close()
    sums = collector._sums[layer.name]["gate_up_proj"]
    assert sums.dtype == torch.float32
    for expert in range(8):
        token, place = torch.where(index == expert)
        x = hidden[token].double() * weights[token, place, None].double()
        torch.testing.assert_close(sums[expert].double(), x.T @ x, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["mixtral", "switch_transformers"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_forward_pass_that_checkpointing_repeats_counts_once(model_type, reentrant):
    model = build(model_type).train()
    batch = inputs(model)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        layers = find_moe_layers(model)
        recorder = StatisticsInTurn(model, layers, 0, 1)
        torch.manual_seed(0)  # of dropout
        recorder.before_batch(0)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        recorder.after_batch(1)
        found.append(recorder.finish())
    once, repeated = found
    for name, tokens in once.tokens.items():
        assert tokens.sum() > 0
        assert torch.equal(tokens, repeated.tokens[name])
        for projection, diagonal in once.diagonals[name].items():
            torch.testing.assert_close(diagonal, repeated.diagonals[name][projection])


def test_what_does_not_count():
    model = build("mixtral")
    layers, batch = find_moe_layers(model), inputs(model)
    collector = Collector(model, layers)
    with torch.no_grad():
        with not_counted():
            model(**batch)
        copy.deepcopy(model)(**batch)
        collector.active = False
        model(**batch)
        assert collector.rows == 0
        collector.active = True
        model(**batch)
    assert collector.rows == 3 * 11 * 2
    collector.close()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_rows_of_another_width():
    model = PlainMoE()
    collector = Collector(model, find_moe_layers(model))
    with pytest.raises(StatisticsError, match=r"given rows of 16 values, expected 32: .*tensor parallelism"):
        model.experts[0][0](torch.randn(3, 16))
    collector.close()


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_experts_that_are_split_while_they_run(one_process):
    model = build("mixtral")
    experts, mesh = model.model.layers[0].mlp.experts, init_device_mesh("cpu", (1,))
    split = distribute_tensor(experts.gate_up_proj.detach(), mesh, [Replicate()])
    experts.gate_up_proj = torch.nn.Parameter(split)
    with pytest.raises(StatisticsError, match="are split over processes while they run"):
        collect_statistics(model, [inputs(model)])


def test_a_layer_that_is_missing():
    layers = find_moe_layers(build("mixtral"))
    empty = ExpertStatistics({layer.name: layer.shape for layer in layers})
    with pytest.raises(StatisticsError, match=r"no statistics of \['model\.layers\.0\.mlp', 'model\.layers\.1\.mlp'\]"):
        empty.belongs_to(layers)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (range(10, 20), [(1, 10, 13), (2, 13, 16), (2, 16, 20)]),
        (range(10, 12), [(2, 10, 11), (3, 11, 12)]),
        (range(10, 11), [(5, 10, 11)]),
    ],
)
def test_turns(steps, expected):
    layers = find_moe_layers(build("deepseek_v3", num_hidden_layers=6))
    found = turns(layers, steps.start, steps.stop)
    assert [(len(turn.layers), turn.first, turn.end) for turn in found] == expected
    assert [layer.name for turn in found for layer in turn.layers] == [layer.name for layer in layers]
    most = max(count for count, _, _ in expected)
    assert most_bytes(layers, steps.start, steps.stop) == most * memory_bytes(layers[:1])


def test_every_how_many_steps():
    turn = Turn(find_moe_layers(build("mixtral"))[:1], 0, 100)
    enough = 32 * 128 * 8  # tokens per column, columns, experts
    assert stride(enough // 100, turn) == 1
    assert stride(enough // 10, turn) == 9  # of 3276 rows a step, 327,600 are there
    assert stride(enough, turn) == 100
