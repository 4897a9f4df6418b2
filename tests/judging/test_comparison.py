"""The judge of methods: what it measures, what it reports, and that it leaves the model alone."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from moe_precision import (
    AllocationError,
    PlanError,
    PrecisionPlan,
    RouterNormHistory,
    allocate,
    collect_statistics,
    find_moe_layers,
    quantize_model,
)
from moe_precision.cli.main import main
from moe_precision.judging.compare import compare
from moe_precision.judging.comparison import Row
from moe_precision.judging.divergence import Divergence, divergence
from moe_precision.judging.evaluation import BANDS, evaluate
from moe_precision.judging.judge import Judge
from moe_precision.judging.statistics import Interval
from moe_precision.judging.verdict import verdict
from moe_precision.present.figures import plot_comparison
from moe_precision.present.tables import as_text, comparison_table
from moe_precision.recipes import SummarizationDataModule, TextDataModule
from moe_precision.recording.curvature import Curvature, row_and_column_means
from moe_precision.recording.router_norms import router_norms
from moe_precision.recording.second_moments import curvature_of
from tests.cli.test_cli import TEXT
from tests.support.models import build
from tests.support.optimizers import trained_with


@pytest.fixture(scope="module")
def known(trained):
    """A trained model, batches, counts of tokens, and a history without loads."""
    model, held_out = trained
    layers = find_moe_layers(model)
    history = RouterNormHistory.of(layers, "mixtral")
    history.record(0, router_norms(layers) * (1 + 0.1 * torch.rand(24, generator=torch.Generator().manual_seed(0))))
    history.record(200, router_norms(layers))
    batches = [{"input_ids": rows, "labels": rows} for rows in held_out.split(16)]
    return model, batches, torch.bincount(held_out.flatten(), minlength=256), history


@pytest.fixture(scope="module")
def comparison(known):
    model, batches, counts, history = known
    settings = {"budgets": (2.25, 2.5), "group_size": 64, "random_draws": 3, "granularities": ("expert", "layer")}
    return compare(model, batches[:2], counts, history, calibration=batches[4:5], **settings)


def test_every_method_stands_at_equal_stored_bits(comparison):
    assert comparison.budgets == [2.25, 2.5]
    for budget in comparison.budgets:
        names = [row.name for row in comparison.at(budget)]
        orders = {"router_norm", "norm_only", "final_norm", "max_variance", "load", "least_load", "reversed", "random"}
        costs = {f"{m}, {g}" for m in ("weight_error", "sensitivity") for g in ("expert", "layer")}
        assert set(names) == orders | costs
        for row in comparison.at(budget):
            assert row.stored_bits <= budget + 18 / 64 + 1e-9
            # more bits may raise a measured loss, so that the sensitivity can leave some of them unused
            if row.method != "sensitivity" and "layer" not in row.name:
                assert row.stored_bits == pytest.approx(budget + 18 / 64)
    assert [row.name for row in comparison.rows if row.asked_bits is None] == ["uniform 2 bits", "uniform 3 bits"]
    assert comparison.skipped == [
        "curvature: no curvature is given",
        "statistics: no curvature is given",
        "shuffled_curvature: no curvature is given",
    ]
    means = [row.mean.value for row in comparison.at(2.5)]
    assert means == sorted(means)


@pytest.mark.slow
def test_increases_are_those_of_the_quantized_model(comparison, known):
    model, batches, counts, history = known
    base = evaluate(model, batches[:2], counts)
    assert comparison.loss["all"] == pytest.approx(base.loss)
    assert comparison.loss["rare"] == pytest.approx(base.rare_loss)
    for method in ("router_norm", "reversed"):
        plan = allocate(copy.deepcopy(model), history, method=method, average_bits=2.5, group_size=64)
        after = evaluate(quantize_model(copy.deepcopy(model), plan), batches[:2], counts)
        row = comparison.get(method, 2.5)
        assert row.plan.diff(plan) == []
        assert row.mean.value == pytest.approx(after.loss - base.loss, abs=1e-5)
        assert row.bands["rare"].value == pytest.approx(after.rare_loss - base.rare_loss, abs=1e-5)
        assert row.mean.low < row.mean.value < row.mean.high
        packed = divergence(model, quantize_model(copy.deepcopy(model), plan), batches[:2])
        assert row.divergence.kl == pytest.approx(packed.kl, rel=1e-2)
        assert row.divergence.top1 == pytest.approx(packed.top1, abs=1e-2)
        assert row.divergence.same_experts == pytest.approx(packed.same_experts, abs=1e-2)
        assert (row.divergence.tokens, row.divergence.every) == (packed.tokens, 1)
    random = comparison.get("random", 2.5)
    assert len(random.draws) == len(random.rare_draws) == 3
    assert random.mean.value == pytest.approx(sum(random.draws) / 3)


def test_bands_add_up(comparison):
    share = comparison.counts.sum(0) / comparison.counts.sum()
    assert share.tolist() == pytest.approx([0.5, 0.4, 0.1], abs=1e-3)
    for row in comparison.rows:
        total = sum(share[i] * row.bands[band].value for i, band in enumerate(BANDS))
        assert total.item() == pytest.approx(row.mean.value, abs=1e-9)
        assert row.worst_decile > row.mean.value


def test_the_winner_is_no_control_and_the_sensitivity_ranks_itself(comparison):
    winner = comparison.winner(2.5)
    assert winner.method not in ("random", "reversed", "least_load", "uniform")
    assert comparison.correlations.keys() == {
        "router_norm_change",
        "final_router_norm",
        "max_variance",
        "expert_load",
        "routing_weight",
        "weight_error",
    }
    assert set(comparison.correlations["expert_load"]) == {"all", *winner.plan.layers}
    assert all(-1 <= value <= 1 for of in comparison.correlations.values() for value in of.values())


@pytest.mark.slow
def test_what_is_written_is_whole_json_and_the_picture_draws(comparison, tmp_path):
    data = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert len(data["rows"]) == len(comparison.rows)
    for written, row in zip(data["rows"], comparison.rows, strict=True):
        assert written["divergence"]["kl"] == row.divergence.kl
        assert written["divergence"].keys() == {"kl", "kl_99", "kl_999", "top1", "same_experts", "tokens", "every"}
    printed = as_text(comparison_table(comparison))
    assert "KL" in printed
    assert "one in" not in printed
    row = comparison.rows[0]
    sampled = replace(comparison, rows=[replace(row, divergence=replace(row.divergence, every=4))])
    assert "on one in 4 of the tokens" in " ".join(as_text(comparison_table(sampled)).split())
    assert "verdict" not in data  # which `compare --output` adds
    plot_comparison(comparison).savefig(tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_few_documents_are_said(comparison):
    assert not any("Documents" in line for line in verdict(comparison))
    few = verdict(replace(comparison, counts=comparison.counts[:4], rows=[], correlations={}))
    assert few == ["Documents: 4. Intervals are rough; judge on 20 or more."]


def test_draws_too_few_to_tell(comparison):
    rows = [row("router_norm", 0.01, 0.01, comparison), row("random", 0.02, 0.02, comparison, [0.02] * 10)]
    said, *_ = verdict(replace(comparison, rows=rows, correlations={}))
    assert "cannot be distinguished from random order with 10 draws on rare tokens" in said


def test_a_signal_that_ranks_nothing_is_left_out_and_json_stays_valid(comparison):
    correlations = {"router_norm_change": {"all": float("nan")}, "curvature": {"all": 0.5}}
    found = replace(comparison, correlations=correlations)
    assert verdict(found)[-1].endswith("over all experts: curvature 0.50.")
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["correlations"]["router_norm_change"]["all"] is None


def row(method, mean, rare, comparison, draws=(), granularity="expert", kl=0.001):
    interval = lambda value: Interval(value, value - 0.001, value + 0.001)  # noqa: E731
    bands = {band: interval(rare if band == "rare" else mean) for band in BANDS}
    sums = torch.full((4, 3), mean, dtype=torch.float64) * comparison.counts[:4]
    sums[:, 2] = rare * comparison.counts[:4, 2]
    plan = comparison.rows[0].plan
    return Row(
        method,
        granularity,
        2.5,
        2.5,
        3.0,
        interval(mean),
        bands,
        mean,
        Divergence(kl, kl, kl, 0.9, None, 100),
        None,
        plan,
        sums,
        list(draws),
        list(draws),
    )


@pytest.mark.parametrize(
    ("paper", "rare", "text"),
    [
        (0.05, 0.01, "beats random order (p=0.049) on rare tokens and loses to random order (p=0.049) on the mean"),
        (0.02, 0.02, "does not differ from random order (p=1) on rare tokens and does not differ"),
    ],
)
def test_the_verdict_in_words(paper, rare, text, comparison):
    draws = [0.02 + (i - 20) * 1e-4 for i in range(40)]
    rows = [
        row("router_norm", paper, rare, comparison, kl=0.004),
        row("random", 0.02, 0.02, comparison, draws),
        row("curvature", 0.01, 0.03, comparison, granularity="expert+projection"),
    ]
    said = verdict(replace(comparison, rows=rows, counts=comparison.counts[:4], correlations={}))
    assert len(said) == 2
    assert text in said[0]
    assert "use `curvature, expert+projection` (3 stored bits), which loses least here: 0.0100" in said[0]
    assert "though 4 documents are few" in said[0]
    assert f"on rare tokens {0.03 - rare:.4f}" in said[0]
    assert said[0].endswith("its KL to the float model is 0.00100, that of the router-norm order 0.00400.")


def test_equal_losses_are_within_the_noise(comparison):
    rows = [row("router_norm", 0.02, 0.02, comparison), row("load", 0.02, 0.02, comparison)]
    rows[1].sums[0] += 5 * comparison.counts[0]
    rows[1].sums[1] -= 5.001 * comparison.counts[0]
    rows[1] = replace(rows[1], mean=Interval(0.0199, 0.019, 0.021))
    said, _ = verdict(replace(comparison, rows=rows, counts=comparison.counts[:4], correlations={}))
    assert "use `load`" in said
    assert "within the noise" in said


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"methods": ["magic"]}, AllocationError, "unknown method 'magic'"),
        ({"budgets": [3.5]}, AllocationError, "outside the levels"),
        ({"granularities": ["neuron"]}, AllocationError, "unknown granularity"),
        ({"group_size": 48}, PlanError, "does not divide"),
        ({"random_draws": 0}, AllocationError, "at least 1"),
        ({"methods": []}, AllocationError, "methods is empty"),
        ({"budgets": []}, AllocationError, "budgets is empty"),
        ({"granularities": []}, AllocationError, "granularities is empty"),
    ],
)
def test_bad_arguments(settings, error, message, known):
    model, batches, counts, history = known
    with pytest.raises(error, match=message):
        compare(model, batches[:1], counts, history, **{"group_size": 64, **settings})


@pytest.mark.slow
def test_what_cannot_be_compared_is_said_and_the_rest_is(known):
    model, batches, counts, _ = known
    methods = ["router_norm", "load", "weight_error", "sensitivity"]
    found = compare(model, batches[:1], counts, methods=methods, bits=(1, 2, 3, 4), group_size=64)
    assert {row.method for row in found.rows} == {"weight_error"}
    text = "\n".join(found.skipped)
    assert "sensitivity: no calibration batches" in text
    assert "router_norm at 2.5 bits: the paper's rule takes one, two or three levels" in text
    assert "load at 2.5 bits" in text


@pytest.mark.slow
def test_plans_by_statistics_are_compared_as_they_are_made_and_packed(known):
    model, batches, counts, history = known
    layers = find_moe_layers(model)
    curvature = Curvature.of(layers, lambda weight: row_and_column_means(weight.read().detach().square()))
    statistics = collect_statistics(model, batches[4:])
    settings = {"group_size": 64, "bits": (1, 2, 3), "random_draws": 2, "curvature": curvature}
    settings["granularities"] = ("expert+projection",)
    methods = ["curvature", "statistics"]
    without = compare(model, batches[:2], counts, history, methods=methods, **settings)
    assert without.skipped == ["statistics: no statistics are given"]
    found = compare(model, batches[:2], counts, history, methods=methods, statistics=statistics, **settings)
    row = found.get("statistics", 2.5, "expert+projection")
    given = {"curvature": curvature, "statistics": statistics}
    plan = allocate(model, method="statistics", average_bits=2.5, bits=(1, 2, 3), group_size=64, **given)
    assert row.plan.diff(plan) == []
    packed = quantize_model(copy.deepcopy(model), plan, **given)
    assert row.divergence.kl == pytest.approx(divergence(packed, model, batches[:2]).kl, rel=0.02)
    settings["calibration"] = batches[3:4]
    calibrated = compare(model, batches[:2], counts, history, methods=methods, statistics=statistics, **settings)
    row = calibrated.get("statistics", 2.5, "expert+projection")
    plan = allocate(model, average_bits=2.5, bits=(1, 2, 3), group_size=64, calibration=batches[3:4], **given)
    assert row.plan.diff(plan) == []
    assert row.plan.notes["calibration_tokens"] == plan.notes["calibration_tokens"] == 16 * 127
    by_curvature = [one.get("curvature", 2.5, "expert+projection").divergence.kl for one in (without, found)]
    assert by_curvature[1] < by_curvature[0]  # the fit rounds under them


@pytest.mark.slow
def test_shuffled_costs_are_a_control_of_curvature(known):
    model, batches, counts, history = known
    curvature = Curvature.of(
        find_moe_layers(model),
        lambda weight: (torch.rand(weight.shape[:-1]) + 0.1, torch.rand(*weight.shape[:-2], weight.shape[-1]) + 0.1),
    )
    methods = ["shuffled_curvature", "curvature"]
    settings = {"group_size": 64, "random_draws": 2, "granularities": ("expert", "layer"), "curvature": curvature}
    found = compare(model, batches[:1], counts, history, methods=methods, **settings)
    names = {row.name: row for row in found.rows}
    assert set(names) == {"shuffled_curvature, expert", "curvature, expert", "curvature, layer"}  # no shuffled layers
    shuffled = names["shuffled_curvature, expert"]
    assert shuffled.mean.value == pytest.approx(sum(shuffled.draws) / 2)
    assert len(set(shuffled.draws)) == 2
    assert found.winner(2.5).method == "curvature"
    given = {"method": "shuffled_curvature", "curvature": curvature, "bits": (2, 3), "granularity": "expert"}
    plan = allocate(model, average_bits=2.5, group_size=64, seed=0, **given)
    assert shuffled.plan.diff(plan) == []
    assert (shuffled.plan.method, shuffled.plan.to_dict()["settings"]["seed"]) == ("shuffled_curvature", 0)


def test_documents_end_with_their_last_token(known):
    model, batches, _, _ = known
    ids = batches[0]["input_ids"][:3].clone()
    end = 255  # a byte that text in UTF-8 does not have
    ids[0, 40], ids[2, 10] = end, end
    judge = Judge(model, [{"input_ids": ids, "labels": ids}], torch.ones(256), end)
    # tokens of a row but its first have a loss: up to the first end, up to the second, and the rest
    assert judge.counts.sum(1).tolist() == [40, 87 + 127 + 10, 117]
    by_row = Judge(model, [{"input_ids": ids, "labels": ids}], torch.ones(256))
    assert by_row.counts.sum(1).tolist() == [127, 127, 127]


def test_no_target_is_an_error(known):
    model, batches, counts, _ = known
    with pytest.raises(ValueError, match="no target tokens"):
        Judge(model, [{"input_ids": batches[0]["input_ids"], "labels": torch.full((16, 128), -100)}], counts)
    with pytest.raises(ValueError, match="no batch to judge on"):
        Judge(model, [], counts)
    with pytest.raises(ValueError, match="token_counts has 3 entries"):
        Judge(model, batches[:1], counts[:3])


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    data = TextDataModule(dataset=str(tmp_path / "text.txt"), vocab_size=300)
    data.setup("validate")
    model = build("mixtral", vocab_size=len(data.tokenizer))
    layers = find_moe_layers(model)
    history = RouterNormHistory.of(layers, "mixtral")
    history.record(0, router_norms(layers))
    optimizer = trained_with(torch.optim.AdamW, model)
    history.record(3, router_norms(layers))
    history.save(tmp_path / "plan.history.safetensors")
    curvature_of(layers, [optimizer]).save(tmp_path / "plan.curvature.safetensors")
    model.save_pretrained(tmp_path / "model")
    data.tokenizer.save_pretrained(tmp_path / "model")
    arguments = ["compare", str(tmp_path / "model"), str(tmp_path / "plan.history.safetensors")]
    arguments += ["--dataset", str(tmp_path / "text.txt"), "--group-size", "64", "--random-draws", "2"]
    arguments += ["--methods", "router_norm", "random", "curvature", "--max-batches", "1"]
    files = [tmp_path / name for name in ("x.json", "x.png", "best.json")]
    outputs = ["-o", str(files[0]), "--plot", str(files[1]), "--write-plan", str(files[2])]
    assert main([*arguments, *outputs]) == 0
    out = capsys.readouterr().out
    assert "curvature, expert+projection" in out
    assert "At 2.5 bits on this model" in out
    assert all(file.is_file() for file in files)
    best = PrecisionPlan.load(files[2])
    assert best.method in ("router_norm", "curvature")
    assert (tmp_path / "best.curvature.safetensors").is_file()
    assert main(["quantize", str(tmp_path / "model"), str(files[2]), str(tmp_path / "small")]) == 0
    # nothing is replaced, and one plan has one budget
    assert main([*arguments, *outputs]) == 2
    assert "exists" in capsys.readouterr().err
    for bad, message in (
        (["--plot", str(tmp_path / "p.xyz")], "must end in .png"),
        (["--write-plan", str(tmp_path / "best.v2")], "must end in .json"),
        (["--write-plan", str(tmp_path / "c.json"), "--methods", "random"], "are controls"),
        (["--average-bits", "7"], "outside the levels"),
        (["--curvature", str(tmp_path / "no.safetensors")], "no curvature at"),
    ):
        assert main([*arguments, *bad]) == 2
        assert message in capsys.readouterr().err
    two = ["--average-bits", "2.25", "2.5", "--write-plan", str(tmp_path / "other.json")]
    assert main([*arguments, *two]) == 2
    assert "give one budget" in capsys.readouterr().err


@pytest.mark.slow
def test_summaries_are_judged_by_rouge(tmp_path, capsys):
    source = "\n\n".join(
        f'def add_{i}(a, b):\n    """Return the sum of a and b plus {i}."""\n    return a + b + {i}\n'
        for i in range(60)
    )
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.py").write_text(source)
    data = SummarizationDataModule(dataset=str(tmp_path / "*.py"), vocab_size=500)
    data.setup("validate")
    model = build("switch_transformers", vocab_size=len(data.tokenizer))
    model.save_pretrained(tmp_path / "model")
    data.tokenizer.save_pretrained(tmp_path / "model")
    arguments = ["compare", str(tmp_path / "model"), "--dataset", str(tmp_path / "*.py"), "--group-size", "64"]
    arguments += ["--methods", "weight_error", "load", "--max-batches", "1", "--rouge-examples", "4"]
    assert main([*arguments, "--granularity", "expert", "-o", str(tmp_path / "x.json")]) == 0
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["task"]["name"] == "ROUGE-L"
    assert all(one["divergence"]["kl"] > 0 for one in found["rows"])
    assert all(0 < one["divergence"]["same_experts"] <= 1 for one in found["rows"])
    assert all(0 <= one["task"] <= 1 for one in found["rows"])
    assert {one["method"] for one in found["rows"]} == {"weight_error", "load"}
