"""What cannot work with packed experts says so, and what can works to the last case."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_precision import PlanQuantizationConfig, QuantizationError, allocate, find_moe_layers, quantize_model
from moe_precision.checkpoints import CheckpointError, load_model
from moe_precision.quantize.writer import quantize_checkpoint
from tests.quantize.test_quantize import mixed_plan
from tests.support.models import build, logits
from tests.support.packed import mixed_projection


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_another_experts_implementation_is_refused_by_name(mixtral, implementation):
    quantize_model(mixtral, mixed_plan(mixtral))
    expected = logits(mixtral)
    mixtral.set_experts_implementation(implementation)
    with pytest.raises(RuntimeError, match=f"only, not with '{implementation}': call model.set_experts_implementation"):
        logits(mixtral)
    mixtral.set_experts_implementation("moe_precision")
    assert torch.equal(logits(mixtral), expected)


@pytest.mark.slow
def test_a_packed_checkpoint_runs_whatever_implementation_is_asked_for(mixtral, tmp_path):
    quantize_model(mixtral, mixed_plan(mixtral)).save_pretrained(tmp_path / "packed")
    again = type(mixtral).from_pretrained(tmp_path / "packed", experts_implementation="eager")
    assert torch.equal(logits(again), logits(mixtral))


@pytest.mark.slow
@pytest.mark.parametrize("device_map", [{"": "disk"}, {"": "cpu", "model.layers.1": "disk"}])
def test_disk_is_refused_before_anything_is_read(mixtral, tmp_path, device_map):
    plan = mixed_plan(mixtral)
    mixtral.save_pretrained(tmp_path / "float")
    quantize_model(mixtral, plan).save_pretrained(tmp_path / "packed")
    (tmp_path / "packed" / "model.safetensors").write_bytes(b"not read")
    (tmp_path / "float" / "model.safetensors").write_bytes(b"not read")
    for folder, config in (("packed", None), ("float", PlanQuantizationConfig(plan))):
        with pytest.raises(QuantizationError, match="puts parts of the model on 'disk'"):
            type(mixtral).from_pretrained(
                tmp_path / folder,
                device_map=device_map,
                offload_folder=tmp_path / "offload",
                **({} if config is None else {"quantization_config": config}),
            )


@pytest.mark.slow
def test_a_device_map_that_turns_out_to_need_the_disk(mixtral, tmp_path):
    quantize_model(mixtral, mixed_plan(mixtral)).save_pretrained(tmp_path / "packed")
    with pytest.raises(QuantizationError, match="puts parts of the model on 'disk'"):
        type(mixtral).from_pretrained(
            tmp_path / "packed", device_map="auto", max_memory={"cpu": 200_000}, offload_folder=tmp_path / "offload"
        )


@pytest.mark.slow
def test_weights_that_are_pickled_or_without_an_index(mixtral, tmp_path):
    plan = allocate(mixtral, method="uniform", average_bits=2, bits=(2,), group_size=64)
    folder = tmp_path / "float"
    mixtral.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"which name its weights; it has model-00001-of-00002.safetensors"):
        quantize_checkpoint(folder, plan, tmp_path / "out")
    (folder / "model-00001-of-00002.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    for call in (lambda: quantize_checkpoint(folder, plan, tmp_path / "out"), lambda: load_model(folder)):
        with pytest.raises(
            CheckpointError, match=r"as 'pytorch_model.bin', and only safetensors are read: load it once"
        ):
            call()
    type(mixtral).from_pretrained(folder).save_pretrained(tmp_path / "written")  # as the message says
    quantize_checkpoint(tmp_path / "written", plan, tmp_path / "out")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantize_checkpoint(folder, plan, tmp_path / "out")  # transformers takes the safetensors where there are both


@pytest.mark.parametrize("rows", [0, 3])
def test_rows_of_no_expert_leave_gradients_whole(rows):
    """No token, or tokens that belong to no expert here: the result is 0 and its gradient too, not missing."""
    projection, x, _, _ = mixed_projection()
    x = x[:rows].requires_grad_()
    y = projection(x, torch.zeros(6, dtype=torch.int64))
    assert y.shape == (rows, 48)
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros(rows, 64))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 4])
def test_no_rows_through_a_packed_linear(bits):
    model = build("switch_transformers")
    quantize_model(model, allocate(model, method="uniform", average_bits=bits, bits=(bits,), group_size=32))
    expert = find_moe_expert(model)
    x = torch.zeros(0, 64, requires_grad=True)
    expert(x).sum().backward()
    assert x.grad.shape == (0, 64)
    with torch.no_grad():
        assert expert(x).shape == (0, 64)


def find_moe_expert(model):
    """The first expert of a Switch Transformer."""
    return next(module for name, module in model.named_modules() if name.endswith("experts.expert_0"))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_no_tokens_through_packed_experts(family):
    model = build(family)
    quantize_model(model, mixed_plan(model))
    experts = find_moe_layers_of(model)
    x = torch.zeros(0, 64, requires_grad=True)
    result = experts(x, torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    result.sum().backward()
    assert x.grad.shape == (0, 64)


def find_moe_layers_of(model):
    """The first packed experts module."""
    return next(
        module for module in model.modules() if isinstance(getattr(module, "packed", None), torch.nn.ModuleDict)
    )


def test_gradients_are_those_of_float_weights_beside_rows_of_no_expert():
    projection, x, starts, _ = mixed_projection()
    x = x.requires_grad_()
    projection(x, starts).sum().backward()
    expected = torch.zeros_like(x)
    for expert in range(5):
        first, last = starts[expert], starts[expert + 1]
        expected[first:last] = projection.weight(expert).sum(0)
    torch.testing.assert_close(x.grad, expected)
    infinite = torch.full((2, 64), torch.inf, requires_grad=True)
    projection(infinite, torch.zeros(6, dtype=torch.int64)).sum().backward()
    assert torch.equal(infinite.grad, torch.zeros(2, 64))


def test_nothing_is_found_in_packed_experts(mixtral):
    quantize_model(mixtral, mixed_plan(mixtral))
    with pytest.raises(ValueError, match="quantized already"):
        find_moe_layers(mixtral)
