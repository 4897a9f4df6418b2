"""SavePretrained of a model that a quantized release became float from: what it writes loads with the same weights."""

import json

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import Mxfp4Config, Trainer, TrainingArguments

from moe_precision import allocate, quantize_model
from moe_precision.callbacks import PrecisionAnnealTrainerCallback, RouterNormTrainerCallback, SavePretrained
from moe_precision.checkpoints import Checkpoint, CheckpointError, load_model
from moe_precision.compat import was_dequantized_on_loading
from moe_precision.quantize.writer import quantize_checkpoint
from tests.support.models import auto_class, build, logits
from tests.support.trainers import Module, data, trainer


def _release(folder, tensors, quantization):
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


def gpt_oss(folder):
    """As openai/gpt-oss-20b is stored: blocks of 32 four-bit floats along the input, and a scale for each."""
    torch.manual_seed(0)
    build("gpt_oss").save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inp, out = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, out, inp // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 122, (experts, out, inp // 32), dtype=torch.uint8)
    _release(
        folder, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn", "router", "embed_tokens"]}
    )


def block_fp8(folder):
    """As DeepSeek-V3 and Qwen3-...-FP8 are stored: eight-bit floats, and a scale for each block of 16 x 16."""
    build("qwen3_moe").save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "_proj" in name]:
        weight = tensors[name].float().unflatten(0, (-1, 16)).unflatten(-1, (-1, 16))  # (o, 16, i, 16)
        scale = weight.abs().amax(dim=(1, 3)) / 448
        codes = (weight / scale[:, None, :, None]).flatten(2, 3).flatten(0, 1)
        tensors[name] = codes.to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
    _release(folder, tensors, {**quantization, "modules_to_not_convert": ["lm_head", "gate"]})


@pytest.mark.slow
@pytest.mark.parametrize("release", [gpt_oss, block_fp8])
def test_what_is_saved_loads_with_the_same_weights(release, tmp_path):
    release(tmp_path / "release")
    model = auto_class("").from_pretrained(tmp_path / "release", dtype=torch.float32)
    assert was_dequantized_on_loading(model) == (Version(transformers.__version__) < Version("5.24"))
    module = Module(model)
    module.loss = lambda x: model(input_ids=(x[:, :8].abs() * 20).long()).logits.square().mean()
    module.on_train_batch_end = lambda *args: None
    trainer(tmp_path, SavePretrained("saved"), max_steps=1).fit(module, data(1))
    again = load_model(tmp_path / "saved", dtype=torch.float32)
    assert not Checkpoint(tmp_path / "saved").is_quantized
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert torch.equal(logits(again), logits(model.eval()))
    assert [layer.name for layer in Checkpoint(tmp_path / "saved").layers()]  # which plan and quantize read


def recorder():
    return RouterNormTrainerCallback(method="router_norm", group_size=32)


def annealer():
    return PrecisionAnnealTrainerCallback(method="uniform", average_bits=4, bits=(4,), group_size=32, start=0)


@pytest.mark.slow
@pytest.mark.parametrize("callback", [recorder, annealer])
@pytest.mark.parametrize("release", [gpt_oss, block_fp8])
def test_transformers_trainer_beside_our_callback(release, callback, tmp_path):
    release(tmp_path / "release")
    model = auto_class("").from_pretrained(tmp_path / "release", dtype=torch.float32)
    arguments = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to=[], save_strategy="no")
    ids = list(range(3, 11))
    trained = Trainer(model, arguments, train_dataset=[{"input_ids": ids, "labels": ids}] * 8, callbacks=[callback()])
    trained.train()
    trained.save_model(tmp_path / "saved")
    again = load_model(tmp_path / "saved", dtype=torch.float32).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_a_release_that_cannot_be_quantized_says_how_to_make_it_float(tmp_path):
    gpt_oss(tmp_path / "release")
    advice = r"Mxfp4Config\(dequantize=True\)\), then save_pretrained\(another folder, save_original_format=False"
    with pytest.raises(CheckpointError, match=advice):
        allocate(tmp_path / "release", group_size=32)
    model = auto_class("").from_pretrained(
        tmp_path / "release", quantization_config=Mxfp4Config(dequantize=True), dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "float", save_original_format=False)
    plan = allocate(tmp_path / "float", method="uniform", average_bits=4, bits=(4,), group_size=32)
    with pytest.raises(CheckpointError, match=advice):
        quantize_checkpoint(tmp_path / "release", plan, tmp_path / "out")
    quantize_checkpoint(tmp_path / "float", plan, tmp_path / "out")
    assert torch.equal(logits(load_model(tmp_path / "out")), logits(quantize_model(model, plan)))
