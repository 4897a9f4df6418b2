"""A model that another quantizer holds, and experts that are codes, are refused by name wherever layers are found."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BitsAndBytesConfig, TorchAoConfig

from moe_precision import MoELayerError, PlanQuantizationConfig, allocate, find_moe_layers, quantize_model
from moe_precision.checkpoints import CheckpointError, load_model
from moe_precision.quantize.writer import quantize_checkpoint
from tests.support.models import PlainMoE, auto_class, build
from tests.support.trainers import Module, monitor


def loaded(family, folder, config):
    build(family).save_pretrained(folder)
    return auto_class(family).from_pretrained(folder, quantization_config=config)


def without_a_name(model):
    """The same model as if modules had been replaced by hand: nothing but the weights shows a quantizer."""
    model.is_quantized = False
    del model.config.quantization_config
    return model


def plan_of(family):
    return allocate(build(family), method="uniform", average_bits=4, bits=(4,), group_size=32)


def refused_everywhere(model, plan, message):
    """Finding layers, recording, planning and packing raise, and the last leaves the model as it was."""
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    for call in (
        lambda: find_moe_layers(model),
        lambda: monitor()._start(Module(model), 0),
        lambda: allocate(model, method="uniform", average_bits=4, bits=(4,), group_size=32),
        lambda: plan.check(model),
        lambda: quantize_model(model, plan),
    ):
        with pytest.raises(MoELayerError, match=message):
            call()
    assert before == {name: id(parameter) for name, parameter in model.named_parameters()}


@pytest.mark.slow
def test_codes_of_bitsandbytes_at_8_bits(tmp_path):
    model, plan = (
        loaded("switch_transformers", tmp_path, BitsAndBytesConfig(load_in_8bit=True)),
        plan_of("switch_transformers"),
    )
    expert = model.encoder.block[1].layer[1].mlp.experts.expert_0
    assert expert.wi.weight.dtype == torch.int8  # equal modules of matrices, as float ones
    refused_everywhere(model, plan, r"SwitchTransformers\w+ is quantized by another quantizer \('bitsandbytes'\)")
    refused_everywhere(without_a_name(model), plan, r"weight' of this Switch\w+ is a Int8Params of int8, which another")


def test_float_experts_beside_attention_at_4_bits(tmp_path):
    model, plan = loaded("mixtral", tmp_path, BitsAndBytesConfig(load_in_4bit=True)), plan_of("mixtral")
    assert model.model.layers[0].mlp.experts.gate_up_proj.dtype.is_floating_point
    refused_everywhere(model, plan, r"MixtralForCausalLM is quantized by another quantizer \('bitsandbytes'\)")
    refused_everywhere(model.model, plan, r"MixtralModel is quantized by another quantizer \('bitsandbytes'\)")
    refused_everywhere(
        without_a_name(model), plan, r"q_proj\.weight' of this MixtralForCausalLM is a Params4bit of uint8"
    )


@pytest.mark.slow
def test_tensors_that_show_a_float_dtype_and_hold_codes(tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig

    model = loaded("switch_transformers", tmp_path, TorchAoConfig(Int8WeightOnlyConfig()))
    assert model.encoder.block[1].layer[1].mlp.experts.expert_0.wi.weight.dtype == torch.float32
    refused_everywhere(model, plan_of("switch_transformers"), r"another quantizer \('torchao'\)")
    refused_everywhere(
        without_a_name(model), plan_of("switch_transformers"), r"is a Int8Tensor of float32, which another"
    )


def in_fp8(model):
    """Experts as FP8 modules hold them: codes, and a scale for each block as a 3-D parameter beside them."""
    for layer in model.model.layers:
        experts = layer.mlp.experts
        for name in ("gate_up_proj", "down_proj"):
            codes = experts.get_parameter(name).detach().to(torch.float8_e4m3fn)
            setattr(experts, name, nn.Parameter(codes, requires_grad=False))
            setattr(experts, f"{name}_scale_inv", nn.Parameter(torch.ones(len(codes), 1, 1), requires_grad=False))
    return model


def test_live_fp8():
    model = in_fp8(build("mixtral"))
    refused_everywhere(model, plan_of("mixtral"), r"gate_up_proj' of this \w+ is a Parameter of float8_e4m3fn, which")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_router_of_codes(dtype):
    model = build("mixtral")
    gate = model.model.layers[1].mlp.gate
    gate.weight = nn.Parameter(gate.weight.detach().to(dtype), requires_grad=False)
    refused_everywhere(
        model, plan_of("mixtral"), r"'model\.layers\.1\.mlp\.gate\.weight' of this \w+ is a Parameter of"
    )


def test_a_router_that_is_quantized_after_its_layer_was_found():
    model = build("mixtral")
    layers = find_moe_layers(model)
    gate = model.model.layers[0].mlp.gate
    gate.weight = nn.Parameter(gate.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(MoELayerError, match=r"gate\.weight' holds torch\.int8: it was quantized after"):
        layers[0].row_norms()


def test_a_float_model_whose_config_names_a_quantizer():
    model = build("mixtral")
    model.config.quantization_config = {"quant_method": "fp8"}
    refused_everywhere(
        model, plan_of("mixtral"), r"another quantizer \('fp8'\); if its weights are float, delete config"
    )


@pytest.mark.slow
def test_a_quantized_teacher_beside_a_float_student(tmp_path):
    both = nn.Module()
    both.student, both.teacher = build("mixtral"), loaded("olmoe", tmp_path, BitsAndBytesConfig(load_in_4bit=True))
    with pytest.raises(MoELayerError, match="this OlmoeForCausalLM is quantized by another quantizer"):
        find_moe_layers(both)  # its experts are float, and would be taken for part of the run
    both.teacher = nn.Linear(2, 2)
    both.dense = loaded("switch_transformers", tmp_path / "t", BitsAndBytesConfig(load_in_4bit=True)).encoder.block[0]
    assert len(find_moe_layers(both)) == 2


def test_our_own_packed_experts_beside_float_ones():
    """With a layer whose experts all stay at 16 bits, a packed model was taken for a float one with fewer layers."""
    model = nn.ModuleList([PlainMoE(), PlainMoE()])
    plan = allocate(model, method="uniform", average_bits=4, bits=(4, 16), group_size=32)
    last = list(plan.layers)[-1]
    plan = plan.with_bits({last: {name: [16] * 4 for name in plan.layers[last].projection_bits}})
    quantize_model(model, plan)
    with pytest.raises(MoELayerError, match=r"experts at '0\.experts' are quantized already \(ModuleList\)"):
        find_moe_layers(model)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["experts.3.w2", "gate.weight", "q_proj"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_codes_in_files_that_no_config_speaks_of(victim, dtype, tmp_path):
    model, plan = build("mixtral"), plan_of("mixtral")
    model.save_pretrained(tmp_path / "float")
    file = tmp_path / "float" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if victim in name)
    save_file(tensors | {name: tensors[name].to(dtype)}, file, metadata={"format": "pt"})
    message = rf"'{name}' is stored as (F8_E4M3|I8), which a quantizer writes"
    with pytest.raises(CheckpointError, match=message):
        quantize_checkpoint(tmp_path / "float", plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "float", quantization_config=PlanQuantizationConfig(plan))
    if victim != "q_proj":
        with pytest.raises(CheckpointError, match=message):
            allocate(tmp_path / "float", method="weight_error", average_bits=4, bits=(2, 4), group_size=32)


def test_float_models_are_left_alone():
    model = build("mixtral")
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        assert len(find_moe_layers(copy.deepcopy(model).to(dtype))) == 2
