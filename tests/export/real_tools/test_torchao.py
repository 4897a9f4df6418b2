"""torchao accepts a plan through transformers and gives every expert its number of values."""

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, TorchAoConfig

from moe_precision import allocate
from moe_precision.export import export
from tests.support.models import build, logits, with_bits


def test_modules_of_one_layer_get_their_own_widths(tmp_path):
    model = build("switch_transformers")
    model.save_pretrained(tmp_path / "float")
    plan = allocate(model, method="uniform", average_bits=4, bits=(4,), group_size=32)
    widths = (1, 2, 3, 4, 5, 6, 7, 16)
    plan = with_bits(plan, lambda layer, projection, count: [widths[(e + projection) % 8] for e in range(count)])
    config = TorchAoConfig.from_dict(export(plan, "torchao").config)
    quantized = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "float", quantization_config=config)
    for name, layer in plan.layers.items():
        for projection, bits in layer.projection_bits.items():
            for expert in range(8):
                weight = quantized.get_submodule(f"{name}.experts.expert_{expert}.{projection}").weight
                if bits[expert] == 16:
                    assert type(weight) is torch.nn.Parameter
                else:
                    assert len(weight.qdata.unique()) == 2 ** bits[expert]
    quantized.save_pretrained(tmp_path / "quantized")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "quantized")
    torch.testing.assert_close(logits(again), logits(quantized))


def test_fused_experts_at_8_bits(tmp_path):
    model = build("mixtral")
    model.save_pretrained(tmp_path)
    plan = allocate(model, method="uniform", average_bits=8, bits=(8,), group_size=32)
    plan = with_bits(plan, lambda layer, projection, count: [(8, 16)[projection]] * count)
    config = TorchAoConfig.from_dict(export(plan, "torchao").config)
    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, experts_implementation="eager"
    )
    experts = quantized.model.layers[0].mlp.experts
    assert experts.gate_up_proj.qdata.dtype == torch.int8
    assert type(experts.down_proj) is torch.nn.Parameter
    torch.testing.assert_close(logits(quantized), logits(model), rtol=0.01, atol=0.01)
