"""One plan, and one packed checkpoint, for every class of the same model: layers are equal up to a prefix."""

from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moe_precision import (
    PlanError,
    PlanQuantizationConfig,
    PrecisionPlan,
    collect_statistics,
    find_moe_layers,
    quantize_model,
)
from moe_precision.checkpoints import load_model
from moe_precision.layers.prefixes import Prefixes, prefixes_of
from moe_precision.layers.shape import LayerShape
from moe_precision.plans.layer_plan import LayerPlan
from moe_precision.plans.model_types import may_have_the_same_layers
from moe_precision.quantize.codec.grid import Grid, on_grid
from moe_precision.quantize.writer import quantize_checkpoint
from tests.quantize.test_quantize import mixed_plan
from tests.support.model_zoo import _small, build_tiny
from tests.support.models import build, logits

IDS = torch.tensor([[3, 4, 5, 6, 7]])


def shapes(*names):
    return {name: LayerShape(f"{name}.gate.weight", 8, {"w": (8, 8)}, f"{name}.experts") for name in names}


@pytest.mark.parametrize(
    ("here", "there", "expected"),
    [
        (("model.layers.0.mlp",), ("layers.0.mlp",), ("model.", "")),
        (("layers.0.mlp",), ("model.language_model.layers.0.mlp",), ("", "model.language_model.")),
        (("model.layers.0.mlp",), ("model.language_model.layers.0.mlp",), ("model.", "model.language_model.")),
        (("a.layers.10.mlp", "a.layers.2.mlp"), ("layers.2.mlp", "layers.10.mlp"), ("a.", "")),
        (("model.layers.0.mlp",), ("model.layers.0.mlp",), ("", "")),
        (("model.layers.0.mlp",), ("model.layers.1.mlp",), None),
        (("layers.0.mlp",), ("blocks.0.mlp",), None),
        (("layers.0.mlp", "layers.1.mlp"), ("model.layers.0.mlp",), None),
        (("encoder.layers.0.mlp", "decoder.layers.0.mlp"), ("layers.0.mlp", "layers.1.mlp"), None),
    ],
)
def test_what_stands_before_the_names(here, there, expected):
    assert prefixes_of(shapes(*here), shapes(*there)) == (None if expected is None else Prefixes(*expected))


def test_other_shapes_or_routers_are_another_model():
    here, there = shapes("model.layers.0.mlp"), shapes("layers.0.mlp")
    (shape,) = there.values()
    assert prefixes_of(here, {"layers.0.mlp": replace(shape, num_experts=4)}) is None
    assert prefixes_of(here, {"layers.0.mlp": replace(shape, router="layers.0.router.weight")}) is None


@pytest.mark.slow
def test_a_packed_checkpoint_as_its_body_and_with_another_head(mixtral, tmp_path):
    quantize_model(mixtral, mixed_plan(mixtral)).save_pretrained(tmp_path / "packed")
    body = AutoModel.from_pretrained(tmp_path / "packed")
    with torch.no_grad():
        expected = mixtral.model(IDS).last_hidden_state
        assert torch.equal(body(IDS).last_hidden_state, expected)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed", num_labels=3)
    with torch.no_grad():
        assert torch.equal(classifier.model(IDS).last_hidden_state, expected)
    assert 0.005 < classifier.score.weight.std() < 0.05  # new, as transformers initializes it
    classifier.save_pretrained(tmp_path / "classifier")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert torch.equal(again.score.weight, classifier.score.weight)
    wider = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "classifier", num_labels=7, ignore_mismatched_sizes=True
    )
    assert wider.score.weight.shape == (7, 64)
    assert 0.005 < wider.score.weight.std() < 0.05
    # what the body writes loads as the body, and as what it came from
    body.save_pretrained(tmp_path / "body")
    again = AutoModel.from_pretrained(tmp_path / "body")
    with torch.no_grad():
        assert torch.equal(again(IDS).last_hidden_state, expected)
    whole = type(mixtral).from_pretrained(tmp_path / "body")
    with torch.no_grad():
        assert torch.equal(whole.model(IDS).last_hidden_state, expected)


@pytest.mark.slow
def test_a_plan_for_the_whole_model_on_its_body_and_back(mixtral, tmp_path):
    mixtral.save_pretrained(tmp_path / "float")
    plan = mixed_plan(mixtral)
    body = AutoModel.from_pretrained(tmp_path / "float")
    plan.check(body)
    of_body = plan.for_model(body, {layer.name: layer.shape for layer in find_moe_layers(body)})
    assert list(of_body.layers) == ["layers.0.mlp", "layers.1.mlp"]
    assert of_body.layers["layers.1.mlp"].shape.router == "layers.1.mlp.gate.weight"
    assert plan.diff(of_body) == of_body.diff(plan) == []
    edited = of_body.with_bits({"layers.1.mlp": [8] * 8})
    assert len(plan.diff(edited)) == 2 * 8 - sum(
        bits == 8 for widths in plan.layers["model.layers.1.mlp"].projection_bits.values() for bits in widths
    )
    packed = quantize_model(mixtral, of_body)
    with torch.no_grad():
        expected = packed.model(IDS).last_hidden_state
        assert torch.equal(quantize_model(body, plan)(IDS).last_hidden_state, expected)
        loaded = AutoModel.from_pretrained(tmp_path / "float", quantization_config=PlanQuantizationConfig(plan))
        assert torch.equal(loaded(IDS).last_hidden_state, expected)
    quantize_checkpoint(tmp_path / "float", of_body, tmp_path / "out")
    assert torch.equal(logits(load_model(tmp_path / "out")), logits(packed))


@pytest.mark.slow
def test_what_lies_beside_a_plan_takes_on_the_names_too(mixtral, tmp_path):
    mixtral.save_pretrained(tmp_path / "float")
    body = AutoModel.from_pretrained(tmp_path / "float")
    plan = mixed_plan(mixtral)
    batches = [{"input_ids": torch.randint(3, 128, (2, 16)), "labels": torch.randint(3, 128, (2, 16))}]
    statistics = collect_statistics(mixtral, batches)
    grid = Grid.fit(find_moe_layers(mixtral), plan)
    with torch.no_grad():
        for layer in find_moe_layers(mixtral):
            for name, bank in layer.banks.items():
                values = (of[layer.name][name] for of in (grid.scales, grid.offsets))
                weight = bank.weights[0].parameter()
                weight.copy_(on_grid(weight, plan.layers[layer.name].projection_bits[name], *values))
    mixtral.save_pretrained(tmp_path / "on_grid")
    with torch.no_grad():
        by_statistics = quantize_model(load_model(tmp_path / "float"), plan, statistics=statistics)
        expected = by_statistics.model(IDS).last_hidden_state
        found = quantize_model(body, plan, statistics=statistics)(IDS).last_hidden_state
        assert torch.equal(found, expected)
        expected = quantize_model(load_model(tmp_path / "on_grid"), plan, grid=grid).model(IDS).last_hidden_state
        body = AutoModel.from_pretrained(tmp_path / "on_grid")
        assert torch.equal(quantize_model(body, plan, grid=grid)(IDS).last_hidden_state, expected)


def of_4_bits(model):
    layers = {
        layer.name: LayerPlan(layer.shape, {name: [4] * layer.num_experts for name in layer.projections})
        for layer in find_moe_layers(model)
    }
    return PrecisionPlan(model.config.model_type, layers, 32, "by hand")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma4", "qwen3_vl_moe", "glm4v_moe", "aria"])
def test_names_of_a_text_model_and_of_the_model_that_contains_it(family):
    text, both = build_tiny(f"{family}_text", device="meta"), build_tiny(family, device="meta")
    assert text.config.model_type != both.config.model_type
    assert may_have_the_same_layers(text, family)
    assert not may_have_the_same_layers(text, "mixtral")
    for model, plan in ((both, of_4_bits(text)), (text, of_4_bits(both))):
        plan.check(model)
        found = {layer.name: layer.shape for layer in find_moe_layers(model)}
        fitted = plan.for_model(model, found)
        assert {name: layer.shape for name, layer in fitted.layers.items()} == found
        assert fitted.model_type == model.config.model_type
    plan = of_4_bits(text)
    fewer = replace(plan, layers=dict(list(plan.layers.items())[:2]))
    with pytest.raises(PlanError, match="of its layers the model lacks"):
        fewer.check(both)


def with_pictures(family):
    """A small model of text and images, as its own auto class builds it."""
    config = CONFIG_MAPPING[family]
    small = _small(config())
    small["vision_config"] = {**small["vision_config"], "depth": 1}
    return AutoModelForImageTextToText.from_config(config(**small)).eval()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen3_5_moe"])
def test_a_text_models_plan_packs_the_model_that_contains_it(family, tmp_path):
    torch.manual_seed(0)
    both = with_pictures(family)
    plan = of_4_bits(build_tiny(f"{family}_text", device="meta"))
    both.save_pretrained(tmp_path / "float")
    packed = quantize_model(both, plan)
    with torch.no_grad():
        expected = packed(input_ids=IDS).logits
        loaded = type(both).from_pretrained(tmp_path / "float", quantization_config=PlanQuantizationConfig(plan))
        assert torch.equal(loaded(input_ids=IDS).logits, expected)
        loaded.save_pretrained(tmp_path / "packed")
        assert torch.equal(type(both).from_pretrained(tmp_path / "packed")(input_ids=IDS).logits, expected)
        if family == "qwen3_5_moe":  # has a class of the text model alone, with a head
            text = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
            assert type(text).__name__ == "Qwen3_5MoeForCausalLM"
            assert torch.equal(text(input_ids=IDS).logits, expected)


def test_what_only_looks_alike_is_refused(mixtral):
    plan = mixed_plan(mixtral)
    with pytest.raises(PlanError, match="the plan is for a model of type 'qwen2_moe'"):
        replace(plan, model_type="qwen2_moe").check(mixtral)
    with pytest.raises(PlanError, match="of its layers the model lacks"):
        plan.check(build("mixtral", num_hidden_layers=3).model)
    with pytest.raises(PlanError, match="the model lacks"):
        plan.check(build("mixtral", num_local_experts=4).model)


@pytest.mark.slow
def test_a_tensor_of_the_body_that_is_missing_is_still_an_error(mixtral, tmp_path):
    from tests.quantize.test_refusals import drop

    quantize_model(mixtral, mixed_plan(mixtral)).save_pretrained(tmp_path / "packed")
    drop(tmp_path / "packed" / "model.safetensors", "model.layers.0.self_attn.q_proj.weight")
    with pytest.raises(ValueError, match="1 tensors were not in the checkpoint"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed", num_labels=3)
