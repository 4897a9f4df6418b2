"""DynQuant takes a plan as its bit map: every expert gets its width, in its values and in its packed checkpoint."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_precision import allocate, find_moe_layers
from moe_precision.checkpoints.checkpoint import load_model
from moe_precision.export import export
from tests.export.real_tools.conftest import LARGEST_ERROR, float_experts
from tests.support.models import build, logits, with_bits

dynquant = pytest.importorskip("dynquant")


def run(command, checkpoint, map_file, out, group_size=64):
    arguments = [str(checkpoint), "--map", str(map_file), "--group-size", str(group_size), "--output", str(out)]
    tool = [sys.executable, "-m", "dynquant", command, *arguments, "--device", "cpu", "--dtype", "float32", "--quiet"]
    return subprocess.run(tool, capture_output=True, text=True, check=False)


def map_of(plan, folder):
    (folder / "map.json").write_text(export(plan, "dynquant").text)
    return folder / "map.json"


def test_it_reads_the_map_as_it_is(by_layer, tmp_path):
    from dynquant.commands._shared import read_bit_map

    bits, known = read_bit_map(str(map_of(by_layer, tmp_path)))
    layers = [f"model.layers.{number}.mlp.experts." for number in (0, 1)]
    parameters = [f"{layer}{name}" for layer in layers for name in ("gate_up_proj", "down_proj")]
    assert bits == dict(zip(parameters, (2, 3, 4, 8), strict=True))
    assert known["group_size"] == 64


def test_banks_are_packed_at_their_widths_and_run(checkpoint, by_layer, tmp_path):
    layers = float_experts(checkpoint)
    found = run("export", checkpoint, map_of(by_layer, tmp_path), tmp_path / "packed")
    assert found.returncode == 0, found.stderr
    modules = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]["modules"]
    (expected,) = export(by_layer, "dynquant").config["maps"].values()
    assert {name: one["bits"] for name, one in modules.items()} == expected["bits"]
    dynquant.register_hf_quantizer()
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    for name, layer in by_layer.layers.items():
        for projection, widths in layer.projection_bits.items():
            bank = packed.get_submodule(f"{name}.experts.{projection}")
            for expert, bits in enumerate(widths):
                weight = layers[name].expert_weights(expert)[projection]
                error = (bank[expert].float() - weight).norm() / weight.norm()
                assert error < LARGEST_ERROR[bits], (name, projection, bits, error)
    assert logits(packed).isfinite().all()


def test_experts_that_are_modules_differ(tmp_path):
    model = build("switch_transformers")
    model.save_pretrained(tmp_path / "float")
    plan = allocate(model, method="uniform", average_bits=4, bits=(4,), group_size=32)
    widths = (2, 3, 4, 8, 16, 2, 3, 4)
    plan = with_bits(plan, lambda layer, projection, count: [widths[(e + projection) % 8] for e in range(count)])
    found = run("quantize", tmp_path / "float", map_of(plan, tmp_path), tmp_path / "values", group_size=32)
    assert found.returncode == 0, found.stderr
    quantized = load_model(tmp_path / "values", dtype=torch.float32)
    for layer in find_moe_layers(quantized):
        for projection, bits in plan.layers[layer.name].projection_bits.items():
            for expert in range(8):
                groups = layer.expert_weights(expert)[projection].reshape(-1, 32)
                most = max(len(group.unique()) for group in groups)
                assert most == 32 if bits[expert] == 16 else most <= 2 ** bits[expert], (projection, expert, most)


def test_other_groups_than_the_plans_are_refused(checkpoint, by_layer, tmp_path):
    found = run("export", checkpoint, map_of(by_layer, tmp_path), tmp_path / "packed", group_size=128)
    assert found.returncode != 0
    assert "was built at group_size=64" in found.stderr + found.stdout
    assert not (tmp_path / "packed").exists()
