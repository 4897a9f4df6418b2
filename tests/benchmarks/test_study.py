"""The study and the theory recipe, small: what they measure is right, and an interrupted study resumes."""

import json
import math

import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy

from benchmarks.studies import (
    anneal_report,
    anneal_study,
    channel_study,
    dropping_report,
    dropping_study,
    experts_seen,
    rounding_study,
    study,
    study_models,
    study_report,
    theory,
)
from benchmarks.studies.quantizers import least_squares, quantizers, rtn
from moe_precision import find_moe_layers
from moe_precision.quantize.kernels import scaled
from tests.cli.test_cli import TEXT
from tests.support.dropped import observed
from tests.support.models import build


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A study of one tiny model, measured once."""
    root = tmp_path_factory.mktemp("study")
    (root / "text.txt").write_text(TEXT)
    settings = study_models.settings_of(None)
    model = settings["models"]["mixtral"]
    model["module_args"]["config"] |= {"num_hidden_layers": 1, "num_local_experts": 4}
    model["data_args"] = {"dataset": str(root / "text.txt"), "vocab_size": 300, "sequence_length": 32, "batch_size": 4}
    model["max_steps"] = 6
    settings |= {"record_every": 2, "random_draws": 2, "calibration_rows": 4, "gradient_rows": 4, "seeds": [0]}
    settings["models"] = {"mixtral": model}
    (root / "study.yaml").write_text(yaml.safe_dump(settings))
    settings = study_models.settings_of(root / "study.yaml")
    assert study.measure(settings, "mixtral", 0, root) == "mixtral 0: done"
    return settings, root


@pytest.mark.slow
def test_every_allocator_is_measured_at_every_combination(small):
    settings, root = small
    assert study.measure(settings, "mixtral", 0, root) == "mixtral 0: found"
    found = json.loads((root / "mixtral" / "seed_0" / "result.json").read_text())
    ours = [one for one in found["results"] if one["quantizer"] == study_report.OURS]
    for combination in settings["combinations"]:
        for budget in combination["budgets"]:
            at = [one for one in ours if one["budget"] == budget and one["levels"] == combination["bits"]]
            methods = {one["method"] for one in at}
            assert {"curvature", "weight_error", "sensitivity"} <= methods
            assert (set(study.ORDERS) <= methods) == (len(combination["bits"]) < 4)
            assert all(one["stored_bits"] <= budget + 0.5 + 1e-9 for one in at)
    assert all(math.isfinite(one["mean"]) for one in found["results"])
    assert found["settling"][-1] == {"share_of_training": 1.0, "tau": pytest.approx(1.0), "other_bits": 0.0}
    assert {"round to nearest", "least squares", "unbiased gain"} <= found["quantizers"].keys()


@pytest.mark.slow
def test_the_report_has_every_table(small):
    settings, root = small
    text = study_report.report(settings, root)
    assert text.count("### ") == 27
    assert "| curvature, expert+projection |" in text
    assert "nan" not in text
    assert "no result" in study_report.report(settings, root / "nothing")


@pytest.mark.thorough
def test_annealing_is_measured_and_reported(small):
    settings, root = small
    settings["models"]["mixtral"]["max_steps"] = 8
    settings["annealing"] |= {
        "models": ["mixtral"],
        "detailed": ["mixtral"],
        "shares": [0.25, 0.5],
        "budgets": [1.0, 2.0],
        "plan_budgets": [2.0],
        "scale_budgets": [2.0],
        "recover": {"budgets": [2.0], "steps": [1, 2], "learning_rate": 1e-3, "warmup_steps": 0},
    }
    root = root / "annealing"
    root.mkdir()
    assert anneal_study.measure(settings, "mixtral", 0, root) == "mixtral 0: done"
    found = json.loads((root / "mixtral" / "seed_0" / "annealing.json").read_text())
    assert len(found) == 2 + 2 + 4 + 2 + 4 + 4 + 2 + 3 + 1 + 4
    assert all(math.isfinite(one["mean"]) for one in found.values())
    assert found["float 0.25"] != found["float 0.5"]
    assert found["annealed 0.5 1.0"]["stored_bits"] == pytest.approx(1 + 18 / 64)
    before = (root / "mixtral" / "seed_0" / "annealing.json").stat().st_mtime_ns
    anneal_study.measure(settings, "mixtral", 0, root)  # finds everything
    assert (root / "mixtral" / "seed_0" / "annealing.json").stat().st_mtime_ns == before
    text = anneal_report.report(settings, root)
    assert text.count("### ") == 7
    assert "nan" not in text
    assert "| - |" not in text
    increase = found["annealed 0.5 2.0"]["mean"] - found["float 0.5"]["mean"]
    assert f"| 2 | annealed, last 50% | {increase:.4f} ± 0.0000 |" in text
    assert "no result" in anneal_report.report(settings, root / "nothing")


def test_values_are_means_over_draws():
    one = {"granularity": "expert", "quantizer": study_report.OURS, "budget": 2.5, "levels": [2, 3]}
    results = [one | {"method": "random", "mean": value} for value in (1.0, 2.0)] + [
        one | {"method": "load", "mean": 5.0}
    ]
    runs = [{"results": results}, {"results": [one | {"method": "random", "mean": 4.0}]}]
    assert study_report.values(runs, "random") == [1.5, 4.0]
    assert study_report.values(runs, "load") == [5.0]


def test_other_quantizers():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    codes, scale, offset = rtn(weight, 2, 32)
    groups = weight.view(8, 2, 32)
    steps = (groups.amax(-1) - groups.amin(-1)) / 3
    torch.testing.assert_close(scale, steps)
    assert (scaled(codes, scale, offset) - weight).abs().max() <= steps.max() / 2 + 1e-6
    errors = {name: (scaled(*q(weight, 2, 32, None)) - weight).square().sum() for name, q in quantizers().items()}
    assert min(errors, key=errors.get) == "least squares"
    fitted = least_squares(weight, 2, 32)
    assert torch.equal(scaled(*fitted), scaled(*fitted))  # reading the values does not change them


@pytest.mark.thorough
def test_the_theorems_set_up_shows_them_and_fades(monkeypatch):
    monkeypatch.setattr(theory, "LONGER", 4)
    run = theory.run(0, 0.1)
    assert run.learned.auc == 1.0  # experts of rare tokens have changed least
    assert run.learned.errors["float"] == 0.0
    least = {plan: run.learned.errors[f"least squares, {plan}"] for plan in theory.PLANS}
    assert least["rare 3 bits, frequent 1"] < least["rare 1 bit, frequent 3"]
    assert run.later.step == 4 * run.learned.step
    assert len(run.changes) == len(run.steps)
    figure = theory.plot(run, 0.1)
    assert len(figure.axes[0].lines) == 8 + 1


def test_experts_choose_their_tokens():
    model = theory.Mixture(
        torch.eye(2, theory.WIDTH), torch.ones(2, 1, theory.WIDTH), torch.tensor([1.0, -1.0]), theory.RARE[:2]
    )
    tokens = torch.zeros(1, 3, theory.WIDTH)
    tokens[0, 0, 0], tokens[0, 1, 1], tokens[0, 2, 5] = 2.0, 3.0, 1.0
    # expert 0 takes token 0 (logit 2) and one with logit 0 that comes first: token 1 with a sum of 3
    gates = torch.tensor([2.0, 0.0]).softmax(0), torch.tensor([3.0, 0.0]).softmax(0)
    expected = (gates[0] @ torch.tensor([2.0, 3.0])) - (gates[1] @ torch.tensor([3.0, 2.0]))
    assert model.forward(tokens).item() == pytest.approx(expected.item())


def test_a_rare_share_beyond_the_theorems(capsys):
    with pytest.raises(SystemExit):
        theory.main(["--rare-share", "0.3"])
    assert "between 0 and 1/4" in capsys.readouterr().err


@pytest.mark.slow
def test_dropping_is_measured_beside_published_pruning(small, monkeypatch):
    settings, root = small
    monkeypatch.setattr(rounding_study, "STATISTICS_ROWS", 32)
    monkeypatch.setattr(rounding_study, "STEPS", 2)
    monkeypatch.setattr(rounding_study, "OTHER_TOKENS", 256)
    monkeypatch.setattr(dropping_study, "STEPS", 2)
    monkeypatch.setattr(dropping_study, "BUDGETS", (1.0, 1.25))
    monkeypatch.setattr(dropping_study, "COMPARED", (1.0,))
    assert dropping_study.measure(settings, "mixtral", 0, root) == "mixtral 0: done"
    found = json.loads((root / "mixtral" / "seed_0" / "dropping.json").read_text())
    by_plan = {one["plan"]: one for one in found["results"] if "fit" not in one}
    for budget in dropping_study.COMPARED:
        ours = by_plan[f"0 to 4 at {budget:g}"]
        for criterion in experts_seen.CRITERIA:
            published = by_plan.get(f"{criterion} at {budget:g}", ours)
            assert published["stored_bits"] >= ours["stored_bits"] - 1e-9
            assert math.isfinite(published["own"]["kl"])
    assert by_plan["uniform 1"]["stored_bits"] == 1 + 18 / 64
    text = dropping_report.report(settings, root)
    assert text.count("### ") == 3
    assert "| 0 to 4 at 1, distilled |" in text
    assert "| mean output |" in text


@pytest.mark.slow
def test_what_stands_in_the_place_of_an_expert():
    model, _, data = observed("mixtral")
    layers = find_moe_layers(model)
    seen = experts_seen.seen_experts(model, layers, data[:2])
    layer, experts = layers[0].name, layers[0].container()
    hidden, index, weights = torch.randn(3, 64), torch.tensor([[0, 1]] * 3), torch.tensor([[0.25, 0.75]] * 3)
    dropped = {one.name: [0] for one in layers}
    with torch.no_grad():
        whole = experts(hidden, index, weights)
        first = experts(hidden, index[:, :1], torch.ones(3, 1))
        for expert in dropped[layer]:
            for matrix in layers[0].expert_weights(expert).values():
                matrix.zero_()
        left = experts(hidden, index, weights)
        torch.testing.assert_close(left, whole - 0.25 * first)
        with experts_seen.in_place_of("weight to the others", layers, dropped, seen, model):
            torch.testing.assert_close(experts(hidden, index, weights), left / 0.75)
        with experts_seen.in_place_of("mean output", layers, dropped, seen, model):
            expected = left + 0.25 * seen[layer].mean_output[0]
            torch.testing.assert_close(experts(hidden, index, weights), expected)
        with experts_seen.in_place_of("next best expert", layers, dropped, seen, model):
            logits, scores, chosen = model.model.layers[0].mlp.gate(hidden)
        assert 0 not in chosen
        kept = logits[:, 1:].softmax(-1).topk(2)
        torch.testing.assert_close(scores, kept.values / kept.values.sum(-1, keepdim=True))
        assert torch.equal(chosen, kept.indices + 1)
    assert float(seen[layer].tokens.sum()) == 2 * 4 * 32 * 2  # tokens of two batches, two experts each


@pytest.mark.slow
def test_what_stands_in_the_place_of_a_switch_transformers_expert():
    model, _, data = observed("switch_transformers", batches=2)
    layers = find_moe_layers(model)
    seen = experts_seen.seen_experts(model, layers, data)
    layer, experts = layers[0].name, layers[0].container()
    hidden = torch.randn(1, 3, 64)
    router = model.get_submodule(layer).router
    dropped = {one.name: [0] for one in layers}
    mask = torch.eye(8, dtype=torch.int64)[[0, 0, 5]].unsqueeze(1)  # (N, 1, E)
    with torch.no_grad():
        for matrix in layers[0].expert_weights(0).values():
            matrix.zero_()
        left = experts(hidden[0], mask, torch.full((3, 1), 0.5))
        assert not left[:2].any()
        with experts_seen.in_place_of("mean output", layers, dropped, seen, model):
            found = experts(hidden[0], mask, torch.full((3, 1), 0.5))
        torch.testing.assert_close(found - left, seen[layer].mean_output[0] * torch.tensor([[0.5], [0.5], [0.0]]))
        with experts_seen.in_place_of("next best expert", layers, dropped, seen, model):
            mask, weights, logits = router(hidden)
        kept = logits[0, :, 1:].softmax(-1).max(-1, keepdim=True)
        torch.testing.assert_close(weights[0], kept.values)
        assert torch.equal(mask[0].argmax(-1, keepdim=True), kept.indices + 1)
    assert float(seen[layer].tokens.sum()) == 2 * 4 * 32


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "switch_transformers"])
def test_attribution_of_channels_is_activation_times_gradient(family):
    changes = {"experts_implementation": "eager"} if family == "mixtral" else {}  # grouped products take no float64
    model = build(family, **changes).double()
    layers = find_moe_layers(model)
    ids = torch.randint(3, 128, (1, 32))
    scores = channel_study.channel_scores(model, layers, [{"input_ids": ids, "labels": ids}])
    decoder = {} if family == "mixtral" else {"decoder_input_ids": model._shift_right(ids)}
    shift = 0 if decoder else 1  # transformers' own loss is in float32
    name, bank = layers[-1].name, list(layers[-1].banks.values())[-1]
    products = torch.zeros_like(scores[name])
    for expert in range(8):  # by moving what a channel holds: the loss falls or rises in proportion
        weight = bank.read(expert)
        for channel in (0, 7):
            with torch.no_grad():
                kept = weight[:, channel].clone()
                losses = []
                for share in (0.99, 1.01):
                    weight[:, channel] = kept * share
                    logits = model(input_ids=ids, **decoder).logits[0].double()
                    losses.append(float(cross_entropy(logits[: 32 - shift], ids[0, shift:])))
                weight[:, channel] = kept
            products[expert, channel] = abs(losses[1] - losses[0]) / 0.02
    torch.testing.assert_close(scores[name][:, [0, 7]], products[:, [0, 7]], atol=1e-6, rtol=1e-2)


def test_channels_with_the_least_scores_go():
    layer = find_moe_layers(build("mixtral"))[0]
    scores = torch.arange(8 * 128.0).view(8, 128).flip(0)
    channel_study._cut(layer, scores, 0.25)
    left = [int((layer.banks["down_proj"].read(expert) != 0).any(0).sum()) for expert in range(8)]
    assert left == [128, 128, 0, 0, 0, 0, 0, 0]
