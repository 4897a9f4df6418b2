"""Plans as other quantizers' configs, against golden files and the names that transformers writes, and the way back."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from moe_precision import PlanError, PrecisionPlan, allocate, quantize_model
from moe_precision.checkpoints.headers import CheckpointError
from moe_precision.cli.main import main
from moe_precision.export import TARGETS, ExportError, export, plan_of_checkpoint
from moe_precision.export.gguf import gguf_type
from moe_precision.export.mlx_names import mlx_module
from moe_precision.export.names import all_but_experts, all_places, gguf_tensor, rules
from tests.support.models import CONFIGS, PlainMoE, build, with_bits

GOLDEN = Path(__file__).parent / "golden"
DECODERS = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss")


def plan_of(family: str, bits=lambda layer, projection, count: [4] * count) -> PrecisionPlan:
    return with_bits(allocate(build(family), method="uniform", average_bits=4, bits=(4,), group_size=32), bits)


def by_expert(family: str = "mixtral") -> PrecisionPlan:
    """Experts at 2, 3, 4 and 16 bits, shifted by one from layer to layer, and for the second matrix of layer 1."""
    widths = (2, 3, 4, 16)

    def bits(layer: int, projection: int, count: int) -> list[int]:
        return [widths[(e + layer + layer * projection) % 4] for e in range(count)]

    return plan_of(family, bits)


def by_expert_alone(widths, family: str = "mixtral") -> PrecisionPlan:
    """Experts at four widths, shifted by one from layer to layer, all matrices of one alike."""
    return plan_of(family, lambda layer, projection, count: [widths[(e + layer) % 4] for e in range(count)])


def by_layer(family: str = "mixtral") -> PrecisionPlan:
    return plan_of(family, lambda layer, projection, count: [((8, 2), (4, 16))[layer][projection]] * count)


@pytest.mark.parametrize(
    ("to", "make", "engine"),
    [
        ("autoround", by_expert, None),
        ("gptqmodel", by_expert, None),
        ("llm-compressor", by_expert, None),
        ("modelopt", by_expert, None),
        ("gguf", by_layer, None),
        ("mlx", by_layer, None),
        ("torchao", lambda: by_expert("switch_transformers"), None),
        ("exl3", by_expert, None),
        ("fq-policy", lambda: by_expert_alone((2, 3, 4, 8)), None),
        ("hybrid-bit-map", lambda: by_expert_alone((2, 3, 4, 3)), None),
        ("dynquant", by_layer, None),
        ("gptqmodel", lambda: plan_of("mixtral"), "vllm"),
        ("llm-compressor", lambda: plan_of("mixtral"), "sglang"),
    ],
)
def test_text_is_that_of_the_golden_file(to, make, engine):
    found = export(make(), to, engine)
    name = f"{to}{'' if engine is None else f'.{engine}'}.txt"
    assert found.text == (GOLDEN / name).read_text()
    if to != "gguf":
        assert yaml.safe_load(found.text) == found.config  # JSON is YAML


def test_maps_list_every_expert_under_the_number_of_its_layer():
    policy = export(by_expert_alone((2, 3, 4, 8)), "fq-policy")
    assert policy.config["bits_per_expert"] == {"0": [2, 3, 4, 8] * 2, "1": [3, 4, 8, 2] * 2}
    assert any("takes 3 and 4 bits alone" in note for note in policy.notes)
    tiers = export(by_expert_alone((2, 3, 4, 3)), "hybrid-bit-map")
    assert tiers.config["hybrid_bit_map"] == {"0": [3, 3, 4, 3] * 2, "1": [3, 4, 3, 3] * 2}  # 2 bits are rounded up
    assert "hybrid_bit_map has no 2-bit format for 8 expert matrices: rounded up to 3 bits" in tiers.notes


def test_a_recipe_names_the_matrices_of_the_hub_and_leaves_others():
    found = export(by_expert(), "exl3")
    tensors = dict(found.config["tensors"])
    assert tensors.pop("*") == 16
    assert next(iter(found.config["tensors"])) == "*"  # later entries count
    assert len(tensors) == 2 * 8 * 3
    assert tensors["model.layers.1.block_sparse_moe.experts.0.w1"] == 3
    assert tensors["model.layers.1.block_sparse_moe.experts.0.w2"] == 4
    assert any("at one bitrate" in note for note in found.notes)
    assert not any("at one bitrate" in note for note in export(by_layer(), "exl3").notes)


def test_dynquants_map_names_parameters_and_modules():
    (bits,) = (one["bits"] for one in export(by_layer(), "dynquant").config["maps"].values())
    experts = [f"model.layers.{number}.mlp.experts" for number in (0, 1)]
    assert bits == {f"{experts[0]}.gate_up_proj": 8, f"{experts[0]}.down_proj": 2, f"{experts[1]}.gate_up_proj": 4}
    modules = export(by_expert("switch_transformers"), "dynquant")
    (bits,) = (one["bits"] for one in modules.config["maps"].values())
    assert [bits.get(f"encoder.block.1.layer.1.mlp.experts.expert_{e}.wi") for e in range(4)] == [2, 3, 4, None]
    rounded = export(plan_of("mixtral", lambda layer, one, count: [1 + 4 * layer] * count), "dynquant")
    assert {layer.bits[0] for layer in rounded.plan.layers.values()} == {2, 8}


@pytest.mark.parametrize(
    ("to", "make", "message"),
    [
        ("dynquant", lambda: replace(by_layer(), group_size=16), "groups of a multiple of 32, the plan has 16"),
        ("fq-policy", by_expert, "leaves some at 16"),
        (
            "fq-policy",
            lambda: plan_of("mixtral", lambda layer, one, count: [2 + one] * count),
            "projections of experts",
        ),
        (
            "hybrid-bit-map",
            lambda: by_expert_alone((3, 4, 5, 8)),
            "tiers of 3 and 4 bits, and .* make it with --bits 3 4",
        ),
        ("hybrid-bit-map", lambda: plan_of("switch_transformers"), "is not a block of a decoder-only model"),
        ("exl3", lambda: plan_of("gpt_oss"), "all experts of layer .* in one tensor"),
    ],
)
def test_maps_that_a_plan_does_not_fit(to, make, message):
    with pytest.raises(ExportError, match=message):
        export(make(), to)


@pytest.mark.parametrize("family", [*DECODERS, "switch_transformers", "nllb-moe", "qwen2_moe"])
def test_hub_names_are_what_transformers_saves(family, tmp_path):
    model = build(family)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors").keys()
    plan = allocate(model, method="uniform", average_bits=4, bits=(4,), group_size=32)
    named = set()
    for place in all_places(plan):
        for expert in range(plan.layers[place.layer].shape.num_experts):
            (name,) = {name for name in place.on_disk(expert) if f"{name}.weight" in saved or name in saved}
            named.add(name if name in saved else f"{name}.weight")
    experts = {name for name in saved if re.search(r"\bexperts\.", name) and not name.endswith("bias")}
    assert named == experts


@pytest.mark.parametrize("family", DECODERS)
def test_names_in_gguf_and_mlx(family):
    plan = plan_of(family)
    first = 1 if family == "deepseek_v3" else 0
    block = {"mixtral": "block_sparse_moe.switch_mlp", "gpt_oss": "mlp.experts"}.get(family, "mlp.switch_mlp")
    gate, up, down = list(all_places(plan))[:3]
    assert [gguf_tensor(place) for place in (gate, up, down)] == [
        f"blk.{first}.ffn_gate_exps",
        f"blk.{first}.ffn_up_exps",
        f"blk.{first}.ffn_down_exps",
    ]
    assert mlx_module(down, family) == f"model.layers.{first}.{block}.down_proj"
    assert gate.module_of(7) == f"model.layers.{first}.mlp.experts.7.gate_proj"


@pytest.mark.parametrize("family", ["mixtral", "switch_transformers"])
def test_rules_match_each_matrix_exactly_once_with_its_bits(family):
    plan = by_expert(family)
    expressions = [(re.compile(rule.modules[0]), rule.bits) for rule in rules(plan)]
    others = re.compile(all_but_experts(plan))
    for place in all_places(plan):
        for expert, bits in enumerate(plan.layers[place.layer].projection_bits[place.projection]):
            name = place.module_of(expert)
            assert [width for expression, width in expressions if expression.match(name)] == [bits]
            assert not others.match(name)
            assert not others.match(name.split(".", 3)[3])  # as a tool names it inside a block
    if family == "mixtral":
        assert not others.match("model.layers.0.mlp.experts")  # an engine asks for it
    for name in ("model.layers.0.self_attn.q_proj", "mlp.gate", "lm_head", "model.layers.0.mlp.shared_expert.up_proj"):
        assert others.match(name)
        assert not any(expression.match(name) for expression, _ in expressions)


def test_widths_that_a_target_lacks_are_rounded_up_and_said():
    plan = plan_of("mixtral", lambda layer, projection, count: [1, 7] * (count // 2))
    found = export(plan, "autoround")
    assert found.plan.layers["model.layers.0.mlp"].bits == [2, 7] * 4
    assert found.notes[0] == "AutoRound has no 1-bit format for 16 expert matrices: rounded up to 2 bits"
    assert found.notes[1] == "the plan has 4 bits on average, the export 4.5"
    assert export(plan, "modelopt").plan.diff(found.plan) == []


@pytest.mark.parametrize(
    ("bits", "width", "expected"),
    [
        (1, 256, "q1_0"),
        (1, 64, "q4_0"),
        (2, 512, "q2_k"),
        (2, 128, "q4_0"),
        (3, 256, "q3_k"),
        (4, 96, "q4_0"),
        (5, 32, "q5_0"),
        (6, 256, "q6_k"),
        (6, 128, "q8_0"),
        (7, 256, "q8_0"),
        (8, 40, "bf16"),
        (16, 256, "bf16"),
    ],
)
def test_gguf_type_is_the_smallest_that_fits(bits, width, expected):
    nominal, name, stored = gguf_type(bits, width)
    assert name == expected
    assert nominal >= bits
    assert stored >= nominal


@pytest.mark.parametrize("to", ["gguf", "mlx", "dynquant"])
def test_a_plan_by_expert_is_refused_with_the_command_that_makes_another(to):
    with pytest.raises(ExportError, match=r"granularity 'expert\+projection'.* --granularity layer\+projection "):
        export(by_expert(), to)


@pytest.mark.parametrize("to", ["autoround", "gptqmodel", "llm-compressor"])
def test_engines_want_one_width_a_layer(to):
    with pytest.raises(ExportError, match=r"vllm serves all experts of a layer.* --granularity layer --average-bits"):
        export(by_expert(), to, "vllm")
    assert export(plan_of("mixtral"), to, "vllm").plan.average_bits == 4


def test_gptq_of_an_engine_has_4_and_8_bits():
    plan = plan_of("mixtral", lambda layer, projection, count: [(2, 5)[layer]] * count)
    assert [export(plan, "gptqmodel", "vllm").plan.layers[name].bits[0] for name in plan.layers] == [4, 8]


@pytest.mark.parametrize(
    ("make", "to", "engine", "message"),
    [
        (by_expert, "onnx", None, "to='onnx' is not one of autoround, "),
        (by_expert, "autoround", "tgi", "engine='tgi' is not one of vllm, sglang"),
        (by_layer, "gguf", "vllm", "gguf has formats of its own"),
        (by_layer, "torchao", None, "torchao has only 8 bits for fused experts, .*down_proj' has 2"),
        (lambda: plan_of("switch_transformers"), "gguf", None, "GGUF has gate, up and down"),
        (lambda: plan_of("switch_transformers"), "mlx", None, "names of 'switch_transformers' in mlx-lm are not known"),
        (lambda: plan_of("mixtral", lambda *of: [16] * of[2]), "autoround", None, "nothing to quantize"),
    ],
)
def test_what_a_target_cannot_do(make, to, engine, message):
    with pytest.raises(ExportError, match=message):
        export(make(), to, engine)


def test_a_plan_that_does_not_say_where_its_experts_are():
    data = by_expert().to_dict()
    for layer in data["layers"].values():
        del layer["experts"]
    plan = PrecisionPlan.from_dict(data)  # of an earlier release
    for to in set(TARGETS) - {"gguf", "mlx", "fq-policy", "hybrid-bit-map"}:
        with pytest.raises(ExportError, match="does not say where the experts"):
            export(plan, to)


@pytest.mark.slow
def test_every_family_has_names():
    for family in CONFIGS:
        assert len(list(all_places(plan_of(family)))) >= 2


def test_layouts_that_only_a_pattern_finds_have_no_names():
    model = PlainMoE()
    how = {"method": "uniform", "average_bits": 4, "bits": (4,), "group_size": 32}
    plain = export(allocate(model, **how), "autoround").config
    assert plain.keys() >= {"experts.0.0", "experts.3.2"}
    named = allocate(model, **how, expert_pattern=r"^experts\.(?P<expert>\d+)\.", router_pattern="router")
    assert export(named, "autoround").config == plain
    in_part = allocate(model, **how, expert_pattern=r"^experts\.(?P<expert>\d+)\.0", router_pattern="router")
    with pytest.raises(ExportError, match="laid out in a way that no other tool has names for"):
        export(in_part, "autoround")


@pytest.mark.slow
def test_modules_beside_the_experts_are_left_alone_whatever_their_container_is_called():
    layers = plan_of("switch_transformers").layers
    moved = {
        name: replace(layer, shape=replace(layer.shape, experts="layers.0.ffn.expert_{expert}"))
        for name, layer in list(layers.items())[:1]
    }
    others = re.compile(all_but_experts(replace(plan_of("switch_transformers"), layers=moved)))
    assert others.match("layers.0.ffn.router")
    assert others.match("layers.1.ffn.fc1")
    assert not others.match("layers.0.ffn.expert_3.wi")


# ---- the other way


def write_checkpoint(folder, plan, quantization, suffixes) -> None:
    """A Mixtral whose experts are stored under names after unfusing; ``suffixes`` makes the tensors of one matrix."""
    model = build("mixtral")
    model.save_pretrained(folder)
    tensors = {k: v for k, v in load_file(folder / "model.safetensors").items() if ".experts." not in k}
    for place in all_places(plan):
        out, inp = (128, 64) if place.part != "down_proj" else (64, 128)
        for expert, bits in enumerate(plan.layers[place.layer].projection_bits[place.projection]):
            for suffix, (shape, dtype) in suffixes(out, inp, bits).items():
                tensors[f"{place.module_of(expert)}.{suffix}"] = torch.zeros(shape, dtype=dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


def gptq(out: int, inp: int, bits: int, group: int = 32) -> dict:
    if bits == 16:
        return {"weight": ((out, inp), torch.bfloat16)}
    scales = ((inp // group, out), torch.float16)
    return {"qweight": ((inp * bits // 32, out), torch.int32), "scales": scales}


def compressed(out: int, inp: int, bits: int) -> dict:
    if bits == 16:
        return {"weight": ((out, inp), torch.bfloat16)}
    return {
        "weight_packed": ((out, inp * bits // 32), torch.int32),
        "weight_scale": ((out, inp // 32), torch.bfloat16),
    }


def loose(out: int, inp: int, bits: int) -> dict:
    """compressed-tensors before it packed densely: 10 codes of 3 bits in a word."""
    words = -(-inp // (32 // bits))
    return {"weight_packed": ((out, words), torch.int32), "weight_scale": ((out, inp // 32), torch.bfloat16)}


GROUPS = {f"g{bits}": {"weights": {"num_bits": bits, "type": "int"}} for bits in (2, 3, 4, 8)}


@pytest.mark.parametrize(
    ("quantization", "suffixes"),
    [
        ({"quant_method": "gptq", "bits": 4}, gptq),
        ({"quant_method": "auto-round", "bits": 4}, gptq),
        ({"quant_method": "compressed-tensors", "config_groups": GROUPS}, compressed),
    ],
)
def test_bits_are_read_from_shapes(tmp_path, quantization, suffixes):
    plan = by_expert()
    write_checkpoint(tmp_path, plan, quantization, suffixes)
    read = plan_of_checkpoint(tmp_path)
    assert read.diff(plan) == []
    assert read.method == quantization["quant_method"]
    assert read.notes == {"read_from": tmp_path.name, "group_sizes": [32]}
    assert read.average_bits == plan.average_bits


def test_words_with_empty_ends_are_read_too(tmp_path):
    plan = plan_of("mixtral", lambda layer, projection, count: [3, 4] * (count // 2))
    write_checkpoint(tmp_path, plan, {"quant_method": "compressed-tensors", "config_groups": GROUPS}, loose)
    assert plan_of_checkpoint(tmp_path).diff(plan) == []


def test_words_that_mean_two_widths_are_refused(tmp_path):
    plan = plan_of("mixtral", lambda layer, projection, count: [7] * count)
    groups = {f"g{bits}": {"weights": {"num_bits": bits, "type": "int"}} for bits in (7, 8)}
    write_checkpoint(tmp_path, plan, {"quant_method": "compressed-tensors", "config_groups": groups}, loose)
    with pytest.raises(CheckpointError, match=r"two different plans of \[7, 8\] bits"):
        plan_of_checkpoint(tmp_path)


@pytest.mark.slow
def test_bytes_are_8_bits_only_where_nothing_else_is_named(tmp_path):
    def in_bytes(out: int, inp: int, bits: int) -> dict:
        return {"weight": ((out, inp), torch.int8), "weight_scale": ((out, 1), torch.bfloat16)}

    for bits in (8, 4):
        groups = {"g": {"weights": {"num_bits": bits, "type": "int"}}}
        quantization = {"quant_method": "compressed-tensors", "config_groups": groups}
        write_checkpoint(tmp_path / str(bits), plan_of("mixtral"), quantization, in_bytes)
    assert plan_of_checkpoint(tmp_path / "8").average_bits == 8
    with pytest.raises(CheckpointError, match="this form of a quantized weight cannot be read"):
        plan_of_checkpoint(tmp_path / "4")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[]", "config.json' is damaged: expected a JSON object"),
        ('{"text_config": null}', "is a float checkpoint"),
        ('{"quantization_config": "x"}', "its quantization_config is 'x'"),
        ('{"quantization_config": {"quant_method": "moe_precision"}}', "is not a precision plan"),
        ('{"quant', "config.json' is damaged"),
    ],
)
def test_a_config_that_cannot_be_read(tmp_path, capsys, config, message):
    build("mixtral").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(config)
    assert main(["show", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_group_sizes_that_differ_are_all_told(tmp_path, capsys):
    write_checkpoint(tmp_path, by_expert(), {"quant_method": "gptq"}, lambda o, i, b: gptq(o, i, b, group=i))
    assert plan_of_checkpoint(tmp_path).notes["group_sizes"] == [64, 128]
    assert main(["show", str(tmp_path)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "read from a checkpoint of gptq 6.25 bits on average, groups: 64 and 128" in printed
    assert "its files hold" in printed


@pytest.mark.slow
def test_packed_here(tmp_path, capsys):
    plan = by_expert()
    quantize_model(build("mixtral"), plan).save_pretrained(tmp_path / "packed")
    assert plan_of_checkpoint(tmp_path / "packed").diff(plan) == []
    plan.save(tmp_path / "plan.json")
    assert main(["show", str(tmp_path / "packed"), "--diff", str(tmp_path / "plan.json")]) == 0
    assert "same bits" in capsys.readouterr().out


def _drop(tensors, config):
    del tensors["model.layers.1.mlp.experts.5.up_proj.qweight"]


def _narrow(tensors, config):
    name = "model.layers.0.mlp.experts.0.down_proj.qweight"
    tensors[name] = tensors[name][:, :32].contiguous()


def _uneven(tensors, config):
    name = "model.layers.0.mlp.experts.0.up_proj.qweight"
    tensors[name] = torch.zeros(64 * 4 // 32, 128, dtype=torch.int32)


def _no_scales(tensors, config):
    del tensors["model.layers.0.mlp.experts.0.up_proj.scales"]


def _float(tensors, config):
    del config["quantization_config"]


def _other(tensors, config):
    config["quantization_config"]["quant_method"] = "hqq"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop, "expert 5 of layer 'model.layers.1.mlp' has no up_proj"),
        (_narrow, r"down_proj.qweight' is I32 \(8, 32\), expected \('in \* bits / 32', 64\)"),
        (_uneven, "gate_proj and up_proj of an expert have different bits"),
        (_no_scales, "up_proj.scales' is missing"),
        (_float, "qweight', but its config.json does not say how it was quantized"),
        (
            _other,
            "was quantized by 'hqq'; supported are gptq, auto-round, awq, compressed-tensors, mlx, modelopt, "
            "torchao and moe_precision",
        ),
    ],
)
def test_a_checkpoint_that_cannot_be_read(tmp_path, damage, message):
    write_checkpoint(tmp_path, by_expert(), {"quant_method": "gptq"}, gptq)
    tensors = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    damage(tensors, config)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        plan_of_checkpoint(tmp_path)


# ---- the command


def test_export_prints_the_config_and_keeps_notes_apart(tmp_path, capsys):
    by_expert().save(tmp_path / "plan.json")
    assert main(["export", str(tmp_path / "plan.json"), "--to", "autoround"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["model.layers.0.mlp.experts.0.gate_proj"] == {"bits": 2, "group_size": 32}
    assert err.startswith("note: every other linear layer")


def test_export_writes_a_file_and_never_over_one(tmp_path, capsys):
    by_layer().save(tmp_path / "plan.json")
    command = ["export", str(tmp_path / "plan.json"), "--to", "gguf", "-o", str(tmp_path / "types.txt")]
    assert main(command) == 0
    assert (tmp_path / "types.txt").read_text() == (GOLDEN / "gguf.txt").read_text()
    assert main(command) == 2
    assert "exists; name another file" in capsys.readouterr().err
    by_expert().save(tmp_path / "other.json")
    command = ["export", str(tmp_path / "other.json"), "--to", "mlx", "-o", str(tmp_path / "mlx.json")]
    assert main(command) == 2
    assert not (tmp_path / "mlx.json").exists()
    assert main(["export", str(tmp_path), "--to", "mlx"]) == 2
    assert "is a folder; give a plan's JSON file" in capsys.readouterr().err


def test_a_damaged_plan_is_refused(tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(PlanError):
        export(tmp_path / "plan.json", "autoround")
