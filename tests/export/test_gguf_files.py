"""GGUF files that the gguf package writes: the types of tensors say the bits; what is not known is refused."""

import json

import numpy as np
import pytest

from moe_precision.checkpoints import CheckpointError
from moe_precision.cli.main import main
from moe_precision.export.gguf_files import read_gguf
from tests.export.test_export import by_layer, plan_of

gguf = pytest.importorskip("gguf")
TYPES = gguf.GGMLQuantizationType
IN, FF, EXPERTS = 256, 512, 4
Q2, Q4, Q8 = TYPES.Q2_K, TYPES.Q4_K, TYPES.Q8_0


def bank(kind, out: int, inp: int, *, experts: int | None = EXPERTS) -> tuple:
    """Zeros of a type, as the bytes that it takes."""
    leading = () if experts is None else (experts,)
    return kind, np.zeros(gguf.quant_shape_to_byte_shape((*leading, out, inp), kind), np.uint8)


def write(path, tensors: dict, *, architecture: str = "qwen3moe", count: int | None = EXPERTS, parts: int = 0):
    """A file of these tensors and an embedding; ``parts`` is how many tensors a part of a split one has."""
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=parts)
    if count is not None:
        writer.add_expert_count(count)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_tensor("token_embd.weight", np.zeros((2, IN), np.float32))
    for name, (kind, data) in tensors.items():
        if kind is None:
            writer.add_tensor(name, data)
        else:
            writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def layer(block: int, gate, up, down, inp: int = IN, out: int = FF, experts: int = EXPERTS) -> dict:
    return {
        f"blk.{block}.ffn_gate_exps.weight": bank(gate, out, inp, experts=experts),
        f"blk.{block}.ffn_up_exps.weight": bank(up, out, inp, experts=experts),
        f"blk.{block}.ffn_down_exps.weight": bank(down, inp, out, experts=experts),
    }


def test_a_file_of_several_types(tmp_path, capsys):
    path = write(tmp_path / "m.gguf", layer(1, Q2, Q2, Q4) | layer(3, TYPES.IQ2_XS, TYPES.IQ3_S, TYPES.BF16))
    read = read_gguf(path)
    plan = read.plan()
    assert {name: one.projection_bits for name, one in plan.layers.items()} == {
        "blk.1": {"ffn_gate_exps": [2] * 4, "ffn_up_exps": [2] * 4, "ffn_down_exps": [4] * 4},
        "blk.3": {"ffn_gate_exps": [2] * 4, "ffn_up_exps": [3] * 4, "ffn_down_exps": [16] * 4},
    }
    assert plan.layers["blk.1"].shape.projections == {
        "ffn_gate_exps": (FF, IN),
        "ffn_up_exps": (FF, IN),
        "ffn_down_exps": (IN, FF),
    }
    # bytes of a block of 256 weights: q2_k 84, q4_k 144, iq2_xs 74, iq3_s 110; all matrices have the same size
    bits = [8 * size / 256 for size in (84, 84, 144, 74, 110, 512)]
    assert read.stored_bits == pytest.approx(sum(bits) / 6)
    assert read.types == {
        name: pytest.approx(n / 6)
        for name, n in zip(("q2_k", "q4_k", "iq2_xs", "iq3_s", "bf16"), (2, 1, 1, 1, 1), strict=True)
    }
    assert main(["show", str(path)]) == 0
    said = capsys.readouterr().out
    assert "qwen3moe, read from a checkpoint of gguf" in said
    assert "blocks: 256" in said
    assert "its file holds 5.25 bits per expert weight" in said
    assert "33.3% q2_k" in said
    assert main(["show", str(path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["stored_bits"] == document["stored_bits_in_files"] == pytest.approx(5.25)
    assert document["average_bits"] == pytest.approx((2 + 2 + 4 + 2 + 3 + 16) / 6)
    assert main(["show", str(path), "--full"]) == 0
    assert "ffn_down_exps" in capsys.readouterr().out


OTHERS = {"F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64", "Q8_1", "Q8_K"}  # the last two are of activations


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind.name not in OTHERS], ids=lambda kind: kind.name)
def test_every_quantized_type_has_nominal_bits_close_to_those_it_stores(tmp_path, kind):
    read = read_gguf(write(tmp_path / "m.gguf", layer(0, kind, kind, kind)))
    (bits,) = {bits for widths in read.plan().layers["blk.0"].projection_bits.values() for bits in widths}
    block, size = gguf.GGML_QUANT_SIZES[kind]
    assert read.stored_bits == pytest.approx(8 * size / block)
    assert bits <= read.stored_bits < bits + 1.2


def test_joined_matrices_and_single_experts(tmp_path):
    joined = {"blk.0.ffn_gate_up_exps.weight": bank(Q4, 2 * FF, IN), "blk.0.ffn_down_exps.weight": bank(Q8, IN, FF)}
    plan = read_gguf(write(tmp_path / "joined.gguf", joined)).plan()
    assert plan.layers["blk.0"].projection_bits == {"ffn_gate_up_exps": [4] * 4, "ffn_down_exps": [8] * 4}
    single = {}
    for expert, kind in enumerate((Q2, Q4, Q8, Q2)):
        for name, out, inp in (("gate", FF, IN), ("up", FF, IN), ("down", IN, FF)):
            single[f"blk.0.ffn_{name}.{expert}.weight"] = bank(kind, out, inp, experts=None)
    read = read_gguf(write(tmp_path / "single.gguf", single))
    assert read.plan().layers["blk.0"].bits == [2, 4, 8, 2]
    assert read.stored_bits == pytest.approx((2 * 2.625 + 4.5 + 8.5) / 4)
    del single["blk.0.ffn_up.2.weight"]
    with pytest.raises(CheckpointError, match=r"'blk.0.ffn_up_exps' has the experts \[0, 1, 3\], expected 4"):
        read_gguf(write(tmp_path / "lacks.gguf", single))


def test_parts_are_read_together(tmp_path, capsys):
    tensors = layer(0, Q2, Q2, Q4) | layer(1, Q8, Q8, Q8)
    whole = read_gguf(write(tmp_path / "whole.gguf", tensors))
    write(tmp_path / "m.gguf", tensors, parts=3)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert [part.name for part in parts] == [f"m-{n:05}-of-00003.gguf" for n in (1, 2, 3)]
    for part in parts:
        read = read_gguf(part)
        assert read.name == "m.gguf"
        assert read.layers == whole.layers
        assert read.stored_bits == whole.stored_bits
    renamed = tmp_path / "other.gguf"
    renamed.write_bytes(parts[1].read_bytes())
    with pytest.raises(CheckpointError, match=r"is part 2 of 3 by what it holds; .*NAME-00002-of-00003.gguf"):
        read_gguf(renamed)
    parts[2].unlink()
    assert main(["show", str(parts[0])]) == 2
    assert "is one of 3 parts, and 1 are not beside it: m-00003-of-00003.gguf" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"blk.0.ffn_gate.weight": bank(Q4, FF, IN, experts=None)}, "holds no experts: it is of a dense model"),
        (layer(0, TYPES.F16, TYPES.F16, TYPES.F16), "is float: its experts are f16, with no bits to show"),
        (layer(0, TYPES.F32, TYPES.BF16, TYPES.BF16), "is float: its experts are f32, bf16, with no bits"),
        (layer(0, Q4, Q4, Q4, experts=3), r"has the experts \[0, 1, 2\], expected 4"),
        (layer(0, TYPES.I8, Q4, Q4), "is of the type 'I8', whose bits are not known"),
        ({"blk.0.ffn_up_exps.weight": bank(Q4, FF, IN)}, r"has only \['ffn_up_exps'\] of the experts of block 0"),
        ({"blk.0.ffn_wide_exps.weight": bank(Q4, FF, IN)}, "holds experts as 'blk.0.ffn_wide_exps.weight'"),
        (
            {"blk.0.ffn_up_exps.weight": bank(Q4, FF, IN, experts=None)},
            r"is \(256, 512\), expected \(in, out, experts\)",
        ),
    ],
)
def test_what_cannot_be_shown_is_said(tmp_path, tensors, message):
    with pytest.raises(CheckpointError, match=message):
        read_gguf(write(tmp_path / "m.gguf", tensors))


def test_damaged_files(tmp_path, capsys):
    whole = write(tmp_path / "m.gguf", layer(0, Q4, Q4, Q4)).read_bytes()
    for length in (0, 4, 20, 60, 200, len(whole) // 2):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="is truncated or damaged, or newer than the installed gguf package"):
            read_gguf(tmp_path / "cut.gguf")
    (tmp_path / "without-a-suffix").write_bytes(whole)
    assert main(["show", str(tmp_path / "without-a-suffix")]) == 0
    (tmp_path / "other.gguf").write_bytes(b"{} is no GGUF file")
    assert main(["show", str(tmp_path / "other.gguf")]) == 2
    assert "GGUF magic invalid" in capsys.readouterr().err


def test_without_the_package(tmp_path, monkeypatch):
    path = write(tmp_path / "m.gguf", layer(0, Q4, Q4, Q4))
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"pip install 'moe-precision\[gguf\]'"):
        read_gguf(path)


# ---- beside a plan


def mixtral_file(path, up=TYPES.Q4_0):
    """A file for the tests' Mixtral: 8 experts of 128 x 64, layers at 8 and 4 bits."""
    tensors = layer(0, Q8, Q8, Q8, inp=64, out=128, experts=8)
    return write(path, tensors | layer(1, TYPES.Q4_0, up, Q8, inp=64, out=128, experts=8), count=8)


def test_a_difference_to_a_plan_is_told_in_its_names(tmp_path, capsys):
    same = plan_of("mixtral", lambda layer, projection, count: [(8, (4, 8)[projection])[layer]] * count)
    path = mixtral_file(tmp_path / "m.gguf")
    assert read_gguf(path).plan_like(same).diff(same) == []
    by_layer().save(tmp_path / "plan.json")  # 8 and 2 bits in layer 0, 4 and 16 in layer 1
    for pair, line in (
        ([path, tmp_path / "plan.json"], "model.layers.0.mlp expert 0 down_proj: 8 -> 2 bits"),
        ([tmp_path / "plan.json", path], "model.layers.0.mlp expert 0 down_proj: 2 -> 8 bits"),
    ):
        assert main(["show", str(pair[0]), "--diff", str(pair[1])]) == 0
        assert line in capsys.readouterr().out
    assert main(["show", str(path), "--diff", str(path)]) == 0
    assert "the same bits" in capsys.readouterr().out


def test_a_plan_of_another_model(tmp_path):
    plan = by_layer()
    mixed = mixtral_file(tmp_path / "mixed.gguf", up=Q8)
    with pytest.raises(CheckpointError, match="gate and up of block 1 have different bits"):
        read_gguf(mixed).plan_like(plan)
    other = write(tmp_path / "other.gguf", layer(0, Q8, Q8, Q8))
    with pytest.raises(CheckpointError, match=r"is of another model than the plan: 'blk.0.ffn_gate_exps.weight' has 4"):
        read_gguf(other).plan_like(plan)
    shorter = write(tmp_path / "shorter.gguf", layer(0, Q8, Q8, Q8, inp=64, out=128, experts=8), count=8)
    with pytest.raises(CheckpointError, match=r"has no 'blk.1.ffn_gate_exps.weight', layer 'model.layers.1.mlp'"):
        read_gguf(shorter).plan_like(plan)


def test_layers_that_the_plan_lacks_keep_their_names(tmp_path):
    tensors = {}
    for block in range(3):
        tensors |= layer(block, Q8, Q8, Q8, inp=64, out=128, experts=8)
    read = read_gguf(write(tmp_path / "m.gguf", tensors, count=8))
    assert "blk.2: only in the first plan" in read.plan_like(by_layer()).diff(by_layer())
