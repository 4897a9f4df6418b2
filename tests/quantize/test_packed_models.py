"""Whole models on several kernels: what runs where, saving, copying, generating, compiling."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from moe_precision import allocate, find_moe_layers, quantize_model
from moe_precision.checkpoints.checkpoint import load_model
from moe_precision.quantize.kernels.int4 import Int4
from moe_precision.quantize.kernels.native import Native
from moe_precision.quantize.matrices import PackedMatrices
from tests.support.models import build, logits
from tests.support.packed import use


@pytest.fixture
def packed(any_cpu, monkeypatch, tmp_path):
    """A Mixtral in bfloat16 on two kernels."""
    use(monkeypatch, Int4, Native)
    build("mixtral").save_pretrained(tmp_path / "float")
    model = load_model(tmp_path / "float", dtype=torch.bfloat16)
    plan = allocate(model, method="uniform", average_bits=4, bits=(4,), group_size=64)
    for layer in plan.layers.values():
        for bits in layer.projection_bits.values():
            bits[:4] = [2, 2, 16, 2]
    return quantize_model(model, plan)


def test_the_model_says_what_runs_where(packed):
    expected = {
        "bits_2": "C++, 2 bits, 3 matrices of 256 x 64",
        "bits_4": "torch int4, 4 bits, 4 matrices of 256 x 64",
        "bits_16": "float, torch.bfloat16, 1 matrices of 256 x 64",
    }
    said = packed.moe_precision_kernels()
    prefix = "model.layers.0.mlp.experts.packed.gate_up_proj."
    assert {name: said[prefix + name] for name in expected} == expected
    logits(packed)
    assert packed.moe_precision_kernels() == said
    assert {type(m.kernel) for m in packed.modules() if isinstance(m, PackedMatrices)} == {Native, Int4}


@pytest.mark.slow
def test_a_second_save_after_a_forward(packed, tmp_path):
    packed.save_pretrained(tmp_path / "first")
    expected = logits(packed)
    packed.save_pretrained(tmp_path / "second")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())
    assert torch.equal(logits(packed), expected)
    assert torch.equal(logits(type(packed).from_pretrained(tmp_path / "second")), expected)


@pytest.mark.slow
def test_what_is_given_to_a_save_is_written(packed, tmp_path):
    """transformers drops ``state_dict=`` of a quantized model; trainers gather it under FSDP and hand it over."""
    name = "model.norm.weight"
    changed = packed.state_dict() | {name: torch.full_like(packed.get_parameter(name), 2)}
    packed.save_pretrained(tmp_path / "given", state_dict=changed)
    packed.save_pretrained(tmp_path / "own")
    assert (load_model(tmp_path / "given").get_parameter(name) == 2).all()  # and its checksum is right
    assert torch.equal(load_model(tmp_path / "own").get_parameter(name), packed.get_parameter(name))


@pytest.mark.slow
def test_a_copy_saves_its_own_weights(packed, tmp_path):
    for number, again in enumerate((copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)))):
        again.model.norm.weight.data.fill_(2)
        again.save_pretrained(tmp_path / str(number))
        assert (load_model(tmp_path / str(number)).model.norm.weight == 2).all()
    assert not (packed.model.norm.weight == 2).any()


@pytest.mark.slow
def test_copies_pickles_and_moves(packed):
    expected = logits(packed)
    for again in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(logits(again), expected)
        assert again.moe_precision_kernels() == packed.moe_precision_kernels()
        assert again.moe_precision_kernels.args[0] is again
    assert torch.equal(logits(packed.to("cpu")), expected)
    nn.Module.float(packed)
    assert all(m.ends.dtype == torch.float16 for m in packed.modules() if isinstance(m, PackedMatrices))
    assert (logits(packed) - expected).norm() / expected.norm() < 0.02


def test_generating(packed):
    assert packed.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False).shape[1] > 3


@pytest.mark.thorough
def test_the_rest_of_the_model_can_be_compiled(packed):
    """Attention and routers are in compiled graphs; packed experts are not, and stay with their kernels."""
    expected, kernels = logits(packed), packed.moe_precision_kernels()
    called = []

    def backend(graph, inputs):
        called.extend(getattr(node.target, "__name__", node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(packed, backend=backend)
    assert (logits(compiled) - expected).norm() / expected.norm() < 0.02
    assert {"scaled_dot_product_attention", "topk"} <= set(called)
    assert not {"searchsorted", "index_add_", "index_copy_"} & set(called)
    assert packed.moe_precision_kernels() == kernels
    assert {type(m.kernel) for m in packed.modules() if isinstance(m, PackedMatrices)} == {Native, Int4}


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_experts_that_are_not_here(dtype):
    """Indices below 0 or from num_experts on belong to another process: they add nothing, whatever their weight."""
    model = build("gpt_oss")  # its experts have biases
    plan = allocate(model, method="uniform", average_bits=4, bits=(4,), group_size=32)
    experts = find_moe_layers(model)[0].container()
    quantize_model(model, plan)
    x, weights = torch.randn(3, 64), torch.rand(3, 2)
    index = torch.tensor([[0, 1], [2, 3], [4, 5]])
    there = torch.tensor([[True, False], [True, True], [False, False]])
    with torch.no_grad():
        for elsewhere in (-1, -7, experts.num_experts, experts.num_experts + 3):
            found = experts(x, index.masked_fill(~there, elsewhere).to(dtype), weights)
            torch.testing.assert_close(found, experts(x, index, weights * there), atol=1e-6, rtol=1e-5)


def test_device_map(packed, tmp_path):
    packed.save_pretrained(tmp_path / "packed")
    again = type(packed).from_pretrained(tmp_path / "packed", device_map="cpu")
    assert torch.equal(logits(again), logits(packed))
