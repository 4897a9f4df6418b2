"""Run by CI with the installed wheel, in a folder of its own: a model is planned for, quantized, saved and loaded."""

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import moe_precision.callbacks
import moe_precision.recipes
from moe_precision import PrecisionPlan, allocate, quantize_model

assert "site-packages" in moe_precision.__file__, moe_precision.__file__
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
model = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4)).eval()
allocate(model=model, method="weight_error", average_bits=2.5, bits=(2, 3), group_size=32).save("plan.json")
quantize_model(model, PrecisionPlan.load("plan.json")).save_pretrained("packed")
ids = torch.arange(8)[None]
with torch.no_grad():
    assert torch.equal(AutoModelForCausalLM.from_pretrained("packed")(ids).logits, model(ids).logits)
print(moe_precision.__version__, "quantizes, saves and loads")
