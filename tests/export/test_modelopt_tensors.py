"""ModelOpt's checkpoints: NVFP4 and FP8 experts by their tensors; other algorithms are refused by name."""

import json

import pytest
import torch

from moe_precision.checkpoints import CheckpointError
from moe_precision.cli.main import main
from moe_precision.export import plan_of_checkpoint
from tests.export.test_export import plan_of, write_checkpoint

FP8 = torch.float8_e4m3fn


def tensors(out: int, inp: int, bits: int) -> dict:
    """4 bits: two values in a byte and a scale for 16; 8 bits: one scale for the matrix."""
    if bits == 16:
        return {"weight": ((out, inp), torch.bfloat16)}
    if bits == 8:
        return {"weight": ((out, inp), FP8), "weight_scale": ((), torch.float32), "input_scale": ((), torch.float32)}
    return {
        "weight": ((out, inp // 2), torch.uint8),
        "weight_scale": ((out, inp // 16), FP8),
        "weight_scale_2": ((), torch.float32),
        "input_scale": ((), torch.float32),
    }


def mixed():
    """Experts at 4, 8 and 16 bits."""
    return plan_of("mixtral", lambda layer, one, count: [(4, 8, 16)[(e + layer) % 3] for e in range(count)])


@pytest.mark.slow
@pytest.mark.parametrize(
    "stated",
    [
        {"quant_algo": "NVFP4"},
        {"quant_algo": "NVFP4_AWQ"},
        {"quant_algo": "FP8"},
        {
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": {"a": {"quant_algo": "FP8"}, "b": {"quant_algo": "NVFP4"}},
        },
    ],
)
def test_tensors_say_the_bits_whatever_the_config_names(tmp_path, capsys, stated):
    write_checkpoint(tmp_path, mixed(), {"quant_method": "modelopt", **stated}, tensors)
    read = plan_of_checkpoint(tmp_path)
    assert read.diff(mixed()) == []
    assert read.notes["group_sizes"] == [16, 64, 128]  # FP8 has none: all of a row
    assert main(["show", str(tmp_path)]) == 0
    assert "read from a checkpoint of modelopt" in capsys.readouterr().out


def test_a_file_beside_the_config_may_say_it(tmp_path):
    write_checkpoint(tmp_path, mixed(), None, tensors)
    with pytest.raises(CheckpointError, match=r"weight_scale', but its config.json does not say how"):
        plan_of_checkpoint(tmp_path)
    beside = tmp_path / "hf_quant_config.json"
    beside.write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}))
    assert plan_of_checkpoint(tmp_path).diff(mixed()) == []
    for damaged in ("{", "[]", "{}", '{"quantization": 3}'):
        beside.write_text(damaged)
        with pytest.raises(CheckpointError, match=r"hf_quant_config.json' is damaged: .*copy it again"):
            plan_of_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        (
            {"quant_algo": "W4A16_AWQ"},
            "by 'modelopt' with quant_algo='W4A16_AWQ', whose bits cannot be read; known are",
        ),
        ({"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "W4A8_AWQ"}}}, "'W4A8_AWQ'"),
        ({"quantized_layers": {"a": {"quant_algo": "FP8"}}}, "does not state its quant_algo"),
        ({}, "does not state its quant_algo"),
    ],
)
def test_algorithms_that_are_not_known_are_refused_by_name(tmp_path, stated, message):
    write_checkpoint(tmp_path, mixed(), {"quant_method": "modelopt", **stated}, tensors)
    with pytest.raises(CheckpointError, match=message):
        plan_of_checkpoint(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda out, inp: {"weight_scale": ((out, inp // 32), FP8)}, "with FP8 scales for 16 weights"),
        (lambda out, inp: {"weight_scale": ((out, inp // 16), torch.uint8)}, "with FP8 scales for 16 weights"),
        (
            lambda out, inp: {"weight": ((out // 2, inp), torch.uint8)},
            "with FP8 scales for 16 weights",
        ),  # AWQ's packing
        (lambda out, inp: {"weight": ((out, inp), FP8)}, "with one scale, or one for each row"),
        (lambda out, inp: {"weight": ((out, inp), torch.bfloat16)}, "is BF16 "),  # a scale beside a float
        (lambda out, inp: {"weight": ((out, inp), torch.int8)}, "is I8 "),
    ],
)
def test_tensors_of_another_form_are_refused(tmp_path, changed, message):
    suffixes = lambda out, inp, bits: tensors(out, inp, bits) | changed(out, inp)  # noqa: E731
    write_checkpoint(tmp_path, plan_of("mixtral"), {"quant_method": "modelopt", "quant_algo": "NVFP4"}, suffixes)
    with pytest.raises(CheckpointError, match=message):
        plan_of_checkpoint(tmp_path)
