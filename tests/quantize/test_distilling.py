"""Scales distilled from the float model: codes stay, outputs come closer, and nothing else changes."""

import copy

import pytest
import torch
import torch.nn.functional as F

from moe_precision import (
    CheckpointError,
    DistillError,
    allocate,
    distill_checkpoint,
    distill_scales,
    find_moe_layers,
    load_model,
    quantize_checkpoint,
    quantize_model,
)
from moe_precision.quantize.distances import logits_of
from moe_precision.quantize.matrices import PackedMatrices
from moe_precision.quantize.trainable import TrainableScales
from tests.support.models import build, logits

pytestmark = pytest.mark.slow

LAYER = "model.layers.0.mlp"


def text(count: int = 16, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 128, (4, 32), generator=generator)} for _ in range(count)]


def packed_of(model, **settings):
    plan = allocate(model, **{"method": "uniform", "average_bits": 2, "group_size": 32, **settings})
    return quantize_model(copy.deepcopy(model), plan)


def buckets(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedMatrices)}


def codes_and_scales(model):
    found = {name: module.matrices(list(range(module.shape[0]))) for name, module in buckets(model).items()}
    return {name: (m.codes.clone(), [part.clone() for part in m.floats()]) for name, m in found.items()}


def divergence(model, packed, batches) -> float:
    with torch.no_grad():
        pairs = [(model(**batch).logits, packed(**batch).logits) for batch in batches]
    return sum(
        float(F.kl_div(b.log_softmax(-1), a.log_softmax(-1), reduction="batchmean", log_target=True)) for a, b in pairs
    )


@pytest.mark.parametrize("through", ["layers", "logits"])
def test_codes_stay_and_outputs_come_closer(through):
    model = build("mixtral")
    packed, floats = packed_of(model), {name: value.clone() for name, value in model.state_dict().items()}
    before, unseen = codes_and_scales(packed), text(4, seed=1)
    kl = divergence(model, packed, unseen)
    found = distill_scales(packed, model, text(), steps=30, rate=0.01, through=through)
    assert divergence(model, packed, unseen) < 0.95 * kl
    assert all(last < first for first, last in found.errors.values())
    assert set(found.errors) == ({"logits"} if through == "logits" else {LAYER, "model.layers.1.mlp"})
    for name, (codes, scales) in codes_and_scales(packed).items():
        assert torch.equal(codes, before[name][0])
        assert not torch.equal(scales[0], before[name][1][0])
        assert not torch.equal(scales[1], before[name][1][1])
    assert all(torch.equal(value, floats[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["gpt_oss", "switch_transformers", "deepseek_v3", "qwen2_moe"])
def test_other_layouts(family):
    model = build(family)
    packed = packed_of(model)
    batch = text(1)[0]
    if model.config.is_encoder_decoder:
        batch = {**batch, "labels": batch["input_ids"].flip(1)}
    found = distill_scales(packed, model, [batch], steps=15, rate=0.005)
    assert not found.kept
    assert len(found.errors) == len(find_moe_layers(model))
    assert all(last < first for first, last in found.errors.values())


def test_the_reported_error_is_that_of_the_packed_layer():
    """By running the packed model's own layer on what the layers before it make."""
    model = build("mixtral")
    packed = packed_of(model)
    batches = text(1)
    found = distill_scales(packed, model, batches, steps=3)
    seen = {}
    first = packed.get_submodule(LAYER)
    handle = first.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    with torch.no_grad():
        packed(**batches[0])
        handle.remove()
        target, out = model.get_submodule(LAYER)(seen["x"]), first(seen["x"])
    target, out = (one[0] if isinstance(one, tuple) else one for one in (target, out))
    expected = float((out - target).square().sum() / target.square().sum())
    assert found.errors[LAYER][1] == pytest.approx(expected, rel=1e-4)


def test_weights_of_changed_scales_by_hand():
    model = build("mixtral")
    packed = packed_of(model)
    scales = TrainableScales.of_packed(find_moe_layers(model)[0], packed)
    name = f"{LAYER}.experts.down_proj"
    projection = packed.get_submodule(f"{LAYER}.experts.packed.down_proj")
    torch.testing.assert_close(scales.weights()[name][3], projection.weight(3))
    matrix = scales._matrices[name][3]
    with torch.no_grad():
        matrix.factor[5, 1], matrix.shift[5, 1] = 0.5, -2.0
    scale, offset = matrix.scale[5, 1], matrix.offset[5, 1]
    expected = matrix.codes[5, 1].float() * scale * 1.5 + offset - 2 * scale
    torch.testing.assert_close(scales.weights()[name][3][5, 32:64], expected)


def test_experts_at_16_bits_stay_and_mixed_widths_work():
    model = build("mixtral")
    packed = packed_of(model, method="random", average_bits=9.0, bits=(2, 16))
    found = distill_scales(packed, model, text(8), steps=20, rate=0.01)
    assert all(last < first for first, last in found.errors.values())
    projection = packed.get_submodule(f"{LAYER}.experts.packed.down_proj")
    floats = [e for e in range(8) if not isinstance(projection.place(e)[0], PackedMatrices)]
    assert floats
    for expert in floats:
        assert torch.equal(projection.weight(expert), model.get_parameter(f"{LAYER}.experts.down_proj")[expert])


def test_what_does_not_get_better_is_left():
    model = build("mixtral")
    packed = packed_of(model)
    before = codes_and_scales(packed)
    found = distill_scales(packed, model, text(4), steps=3, rate=100.0)
    assert found.kept == list(found.errors)
    assert all(last == first for first, last in found.errors.values())
    assert "left as they were: model.layers.0.mlp" in found.described()
    for name, (codes, scales) in codes_and_scales(packed).items():
        assert torch.equal(codes, before[name][0])
        assert all(map(torch.equal, scales, before[name][1]))


def test_a_model_in_half_precision():
    """Scales are trained in float32, where a small change is not lost: nearly as good as for the float32 model."""
    model = build("mixtral")
    plan = allocate(model, method="uniform", average_bits=2, group_size=32)
    changes = []
    for one in (model, copy.deepcopy(model).bfloat16()):
        packed = quantize_model(copy.deepcopy(one), plan)
        first, last = distill_scales(packed, one, text(12), steps=15).errors[LAYER]
        changes.append(last / first)
    assert changes[0] < 0.97
    assert changes[1] == pytest.approx(changes[0], abs=0.005)


def test_padding_does_not_count():
    model = build("mixtral")
    batch = text(1)[0]
    padded = {
        "input_ids": F.pad(batch["input_ids"], (0, 8), value=2),
        "attention_mask": F.pad(torch.ones(4, 32, dtype=torch.int64), (0, 8)),
    }
    plain, masked = (packed_of(model) for _ in range(2))
    first = distill_scales(plain, model, [batch], steps=2).errors[LAYER]
    second = distill_scales(masked, model, [padded], steps=2).errors[LAYER]
    assert first == pytest.approx(second, rel=1e-3)


def test_a_checkpoint(tmp_path):
    model = build("mixtral")
    model.save_pretrained(tmp_path / "float")
    plan = allocate(model, method="random", bits=(2, 3), group_size=32)
    quantize_checkpoint(tmp_path / "float", plan, tmp_path / "packed")
    (tmp_path / "packed" / "tokenizer.txt").write_text("kept")
    found = distill_checkpoint(tmp_path / "float", tmp_path / "packed", tmp_path / "out", text(8), steps=10, rate=0.01)
    assert not found.kept
    in_memory = quantize_model(copy.deepcopy(model), plan)
    distill_scales(in_memory, model, text(8), steps=10, rate=0.01)
    again = load_model(tmp_path / "out")
    torch.testing.assert_close(logits(again), logits(in_memory), rtol=1e-4, atol=1e-5)
    assert not torch.equal(logits(again), logits(load_model(tmp_path / "packed")))
    assert (tmp_path / "out" / "tokenizer.txt").read_text() == "kept"
    sizes = [sum(f.stat().st_size for f in (tmp_path / name).glob("*.safetensors")) for name in ("packed", "out")]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)
    with pytest.raises(CheckpointError, match="was not quantized by moe-precision"):
        distill_checkpoint(tmp_path / "float", tmp_path / "float", tmp_path / "new", text(1))
    assert not (tmp_path / "new").exists()


def test_errors():
    model = build("mixtral")
    packed = packed_of(model)
    with pytest.raises(DistillError, match="there is no batch"):
        distill_scales(packed, model, [])
    with pytest.raises(DistillError, match="at least 1 step and a positive rate"):
        distill_scales(packed, model, text(1), steps=0)
    with pytest.raises(DistillError, match="without packed experts"):
        distill_scales(build("mixtral"), model, text(1))
    with pytest.raises(DistillError, match=r"has shape \(256, 64\), its packed matrices"):
        distill_scales(packed_of(build("mixtral", intermediate_size=64)), model, text(1))
    with pytest.raises(DistillError, match="is not of this float model"):
        distill_scales(packed_of(build("mixtral", num_hidden_layers=1)), model, text(1))


def test_the_report_is_of_what_is_put_into_the_model():
    """At 8 bits one layer gets no better, and the error of what was tried for it is not that of the model."""
    model = build("mixtral")
    plan = allocate(model, method="uniform", average_bits=2, group_size=32)
    packed = quantize_model(copy.deepcopy(model), plan.with_bits({"model.layers.1.mlp": [8] * 8}))
    found = distill_scales(packed, model, text(8), steps=20, rate=0.02)
    assert found.kept == ["model.layers.1.mlp"]
    measured = distill_scales(packed, model, text(8), steps=1, rate=1e-9).errors  # on the same two batches
    assert {name: first for name, (first, _) in measured.items()} == pytest.approx(
        {name: last for name, (_, last) in found.errors.items()}, rel=1e-5
    )


def test_tokens_that_count_in_an_encoder_decoder():
    """The mask of the encoder's input is not that of the labels, even where both have the same shape."""
    model = build("switch_transformers")
    ids = text(1)[0]["input_ids"]
    labels = torch.where(torch.arange(32) < 5, ids.flip(1), -100)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    found = logits_of(model, model(**batch), batch)
    torch.testing.assert_close(found, model(**batch).logits[:, :5].flatten(0, 1))


def test_a_packed_model_of_other_weights():
    model, other = build("mixtral"), build("mixtral")
    with torch.no_grad():
        other.get_parameter(f"{LAYER}.gate.weight").mul_(1.01)
    with pytest.raises(DistillError, match=r"belongs to other weights: router norms in 'model.layers.0.mlp' differ"):
        distill_scales(packed_of(model), other, text(1))
    half = packed_of(copy.deepcopy(model).bfloat16())
    distill_scales(half, model, text(1), steps=1)  # another dtype of the same weights
    with pytest.raises(DistillError, match="no expert of the packed model is at 1 to 8 bits"):
        distill_scales(packed_of(model, average_bits=16), model, text(1))
