"""The way back from packed to float: the same values, under the names that the family has."""

import pytest
import torch
from safetensors import safe_open

from moe_precision import QuantizationError, allocate, dequantize_model, find_moe_layers, quantize_model
from moe_precision.checkpoints import CheckpointError, load_model
from moe_precision.cli.main import main
from moe_precision.quantize.dequantizing import dequantize_checkpoint
from tests.quantize.test_quantize import mixed_plan
from tests.support.models import PlainMoE, build, logits


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "switch_transformers"])
@pytest.mark.parametrize("non_expert_bits", [None, 8])
def test_a_float_model_of_the_same_values(family, non_expert_bits, tmp_path):
    model = build(family)
    names = {name: tensor.shape for name, tensor in model.state_dict().items()}
    parameters = {name for name, _ in model.named_parameters()}
    implementation = model.get_experts_implementation()
    model.save_pretrained(tmp_path / "float")
    with safe_open(tmp_path / "float" / "model.safetensors", "pt") as file:
        on_disk = set(file.keys())
    quantize_model(model, mixed_plan(model), non_expert_bits=non_expert_bits)
    expected = logits(model)
    restored = dequantize_model(model)
    assert restored is model
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == names
    assert {name for name, _ in model.named_parameters()} == parameters
    assert not {"save_pretrained", "moe_precision_kernels"} & set(vars(model))
    assert model.get_experts_implementation() == implementation
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "again")
    with safe_open(tmp_path / "again" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == on_disk
    again = load_model(tmp_path / "again")
    weights = model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.state_dict().items())
    torch.testing.assert_close(
        logits(again), logits(model), atol=1e-5, rtol=1e-5
    )  # tensors may lie otherwise in memory
    find_moe_layers(again)  # float experts again, which can be planned for and packed
    quantize_model(again, mixed_plan(again))


@pytest.mark.slow
def test_transformers_own_method_and_another_dtype(mixtral, tmp_path):
    quantize_model(mixtral, mixed_plan(mixtral)).save_pretrained(tmp_path / "packed")
    model = load_model(tmp_path / "packed")
    expected = logits(model)
    model.dequantize()
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    mixtral.dequantize()  # after it has been saved
    assert torch.equal(logits(mixtral), logits(model))
    half = dequantize_model(load_model(tmp_path / "packed"), torch.bfloat16)
    assert half.model.layers[0].mlp.experts.gate_up_proj.dtype == torch.bfloat16
    weight = find_moe_layers(model)[0].expert_weights(3)["down_proj"]
    assert torch.equal(find_moe_layers(half)[0].expert_weights(3)["down_proj"], weight.bfloat16())


@pytest.mark.slow
def test_a_users_own_model():
    model = PlainMoE()
    x = torch.randn(7, 32)
    quantize_model(model, allocate(model, method="uniform", average_bits=3, bits=(3,), group_size=32))
    expected = model(x)
    dequantize_model(model)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
    assert type(model.experts[0][0]) is torch.nn.Linear
    with pytest.raises(QuantizationError, match="nothing in this PlainMoE is packed"):
        dequantize_model(model)


@pytest.mark.slow
def test_gradients_reach_the_experts_again(mixtral):
    quantize_model(mixtral, mixed_plan(mixtral))
    dequantize_model(mixtral).train()
    ids = torch.tensor([[3, 4, 5, 6]])
    mixtral(input_ids=ids, labels=ids).loss.backward()
    assert mixtral.model.layers[0].mlp.experts.gate_up_proj.grad.abs().sum() > 0


@pytest.mark.slow
def test_folders(mixtral, tmp_path, capsys):
    quantize_model(mixtral, mixed_plan(mixtral)).save_pretrained(tmp_path / "packed")
    (tmp_path / "packed" / "tokenizer.json").write_text("{}")
    assert main(["dequantize", str(tmp_path / "packed"), str(tmp_path / "float"), "--dtype", "bfloat16"]) == 0
    assert "wrote" in capsys.readouterr().out
    assert (tmp_path / "float" / "tokenizer.json").exists()
    again = load_model(tmp_path / "float")
    assert again.dtype == torch.bfloat16
    assert not getattr(again, "is_quantized", False)
    torch.testing.assert_close(logits(again).float(), logits(mixtral), atol=0.05, rtol=0.05)
    with pytest.raises(CheckpointError, match="was not packed by moe-precision"):
        dequantize_checkpoint(tmp_path / "float", tmp_path / "other")
    with pytest.raises(CheckpointError, match="would replace what is read"):
        dequantize_checkpoint(tmp_path / "packed", tmp_path / "packed")
