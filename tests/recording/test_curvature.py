"""Curvature as a value and as a file, and that it is refused for other models and other weights."""

import pytest
import torch
from safetensors import safe_open

from moe_precision import allocate, find_moe_layers, quantize_model
from moe_precision.quantize.writer import quantize_checkpoint
from moe_precision.recording.curvature import Curvature, CurvatureError
from moe_precision.recording.second_moments import curvature_of
from tests.support.models import build
from tests.support.optimizers import trained_with


@pytest.fixture
def curvature():
    model = build("mixtral")
    return curvature_of(find_moe_layers(model), [trained_with(torch.optim.Adam, model)])


def test_a_file(curvature, tmp_path):
    path = tmp_path / "c.safetensors"
    curvature.save(path)
    again = Curvature.load(path)
    assert again.layers == curvature.layers
    for kind in ("rows", "columns", "router_norms"):
        torch.testing.assert_close(getattr(again, kind), getattr(curvature, kind), rtol=0, atol=0)
    names = ["model.layers.0.mlp", "model.layers.1.mlp"]
    with safe_open(path, "pt") as file:
        assert file.metadata().keys() == {"format", "version", "layers"}
        assert set(file.keys()) == {f"router_norms/{name}" for name in names} | {
            f"{kind}/{name}/{matrix}"
            for kind in ("rows", "columns")
            for name in names
            for matrix in ("gate_up_proj", "down_proj")
        }


def test_curvature_of_another_model_is_refused(curvature):
    other = build("qwen3_moe")
    with pytest.raises(CurvatureError, match="belongs to another model"):
        quantize_model(other, allocate(other, method="uniform", average_bits=2, group_size=64), curvature=curvature)


@pytest.mark.slow
def test_curvature_of_other_weights_is_refused(tmp_path):
    model = build("mixtral")
    curvature = curvature_of(find_moe_layers(model), [trained_with(torch.optim.AdamW, model)])
    plan = allocate(model, method="uniform", average_bits=2, group_size=64)
    model.bfloat16().save_pretrained(tmp_path / "bf16")  # the same weights, rounded
    quantize_checkpoint(tmp_path / "bf16", plan, tmp_path / "packed", curvature=curvature)
    with torch.no_grad():
        find_moe_layers(model)[1].router_weight()[4] *= 1.01
    with pytest.raises(CurvatureError, match=r"to other weights: router norms in 'model\.layers\.1\.mlp' differ"):
        quantize_model(model, plan, curvature=curvature)
    with pytest.raises(CurvatureError, match="belongs to other weights"):
        allocate(model, method="curvature", curvature=curvature, group_size=64)
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(CurvatureError, match="belongs to other weights"):
        quantize_checkpoint(tmp_path / "other", plan, tmp_path / "packed2", curvature=curvature)


@pytest.mark.parametrize("change", [lambda t: t.neg_(), lambda t: t.fill_(float("inf"))])
def test_damaged_values(change, curvature, tmp_path):
    change(curvature.rows["model.layers.1.mlp"]["down_proj"])
    curvature.save(tmp_path / "c.safetensors")
    with pytest.raises(CurvatureError, match=r"expected finite means of at least 0 of shape \(8, 64\)"):
        Curvature.load(tmp_path / "c.safetensors")
