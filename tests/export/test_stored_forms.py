"""Forms of other tools' checkpoints: the config says which, the shapes say the bits; what is not known is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_precision.checkpoints import Checkpoint, CheckpointError
from moe_precision.cli.main import main
from moe_precision.export import export, plan_of_checkpoint
from moe_precision.quantize.writer import quantize_checkpoint
from tests.export.test_export import by_expert, by_layer, compressed, gptq, plan_of, write_checkpoint
from tests.support.models import build


def awq(out: int, inp: int, bits: int) -> dict:
    """Packed along the outputs: ``(in, out * bits / 32)``."""
    if bits == 16:
        return {"weight": ((out, inp), torch.bfloat16)}
    return {"qweight": ((inp, out * bits // 32), torch.int32), "scales": ((inp // 32, out), torch.float16)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantization", "suffixes"),
    [
        ({"quant_method": "gptq", "checkpoint_format": "gptq"}, gptq),
        ({"quant_method": "gptq", "checkpoint_format": "gptq_v2"}, gptq),
        ({"quant_method": "gptq", "checkpoint_format": "gptq_p"}, gptq),
        ({"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}, gptq),
        ({"quant_method": "auto-round", "packing_format": "auto_round"}, gptq),
        ({"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"}, awq),
        ({"quant_method": "awq", "version": "GEMM"}, awq),
        ({"quant_method": "awq", "checkpoint_format": "gemm"}, awq),
    ],
)
def test_the_config_says_the_form(tmp_path, quantization, suffixes):
    plan = by_expert()
    write_checkpoint(tmp_path, plan, quantization, suffixes)
    read = plan_of_checkpoint(tmp_path)
    assert read.diff(plan) == []
    assert read.notes["group_sizes"] == [32]


def fp4(group: int):
    """Two values in a byte, and a byte for the scale of each group."""

    def tensors(out: int, inp: int, bits: int) -> dict:
        if bits == 16:
            return {"weight": ((out, inp), torch.bfloat16)}
        return {
            "weight_packed": ((out, inp // 2), torch.uint8),
            "weight_scale": ((out, inp // group), torch.float8_e4m3fn if group == 16 else torch.uint8),
        }

    return tensors


@pytest.mark.parametrize(("form", "group"), [("nvfp4-pack-quantized", 16), ("mxfp4-pack-quantized", 32)])
def test_experts_in_fp4_have_four_bits(tmp_path, form, group):
    plan = plan_of("mixtral", lambda layer, one, count: [(4, 16)[(e + layer) % 2] for e in range(count)])
    weights = {"num_bits": 4, "type": "float", "group_size": group}
    groups = {"config_groups": {"a": {"weights": weights, "format": form}}, "format": form}
    write_checkpoint(tmp_path, plan, {"quant_method": "compressed-tensors", **groups}, fp4(group))
    read = plan_of_checkpoint(tmp_path)
    assert read.diff(plan) == []
    assert read.notes["group_sizes"] == [group]


def test_bytes_in_groups_of_another_size_are_not_fp4(tmp_path):
    quantization = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
    write_checkpoint(tmp_path, plan_of("mixtral"), quantization, fp4(64))
    with pytest.raises(CheckpointError, match=r"weight_packed' is U8 .*with scales for 16 or 32 weights"):
        plan_of_checkpoint(tmp_path)


def test_one_form_is_not_read_as_another(tmp_path):
    write_checkpoint(tmp_path, by_expert(), {"quant_method": "gptq", "checkpoint_format": "gptq"}, awq)
    with pytest.raises(CheckpointError, match="this form of a quantized weight cannot be read"):
        plan_of_checkpoint(tmp_path)


GROUP = {"weights": {"num_bits": 4, "type": "int"}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (
            {"quant_method": "gptq", "checkpoint_format": "marlin"},
            "checkpoint_format='marlin'.*known are gptq, gptq_v2",
        ),
        ({"quant_method": "auto-round", "packing_format": "auto_round:fp8"}, "packing_format='auto_round:fp8'"),
        ({"quant_method": "awq", "version": "gemv"}, "version='gemv'"),
        ({"quant_method": "compressed-tensors", "format": "mxfp8-quantized"}, "format='mxfp8-quantized'"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "mixed-precision",
                "config_groups": {"a": GROUP, "b": {**GROUP, "format": "float-quantized"}},
            },
            "format='float-quantized'",
        ),
        ({"quant_method": "mxfp4"}, "was quantized by 'mxfp4'; supported are"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "was quantized by 'fp8'; supported are"),
        ({"quant_method": "modelopt"}, "was quantized by 'modelopt'"),
    ],
)
def test_forms_that_are_not_known_are_refused_by_name(tmp_path, capsys, quantization, message):
    write_checkpoint(tmp_path, plan_of("mixtral"), quantization, compressed)
    with pytest.raises(CheckpointError, match=message):
        plan_of_checkpoint(tmp_path)
    assert main(["show", str(tmp_path)]) == 2


def _mlx_folder(folder, plan, quantization):
    """What mlx-lm writes: all experts of a layer in one matrix of words, and no ``quant_method``."""
    config = export(plan, "mlx").config
    model = build("mixtral")
    model.save_pretrained(folder)
    tensors = {k: v for k, v in load_file(folder / "model.safetensors").items() if ".experts." not in k}
    for path, of_one in config.items():
        if "switch_mlp" not in path:
            continue
        out, inp = (64, 128) if path.endswith("down_proj") else (128, 64)
        if of_one is False:
            tensors[f"{path}.weight"] = torch.zeros(8, out, inp, dtype=torch.bfloat16)
            continue
        words = inp * of_one["bits"] // 32
        tensors[f"{path}.weight"] = torch.zeros(8, out, words, dtype=torch.uint32)
        tensors[f"{path}.scales"] = torch.zeros(8, out, inp // 32, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "mlx"})
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | {"quantization": quantization}))


def test_an_mlx_folder(tmp_path, capsys):
    plan = by_layer()
    _mlx_folder(tmp_path, plan, {"group_size": 32, "bits": 4})
    read = plan_of_checkpoint(tmp_path)
    assert read.diff(plan) == []
    assert read.method == "mlx"
    assert main(["show", str(tmp_path)]) == 0
    assert "its files hold" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="is quantized already"):
        quantize_checkpoint(tmp_path, plan, tmp_path.with_name("out"))


def test_an_mlx_folder_of_another_mode(tmp_path):
    _mlx_folder(tmp_path, by_layer(), {"group_size": 32, "bits": 4, "mode": "mxfp4"})
    with pytest.raises(CheckpointError, match="by 'mlx' with mode='mxfp4'"):
        plan_of_checkpoint(tmp_path)


def test_packed_tensors_without_a_word_in_the_config(tmp_path):
    write_checkpoint(tmp_path, by_expert(), None, gptq)
    with pytest.raises(CheckpointError, match=r"qweight', but its config.json does not say how"):
        plan_of_checkpoint(tmp_path)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("part", [(), ("text_config",), ("thinker_config", "text_config")])
def test_what_a_config_says_at_any_depth(tmp_path, key, part):
    build("mixtral").save_pretrained(tmp_path)
    config = {key: {"quant_method": "fp8"}}
    for name in reversed(part):
        config = {name: config}
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(written | config))
    assert Checkpoint(tmp_path).quantization == {"quant_method": "fp8"}
    assert Checkpoint(tmp_path).is_quantized


# ---- what an export warns of


@pytest.mark.parametrize("to", ["llm-compressor", "mlx"])
def test_one_bit_is_not_exported_where_it_stores_zeros(to):
    found = export(plan_of("mixtral", lambda layer, projection, count: [(1, 3)[layer]] * count), to)
    assert [layer.bits[0] for layer in found.plan.layers.values()] == [2, 3]
    assert "no 1-bit format for 16 expert matrices: rounded up to 2 bits" in found.notes[0]


def test_widths_that_change_how_gptqmodel_stores_all_others_are_warned_of():
    odd = export(plan_of("mixtral", lambda layer, projection, count: [4, 6] * (count // 2)), "gptqmodel")
    assert any("matrices at 6 bits make GPTQModel store the whole checkpoint as gptq_p" in note for note in odd.notes)
    assert not any("gptq_p" in note for note in export(by_expert(), "gptqmodel").notes)
    engine = export(plan_of("mixtral", lambda layer, projection, count: [6] * count), "gptqmodel", "vllm")
    assert not any("gptq_p" in note for note in engine.notes)  # rounded up to 8


def test_what_transformers_cannot_load_is_said():
    asymmetric = export(plan_of("mixtral"), "llm-compressor")
    assert any("cannot load these experts, because they are asymmetric" in note for note in asymmetric.notes)
    widths = plan_of("mixtral", lambda layer, projection, count: [(4, 8)[layer]] * count)
    mixed = export(widths, "llm-compressor", "vllm")
    assert any("because they are of several widths" in note for note in mixed.notes)
    assert not any("cannot load" in note for note in export(plan_of("mixtral"), "llm-compressor", "vllm").notes)


def test_keys_that_mlx_lm_needs_are_named():
    (note,) = [note for note in export(plan_of("qwen3_moe"), "mlx").notes if "config.json" in note]
    assert "num_experts, head_dim, rope_theta" in note
