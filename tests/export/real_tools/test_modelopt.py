"""ModelOpt accepts a plan, every expert's fake-quantized weight has that many values, and checkpoints are read back."""

import copy
import json

import modelopt.torch.quantization as mtq
import pytest
import torch
import yaml
from modelopt.torch.export import export_hf_checkpoint

from moe_precision import allocate
from moe_precision.export import export, plan_of_checkpoint
from tests.support.models import build, logits, with_bits


@pytest.mark.parametrize("family", ["mixtral", "switch_transformers"])
def test_every_expert_is_simulated_at_its_bits(family):
    model = build(family)
    plan = allocate(model, method="uniform", average_bits=4, bits=(4,), group_size=32)
    widths = (2, 3, 4, 5, 6, 7, 8, 16)
    plan = with_bits(plan, lambda layer, projection, count: [widths[(e + projection) % 8] for e in range(count)])
    mtq.quantize(model, yaml.safe_load(export(plan, "modelopt").text), logits)
    quantizers = {name: one for name, one in model.named_modules() if type(one).__name__.endswith("Quantizer")}
    for name, layer in plan.layers.items():
        for projection, bits in layer.projection_bits.items():
            for expert in range(8):
                fused = f"{name}.experts.{projection}_weight_quantizers.{expert}"
                module = f"{name}.experts.expert_{expert}.{projection}.weight_quantizer"
                quantizer = quantizers[fused if family == "mixtral" else module]
                assert quantizer.is_enabled == (bits[expert] < 16)
                if bits[expert] < 16:
                    assert (quantizer.num_bits, quantizer.block_sizes[-1]) == (bits[expert], 32)
    enabled = [name for name, one in quantizers.items() if one.is_enabled]
    assert all("experts" in name for name in enabled)


@pytest.mark.parametrize(("algorithm", "bits"), [("NVFP4", 4), ("FP8", 8)])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_the_bits_of_an_exported_checkpoint_are_read(family, algorithm, bits, tmp_path):
    model = build(family).to(torch.bfloat16)
    model.config.architectures = [type(model).__name__]  # ModelOpt asks for it
    mtq.quantize(model, copy.deepcopy(getattr(mtq, f"{algorithm}_DEFAULT_CFG")), logits)
    export_hf_checkpoint(model, export_dir=tmp_path)
    read = plan_of_checkpoint(tmp_path)
    assert {width for layer in read.layers.values() for width in layer.bits} == {bits}
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))  # then hf_quant_config.json says it
    assert plan_of_checkpoint(tmp_path).diff(read) == []
