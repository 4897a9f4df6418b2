"""Expert statistics as a value and as a file, their shrinkage, and that other weights and damage are refused."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moe_precision import find_moe_layers
from moe_precision.recording.statistics import ExpertStatistics, StatisticsError, as_statistics
from tests.support.models import build

LAYER = "model.layers.1.mlp"


def moments(layers, tokens: int = 200) -> dict:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for layer in layers:
        found[layer.name] = {}
        for name, (_, inp) in layer.projections.items():
            x = torch.randn(layer.num_experts, tokens, inp, generator=generator) * torch.logspace(3, -6, inp)
            x[:, :, 3] = 0
            found[layer.name][name] = x.mT @ x / tokens
    return found


@pytest.fixture
def layers():
    return find_moe_layers(build("mixtral"))


@pytest.fixture
def statistics(layers):
    tokens = {layer.name: torch.arange(8) * 100 for layer in layers}
    return ExpertStatistics.of(layers, moments(layers), tokens, "seeded noise")


def test_a_second_moment_comes_back_in_half_precision(layers, statistics):
    for layer, of_layer in moments(layers).items():
        for name, of_all in of_layer.items():
            for expert, moment in enumerate(of_all):
                found = statistics.second_moment(layer, name, expert)
                assert torch.equal(found.diagonal(), moment.diagonal())
                assert torch.equal(found, found.T)
                scale = moment.diagonal().outer(moment.diagonal()).sqrt()
                assert ((found - moment).abs() <= 2**-11 * scale).all()  # whatever the range of the inputs


def test_a_file(statistics, tmp_path):
    path = tmp_path / "x.statistics.safetensors"
    statistics.save(path)
    again = as_statistics(path)
    assert again.layers == statistics.layers
    assert again.text == "seeded noise"
    for kind in ("diagonals", "correlations", "tokens", "router_norms"):
        torch.testing.assert_close(getattr(again, kind), getattr(statistics, kind), rtol=0, atol=0)
    names = ["model.layers.0.mlp", LAYER]
    with safe_open(path, "pt") as file:
        assert file.metadata().keys() == {"format", "version", "layers", "text"}
        assert set(file.keys()) == {f"{kind}/{name}" for kind in ("tokens", "router_norms") for name in names} | {
            f"{kind}/{name}/{matrix}"
            for kind in ("diagonals", "correlations")
            for name in names
            for matrix in ("gate_up_proj", "down_proj")
        }


def test_shrinkage(statistics):
    whole = statistics.second_moment(LAYER, "gate_up_proj", 2)
    share = 0.3 * 64 / (200 + 0.3 * 64)
    weights = torch.rand(64) + 0.5
    target = torch.diag(weights / weights.mean() * whole.diagonal().mean())
    found = statistics.fit_moment(LAYER, "gate_up_proj", 2, weights)
    torch.testing.assert_close(found, (1 - share) * whole + share * target)
    alike = statistics.fit_moment(LAYER, "gate_up_proj", 2)
    torch.testing.assert_close(alike, (1 - share) * whole + share * whole.diagonal().mean() * torch.eye(64))
    without_gradient = statistics.fit_moment(LAYER, "gate_up_proj", 2, torch.zeros(64))
    torch.testing.assert_close(without_gradient, alike)
    assert statistics.fit_moment(LAYER, "gate_up_proj", 0) is None  # no token
    statistics.diagonals[LAYER]["gate_up_proj"][3] = 0  # tokens, and all of their inputs 0
    assert statistics.fit_moment(LAYER, "gate_up_proj", 3) is None


def test_what_they_rest_on(statistics):
    text = "tokens per expert: least 0, median 300, most 700; 2 experts saw none and are fitted without statistics"
    assert statistics.described() == text


def test_another_model_and_other_weights(layers, statistics):
    with pytest.raises(StatisticsError, match="the statistics are of another model"):
        statistics.for_layers({layer.name: layer.shape for layer in find_moe_layers(build("qwen3_moe"))})
    statistics.for_layers({layer.name: layer.shape for layer in layers})
    norms = {layer.name: layer.row_norms() for layer in layers}
    statistics.check_router_norms({name: norm * 1.001 for name, norm in norms.items()})
    norms[LAYER][4] *= 1.01
    with pytest.raises(
        StatisticsError,
        match=r"the set of statistics belongs to other weights: router norms in 'model\.layers\.1\.mlp'",
    ):
        statistics.check_router_norms(norms)


def damaged(path, change):
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    change(tensors)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            f"diagonals/{LAYER}/down_proj",
            lambda t: t.fill_(float("nan")),
            r"'down_proj' in layer .* expert 0: .* not finite",
        ),
        (f"correlations/{LAYER}/down_proj", lambda t: t.fill_(float("inf")), "not finite"),
        (f"diagonals/{LAYER}/down_proj", lambda t: t.neg_(), "go down to -.*, expected 0"),
        (f"correlations/{LAYER}/down_proj", lambda t: t.fill_(1.5), "go up to 1.5, expected 1"),
        (f"tokens/{LAYER}", lambda t: t.sub_(800), "expected 8 whole numbers of at least 0"),
    ],
)
def test_damaged_values(statistics, tmp_path, name, change, message):
    path = tmp_path / "s.safetensors"
    statistics.save(path)
    damaged(path, lambda tensors: change(tensors[name]))
    with pytest.raises(StatisticsError, match=message):
        ExpertStatistics.load(path)


def test_damaged_shapes_and_files(statistics, tmp_path):
    path = tmp_path / "s.safetensors"
    statistics.save(path)
    name = f"correlations/{LAYER}/down_proj"
    damaged(path, lambda tensors: tensors.update({name: tensors[name][:, :-1].clone()}))
    with pytest.raises(
        StatisticsError, match=r"shapes \(8, 128\) and \(8, 8127\), expected \(8, 128\) and \(8, 8128\)"
    ):
        ExpertStatistics.load(path)
    damaged(path, lambda tensors: tensors.pop(name))
    with pytest.raises(StatisticsError, match="is not an intact statistics file: it has no tensor 'correl"):
        ExpertStatistics.load(path)
    statistics.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StatisticsError, match="is truncated, or not a statistics file"):
        ExpertStatistics.load(path)
    with pytest.raises(FileNotFoundError, match="no statistics at"):
        ExpertStatistics.load(tmp_path / "none.safetensors")
