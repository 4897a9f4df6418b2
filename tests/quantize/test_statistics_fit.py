"""Quantizing with expert statistics, in memory, from a checkpoint and while one loads: the same codes everywhere."""

import copy
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_precision import PlanQuantizationConfig, allocate, find_moe_layers, quantize_model
from moe_precision.allocation.costs import CostError
from moe_precision.present.plan_summary import plan_lines
from moe_precision.quantize.codec.fitting import quantize_matrix
from moe_precision.quantize.codec.guided import fit_of
from moe_precision.quantize.writer import quantize_checkpoint
from moe_precision.recording.collecting import collect_statistics
from moe_precision.recording.second_moments import curvature_of
from moe_precision.recording.statistics import StatisticsError
from tests.support.models import build, logits, train_on_stdlib
from tests.support.optimizers import trained_with

pytestmark = pytest.mark.slow

LAYER = "model.layers.0.mlp"


def statistics_of(model, seed: int = 0):
    ids = torch.randint(3, 128, (8, 64), generator=torch.Generator().manual_seed(seed))
    return collect_statistics(model, [{"input_ids": ids}], text="seeded tokens")


@pytest.fixture
def model():
    return build("mixtral")


def plan_of(model, bits: int = 2):
    return allocate(model, method="uniform", average_bits=bits, group_size=64)


def test_the_same_codes_everywhere(model, tmp_path):
    statistics, plan = statistics_of(model), plan_of(model)
    model.save_pretrained(tmp_path / "float")
    statistics.save(tmp_path / "s.safetensors")
    plain = logits(quantize_model(build("mixtral"), plan))
    expected = logits(quantize_model(model, plan, statistics=statistics))
    assert not torch.equal(plain, expected)
    quantize_checkpoint(tmp_path / "float", plan, tmp_path / "packed", statistics=tmp_path / "s.safetensors")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(packed), expected)
    config = PlanQuantizationConfig(plan, statistics=statistics)
    loading = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    assert torch.equal(logits(loading), expected)
    assert "statistics" not in packed.config.quantization_config.to_dict()


def test_a_plan_given_by_its_path_brings_the_files_beside_it(model, tmp_path):
    """Curvature and statistics that a run has left are not forgotten in silence."""
    statistics, plan = statistics_of(model), plan_of(model)
    model.save_pretrained(tmp_path / "float")
    plan.save(tmp_path / "x.json")
    statistics.save(tmp_path / "x.statistics.safetensors")
    expected = logits(quantize_model(build("mixtral"), plan, statistics=statistics))
    config = PlanQuantizationConfig(tmp_path / "x.json")
    loading = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    assert torch.equal(logits(loading), expected)
    assert torch.equal(logits(quantize_model(build("mixtral"), str(tmp_path / "x.json"))), expected)
    quantize_checkpoint(tmp_path / "float", tmp_path / "x.json", tmp_path / "packed")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "packed")), expected)
    torch.manual_seed(1)
    other = build("mixtral", initializer_range=0.05)
    with pytest.raises(StatisticsError, match="belongs to other weights"):
        quantize_model(other, tmp_path / "x.json")


@pytest.mark.thorough
def test_workers_read_the_file(model, tmp_path):
    statistics, plan = statistics_of(model), plan_of(model)
    model.save_pretrained(tmp_path / "float")
    statistics.save(tmp_path / "s.safetensors")
    quantize_checkpoint(
        tmp_path / "float",
        plan,
        tmp_path / "packed",
        statistics=tmp_path / "s.safetensors",
        workers=2,
        max_shard_size=1,
    )
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(packed), logits(quantize_model(model, plan, statistics=statistics)))


def test_no_tokens_is_the_fit_without_bit_for_bit(model):
    curvature = curvature_of(find_moe_layers(model), [trained_with(torch.optim.Adam, model)])
    statistics = statistics_of(model)
    statistics.tokens[LAYER][3] = 0
    weight = find_moe_layers(model)[0].expert_weights(3)["down_proj"]
    for given in (None, curvature):
        columns = None if given is None else given.fit_weights(LAYER, "down_proj", 3)
        found = fit_of(LAYER, "down_proj", [3], given, statistics)(weight[None], 2, 64)
        for one, other in zip(found, quantize_matrix(weight, 2, 64, columns), strict=True):
            assert torch.equal(one[0], other)
        assert not torch.equal(fit_of(LAYER, "down_proj", [4], given, statistics)(weight[None], 2, 64)[0], found[0])


def test_a_trained_model_loses_less(tmp_path):
    model = build("mixtral", vocab_size=256, num_hidden_layers=1)
    held_out = train_on_stdlib(model, 60)
    statistics = collect_statistics(model, [{"input_ids": held_out[64:]}])

    @torch.no_grad()
    def log_probabilities(of):
        return of(input_ids=held_out[:64]).logits.log_softmax(-1)

    expected, plan = log_probabilities(model), plan_of(model)
    model.save_pretrained(tmp_path)

    def divergence(**given):
        quantized = quantize_model(AutoModelForCausalLM.from_pretrained(tmp_path), plan, **given)
        return float((expected.exp() * (expected - log_probabilities(quantized))).sum(-1).mean())

    assert divergence(statistics=statistics) < 0.5 * divergence()


def test_statistics_of_another_model_and_of_other_weights(model, tmp_path):
    statistics, plan = statistics_of(model), plan_of(model)
    other = build("qwen3_moe")
    with pytest.raises(StatisticsError, match="of another model"):
        quantize_model(other, plan_of(other), statistics=statistics)
    with torch.no_grad():
        find_moe_layers(model)[1].router_weight()[4] *= 1.01
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(StatisticsError, match="belongs to other weights"):
        quantize_checkpoint(tmp_path / "other", plan, tmp_path / "packed", statistics=statistics)
    with pytest.raises(StatisticsError, match="belongs to other weights"):
        quantize_model(model, plan, statistics=statistics)


def test_a_second_moment_that_is_none_names_its_expert_and_is_left_out(model):
    """The plan counts it, and 0 bits are priced without it too."""
    curvature = curvature_of(find_moe_layers(model), [trained_with(torch.optim.Adam, model)])
    statistics = statistics_of(model)
    statistics.correlations[LAYER]["gate_up_proj"][5] = -1
    weight = find_moe_layers(model)[0].expert_weights(5)["gate_up_proj"]
    message = r"'gate_up_proj' of expert 5 in layer 'model\.layers\.0\.mlp' is fitted without statistics: .*eigenval"
    with pytest.warns(UserWarning, match=message):
        found = fit_of(LAYER, "gate_up_proj", [5], None, statistics)(weight[None], 2, 64)
    for one, other in zip(found, quantize_matrix(weight, 2, 64), strict=True):
        assert torch.equal(one[0], other)
    known = {"curvature": curvature, "bits": (0, 2, 3), "average_bits": 2.5, "group_size": 64, "min_tokens": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is known by now
        plan = allocate(model, method="statistics", statistics=statistics, **known)
    assert plan.notes["statistics"]["indefinite"] == 1
    assert "since their second moments have negative eigenvalues: 1" in " ".join(" ".join(plan_lines(plan)).split())
    seen = copy.deepcopy(statistics)
    seen.indefinite, seen.tokens[LAYER][5] = set(), 0  # as if the expert had seen nothing, for this matrix
    without = allocate(model, method="statistics", statistics=seen, **known)
    assert "indefinite" not in without.notes["statistics"]
    for costs in (one.layers[LAYER].costs["gate_up_proj"] for one in (plan, without)):
        assert all(values[5] > 0 for values in costs.values())
    assert plan.layers[LAYER].costs["gate_up_proj"] == without.layers[LAYER].costs["gate_up_proj"]


def test_other_statistics_do_not_go_on_from_it(model, tmp_path, monkeypatch):
    plan, first, second = plan_of(model), statistics_of(model), statistics_of(model, seed=1)
    model.save_pretrained(tmp_path / "float")
    monkeypatch.setattr("shutil.copy2", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(tmp_path / "float", plan, tmp_path / "out", statistics=first)
    monkeypatch.undo()
    quantize_checkpoint(tmp_path / "float", plan, tmp_path / "out", statistics=second)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(packed), logits(quantize_model(model, plan, statistics=second)))


def test_every_expert_is_rounded_under_its_own_moment(model):
    """Several at once, one of which saw nothing and one of which has no moment: each is what it is alone."""
    curvature = curvature_of(find_moe_layers(model), [trained_with(torch.optim.Adam, model)])
    statistics = statistics_of(model)
    statistics.tokens[LAYER][3] = 0
    statistics.correlations[LAYER]["down_proj"][5] = -1
    weights = model.get_parameter(f"{LAYER}.experts.down_proj").detach()
    experts = [6, 3, 5, 0]
    with pytest.warns(UserWarning, match="'down_proj' of expert 5 in layer"):
        together = fit_of(LAYER, "down_proj", experts, curvature, statistics)(weights[experts], 2, 64)
    for expert, *found in zip(experts, *together, strict=True):
        alone = fit_of(LAYER, "down_proj", [expert], curvature, statistics)(weights[expert : expert + 1], 2, 64)
        assert all(torch.equal(one, other[0]) for one, other in zip(found, alone, strict=True))
        columns = curvature.fit_weights(LAYER, "down_proj", expert)
        plain = quantize_matrix(weights[expert], 2, 64, columns)
        assert torch.equal(found[0], plain[0]) == (expert in (3, 5))


@pytest.mark.parametrize("known", [False, True])
def test_an_expert_that_cannot_be_fitted_is_named(model, known):
    statistics = statistics_of(model) if known else None
    plan = plan_of(model)
    with torch.no_grad():
        model.get_parameter(f"{LAYER}.experts.down_proj")[5] *= 1e9
    message = r"'down_proj' of expert 5 in layer 'model\.layers\.0\.mlp': .*; leave it at 16 bits"
    with pytest.raises(CostError, match=message):
        allocate(model, method="weight_error", average_bits=2.5, group_size=64)
    with pytest.raises(ValueError, match=message):
        quantize_model(model, plan, statistics=statistics)
