#!/usr/bin/env bash
# GPTQModel 7.7.0 can give single modules another width (`dynamic`), for instance one expert.
# One would expect that to change the tensors of that module only. With 2, 3, 4 or 8 bits it does;
# one module at 5 (or 6 or 7) bits makes the whole checkpoint "gptq_p" instead of "gptq": the zero
# points of all 4-bit modules are then stored as they are and not less one, and 3-bit modules are
# packed in another order, under the same names, dtypes and shapes, with quant_method "gptq" still.
# A reader that goes by names and shapes is off by one step everywhere, and has wrong codes at 3 bits:
# it has to look at checkpoint_format.
set -u
dir=$(mktemp -d) && trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv" || exit 2
"$dir/venv/bin/pip" install --quiet torch==2.13.0 || exit 2
"$dir/venv/bin/pip" install --quiet transformers==5.23.0 gptqmodel==7.7.0 || exit 2
cd "$dir" && GPTQMODEL_CPU_WORKERS=2 CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 "$dir/venv/bin/python" - >"$dir/log" 2>&1 <<'EOF'
import json
from pathlib import Path

import torch
from gptqmodel import GPTQModel
from gptqmodel.quantization import RTNConfig
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FOUR, THREE, OTHER = ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj", "model.layers.1.mlp.down_proj")


def quantize(bits):
    """Rounds the same model at 4 bits, THREE at 3 bits and OTHER at `bits`."""
    dynamic = {rf"+:^{name}$": {"bits": width} for name, width in ((THREE, 3), (OTHER, bits))}
    model = GPTQModel.load("source", RTNConfig(bits=4, group_size=32, sym=True, dynamic=dynamic))
    model.quantize(None)
    model.save(f"bits{bits}")
    tensors = {}
    for file in Path(f"bits{bits}").glob("*.safetensors"):
        tensors |= load_file(file)
    return json.loads(Path(f"bits{bits}/config.json").read_text())["quantization_config"], tensors


torch.manual_seed(0)
LlamaForCausalLM(
    LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2,
    )
).to(torch.bfloat16).save_pretrained("source")
words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(64)}, unk_token="t0"))
PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", eos_token="t1", pad_token="t2").save_pretrained("source")

plain_config, plain = quantize(8)
mixed_config, mixed = quantize(5)
lines = ["GPTQModel 7.7.0; another module at 8 bits, then at 5 bits"]
lines += [f"{key}: {plain_config[key]}, {mixed_config[key]}" for key in ("quant_method", "checkpoint_format")]
alike = {
    name: plain[name].shape == mixed[name].shape and plain[name].dtype == mixed[name].dtype
    for name in plain
    if not name.startswith(OTHER)
}
lines.append(f"names, shapes and dtypes of all other modules alike: {plain.keys() == mixed.keys() and all(alike.values())}")
zeros = [hex(part[f"{FOUR}.qzeros"].flatten()[0].item() & 0xFFFFFFFF) for part in (plain, mixed)]
lines.append(f"first word of a 4-bit module's qzeros: {zeros[0]}, {zeros[1]}")
codes = {name: torch.equal(plain[f"{name}.qweight"], mixed[f"{name}.qweight"]) for name in (FOUR, THREE)}
scales = {name: torch.equal(plain[f"{name}.scales"], mixed[f"{name}.scales"]) for name in (FOUR, THREE)}
lines.append(f"4-bit module: qweight equal {codes[FOUR]}, scales equal {scales[FOUR]}")
lines.append(f"3-bit module: qweight equal {codes[THREE]}, scales equal {scales[THREE]}")
same = (
    plain_config["quant_method"] == mixed_config["quant_method"] == "gptq"
    and (plain_config["checkpoint_format"], mixed_config["checkpoint_format"]) == ("gptq", "gptq_p")
    and plain.keys() == mixed.keys()
    and all(alike.values())
    and zeros == ["0x77777777", "0x88888888"]
    and codes == {FOUR: True, THREE: False}
    and all(scales.values())
)
lines.append("as stated" if same else "CHANGED")
Path("report").write_text("\n".join(lines) + "\n")
raise SystemExit(0 if same else 1)
EOF
status=$?
if [ -f "$dir/report" ]; then cat "$dir/report"; else tail -20 "$dir/log"; fi
exit "$status"
