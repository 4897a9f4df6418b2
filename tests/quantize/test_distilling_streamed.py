"""Scales distilled one layer at a time: those of the whole model in memory, in which no other layer ever is."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from moe_precision import (
    CheckpointError,
    allocate,
    collect_statistics,
    distill_scales,
    load_model,
    quantize_checkpoint,
    quantize_model,
)
from moe_precision.quantize.side_by_side import ForwardPass, Gates
from moe_precision.quantize.trainable import DistillError
from moe_precision.quantize.writer import distill_streamed, streamed
from moe_precision.quantize.writer.parts import PartlyLoaded
from moe_precision.recording.statistics import StatisticsError
from tests.callbacks.test_distilling_of_a_run import assert_equal
from tests.quantize.test_distilling import text
from tests.support.models import build


def both(tmp_path, model, batches, plan, **known):
    """The whole model distilled in memory, and its checkpoint layer by layer; asserts that they are equal."""
    model.save_pretrained(tmp_path / "float", max_shard_size="100KB")
    expected = quantize_model(copy.deepcopy(model), plan, **known)
    found = distill_scales(expected, model, batches, steps=5)
    grid, report = distill_streamed(tmp_path / "float", plan, batches, steps=5, **known)
    assert report.kept == found.kept
    for name, errors in found.errors.items():
        assert report.errors[name] == pytest.approx(errors, rel=1e-5)
    quantize_checkpoint(tmp_path / "float", plan, tmp_path / "out", grid=grid)
    assert_equal(load_model(tmp_path / "out"), expected)


def running() -> list[threading.Thread]:
    """Threads of forward passes that have not ended."""
    return [thread for thread in threading.enumerate() if thread.name == "forward pass"]


def uniform(model):
    return allocate(model, method="uniform", average_bits=2, group_size=32)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [
        "switch_transformers",
        *(pytest.param(f, marks=pytest.mark.thorough) for f in ("gpt_oss", "deepseek_v3", "qwen2_moe")),
    ],
)
def test_it_is_what_the_whole_model_gives(family, tmp_path):
    """Biases, an encoder and a decoder, layers without experts, and shared experts."""
    model, batches = build(family), text(6)
    if model.config.is_encoder_decoder:
        batches = [{**batch, "labels": batch["input_ids"].flip(1)} for batch in batches]
    both(tmp_path, model, batches, uniform(model))


@pytest.mark.slow
def test_with_statistics_padding_and_a_layer_at_16_bits(tmp_path, monkeypatch):
    """While a layer is in memory, no other is; and afterwards no thread is left."""
    model = build("mixtral", num_hidden_layers=3, tie_word_embeddings=True)
    statistics = collect_statistics(model, text(2))
    padded = [
        {"input_ids": F.pad(ids, (0, 8), value=2), "attention_mask": F.pad(torch.ones_like(ids), (0, 8))}
        for ids in (batch["input_ids"] for batch in text(6))
    ]
    loaded, load = [], PartlyLoaded.load

    def watched(parts, layer):
        load(parts, layer)
        loaded.append(
            {name.split(".")[2] for name, p in parts.model.named_parameters() if ".layers." in name and not p.is_meta}
        )

    monkeypatch.setattr(PartlyLoaded, "load", watched)
    plan = uniform(model).with_bits(
        {"model.layers.1.mlp": [16] * 6 + [0] * 2, "model.layers.2.mlp": [2, 3, 16, 2, 2, 2, 2, 1]}
    )
    both(tmp_path, model, padded, plan, statistics=statistics)
    assert loaded == [set(), {"0"}, {"1"}, {"2"}]
    assert not running()
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved.get_parameter("model.layers.1.mlp.gate.weight").mul_(1.1)
    moved.save_pretrained(tmp_path / "moved")
    with pytest.raises(StatisticsError, match="belongs to other weights"):
        distill_streamed(tmp_path / "moved", uniform(moved), padded, statistics=statistics)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)])
def test_modes_of_the_caller_change_nothing(mode, tmp_path):
    model, batches = build("mixtral"), text(4)
    model.save_pretrained(tmp_path)
    expected, _ = distill_streamed(tmp_path, uniform(model), batches, steps=2)
    with mode():
        found, _ = distill_streamed(tmp_path, uniform(model), batches, steps=2)
    for name, scales in expected.scales.items():
        assert all(torch.equal(found.scales[name][key], scale) for key, scale in scales.items())


@pytest.mark.slow
def test_errors(tmp_path, monkeypatch):
    model = build("mixtral")
    model.save_pretrained(tmp_path / "float")
    with pytest.raises(DistillError, match="expected at least 1 step and a positive rate, got 0"):
        distill_streamed(tmp_path / "float", uniform(model), text(1), steps=0)
    with pytest.raises(DistillError, match="there is no batch to distill on"):
        distill_streamed(tmp_path / "float", uniform(model), [])
    with pytest.raises(DistillError, match="no expert of the plan is at 1 to 8 bits"):
        distill_streamed(
            tmp_path / "float", allocate(model, method="uniform", average_bits=16, group_size=32), text(1), steps=1
        )
    with pytest.raises(IndexError):  # what the model itself raises
        distill_streamed(tmp_path / "float", uniform(model), [{"input_ids": torch.full((1, 4), 999)}], steps=1)
    run = streamed._run
    monkeypatch.setattr(
        streamed, "_run", lambda model, batch: run(model, batch) if len(batch["input_ids"]) == 4 else None
    )
    batches = [*text(1), {"input_ids": torch.zeros(1, 4, dtype=torch.int64)}]
    with pytest.raises(DistillError, match="MixtralForCausalLM does not call its layers once each"):
        distill_streamed(tmp_path / "float", uniform(model), batches, steps=2)
    tensors = load_file(tmp_path / "float" / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, tmp_path / "float" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks \['model\.layers\.1\.self_attn\.k_proj\.weight'\]"):
        distill_streamed(tmp_path / "float", uniform(model), text(1), steps=1)
    assert not running()


def test_all_go_through_one_layer_before_the_next():
    order = []

    class Layer(nn.Module):
        def forward(self, x):
            order.append((self.name, int(x), threading.get_ident()))
            return x + 10

    layers = {name: Layer() for name in ("first", "second")}
    for name, layer in layers.items():
        layer.name = name
    outputs = []

    def model(x):
        for layer in layers.values():
            x = layer(x)
        assert not torch.is_grad_enabled()
        outputs.append(int(x))

    gates = Gates(layers)
    passes = [ForwardPass(lambda x=x: model(torch.tensor(x))) for x in (1, 2)]
    for one in passes:
        one.start()
    for name in layers:
        assert [one.waits_at for one in passes] == [name, name]
        for one in passes:
            one.advance()
    main = threading.get_ident()
    assert order == [("first", 1, main), ("first", 2, main), ("second", 11, main), ("second", 12, main)]
    assert outputs == [21, 22]
    assert [one.waits_at for one in passes] == [None, None]
    with torch.no_grad():
        model(torch.tensor(5))  # called from elsewhere, nothing waits
    gates.close()
    for one in (*passes, ForwardPass(lambda: None)):
        one.stop()
