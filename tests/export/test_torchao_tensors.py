"""torchao's checkpoints: each tensor says its class in the metadata of its file; fused experts stay float."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moe_precision.checkpoints import Checkpoint, CheckpointError
from moe_precision.cli.main import main
from moe_precision.export import plan_of_checkpoint
from tests.support.models import build

CONFIG = {"quant_method": "torchao", "quant_type": {"default": {"_type": "IntxWeightOnlyConfig", "_version": 2}}}


def dtype(name: str) -> dict:
    return {"_type": "torch.dtype", "_data": name}


def intx(bits: int, group: int = 32) -> tuple:
    """Codes in bytes; only the metadata has their width."""
    data = {"target_dtype": dtype(f"int{bits}"), "block_size": [1, group]}
    return "IntxUnpackedToInt8Tensor", data, torch.int8, 1


def write(folder, of_expert, family: str = "switch_transformers") -> None:
    """A checkpoint whose experts are ``of_expert(index)``: a class, its attributes, dtype of codes, weights in one."""
    build(family).save_pretrained(folder)
    tensors, metadata = {}, {"format": "pt"}
    for name, tensor in load_file(folder / "model.safetensors").items():
        found = of_expert(int(name.partition("expert_")[2].partition(".")[0])) if "expert_" in name else None
        if found is None:
            tensors[name] = tensor
            metadata[name] = json.dumps({"_type": "Tensor"})
            continue
        kind, data, of_codes, together = found
        out, inp = tensor.shape
        parts = f"{name.removesuffix('.weight')}._weight_"
        tensors[f"{parts}qdata"] = torch.zeros(out, inp // together, dtype=of_codes)
        tensors[f"{parts}scale"] = torch.zeros(out, 1)
        metadata[name] = json.dumps({"_type": kind, "_data": data, "_tensor_data_names": ["qdata", "scale"]})
    save_file(tensors, folder / "model.safetensors", metadata=metadata)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | {"quantization_config": CONFIG}))


@pytest.mark.slow
def test_every_expert_has_the_bits_of_its_tensors(tmp_path, capsys):
    group = {"block_size": [1, 64]}
    experts = [
        intx(2),
        intx(3),
        None,
        ("Int8Tensor", group, torch.int8, 1),
        ("Float8Tensor", group, torch.float8_e4m3fn, 1),
        ("Int4Tensor", group, torch.uint8, 2),
        ("Int4PlainInt32Tensor", group, torch.int32, 8),
        ("NVFP4Tensor", {"block_size": 16}, torch.uint8, 2),
    ]
    write(tmp_path, lambda expert: experts[expert])
    plan = plan_of_checkpoint(tmp_path)
    assert [layer.bits for layer in plan.layers.values()] == [[2, 3, 16, 8, 8, 4, 4, 4]] * 2
    assert plan.notes["group_sizes"] == [16, 32, 64]
    assert main(["show", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "read from a checkpoint of torchao" in said
    assert "23f88444" in said


def test_fused_experts_that_torchao_skipped_are_float_whatever_the_config_says(tmp_path, capsys):
    write(tmp_path, lambda expert: None, "mixtral")
    plan = plan_of_checkpoint(tmp_path)
    assert [layer.bits for layer in plan.layers.values()] == [[16] * 8] * 2
    assert main(["show", str(tmp_path)]) == 0
    assert "100.0% as they are" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("of_expert", "message"),
    [
        (
            ("MXTensor", {"block_size": 32}, torch.uint8, 2),
            "is a MXTensor of torchao .*whose bits cannot be read; known",
        ),
        (("IntxUnpackedToInt8Tensor", {"target_dtype": dtype("int16"), "block_size": [1, 32]}, torch.int8, 1), "int16"),
        (("IntxUnpackedToInt8Tensor", {"target_dtype": None, "block_size": [1, 32]}, torch.int8, 1), "None"),
        (("Int4Tensor", {"block_size": [1, 32]}, torch.uint8, 1), "expected 4096 bytes for 4 bits"),
        (("Int8Tensor", {"block_size": [1, 48]}, torch.int8, 1), "in groups of 48, .*groups that divide 64"),
        (
            ("Int8Tensor", {}, torch.int8, 1),
            "is a tensor of torchao, but the file's metadata says .*which cannot be read",
        ),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path, of_expert, message):
    write(tmp_path, lambda expert: of_expert)
    with pytest.raises(CheckpointError, match=message):
        plan_of_checkpoint(tmp_path)


@pytest.mark.slow
def test_a_file_that_lost_its_metadata(tmp_path):
    write(tmp_path, lambda expert: intx(4))
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"metadata says None of it.*load the checkpoint with from_pretrained, and"
    ):
        plan_of_checkpoint(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["switch_transformers", "mixtral"])
def test_what_torchao_itself_writes(tmp_path, family):
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    build(family).save_pretrained(tmp_path / "float")
    config = TorchAoConfig(quantization.IntxWeightOnlyConfig(torch.int3, quantization.PerGroup(32)))
    with Checkpoint(tmp_path / "float") as checkpoint:
        model = checkpoint.load(quantization_config=config, dtype="bfloat16", device_map="cpu")
    model.save_pretrained(tmp_path / "quantized")
    with safe_open(tmp_path / "quantized" / "model.safetensors", "pt") as opened:
        codes = [opened.get_tensor(name) for name in opened.keys() if name.endswith("._weight_qdata")]  # noqa: SIM118
    assert max(int(one.max()) for one in codes) == 3  # attention is quantized in both
    plan = plan_of_checkpoint(tmp_path / "quantized")
    bits = 3 if family == "switch_transformers" else 16
    assert {width for layer in plan.layers.values() for width in layer.bits} == {bits}
    assert plan.notes["group_sizes"] == ([32] if bits == 3 else [])
