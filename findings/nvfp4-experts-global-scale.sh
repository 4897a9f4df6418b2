#!/usr/bin/env bash
# An NVFP4 weight in a compressed-tensors checkpoint has two scales: one per 16 values
# (weight_scale) and one per matrix (weight_global_scale), which the first must be divided by.
# One would expect transformers to load such a mixture-of-experts checkpoint right or to refuse it.
# transformers 5.23.0 with compressed-tensors 0.20.1 drops the global scale of experts that it
# fuses while loading: they come back tens of thousands of times too large, with no missing or
# unexpected keys and no error. MXFP4 and 4-bit integer experts load right, and so does the same
# NVFP4 expert through compressed-tensors alone, so the files are valid. Whoever writes NVFP4
# experts should compare reloaded norms with the originals.
set -u
dir=$(mktemp -d) && trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv" || exit 2
"$dir/venv/bin/pip" install --quiet torch==2.13.0 || exit 2
"$dir/venv/bin/pip" install --quiet transformers==5.23.0 compressed-tensors==0.20.1 || exit 2
cd "$dir" && HF_HUB_OFFLINE=1 "$dir/venv/bin/python" - <<'EOF'
import json
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

TARGET = r"re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$"
NAME = "model.layers.0.mlp.experts.0.down_proj.weight"


def write(folder, model, preset, layout):
    """Packs every expert with compressed-tensors; returns what its own unpacking gives for NAME."""
    model.save_pretrained(folder)
    scheme = preset_name_to_scheme(preset, [TARGET])
    scheme.format = layout
    if preset == "W4A16":
        scheme.weights.group_size = 32
    compressor = BaseCompressor.get_value_from_registry(layout)
    tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if ".mlp.experts." not in name:
            tensors[name] = weight
            continue
        parts, overall = {"weight": weight}, None
        if preset == "NVFP4A16":
            overall = generate_gparam(weight.min(), weight.max()).reshape(1)
            parts["weight_global_scale"] = overall
        groups = weight.unflatten(-1, (-1, scheme.weights.group_size))
        parts["weight_scale"], _ = calculate_qparams(
            groups.amin(-1), groups.amax(-1), scheme.weights, global_scale=overall
        )
        parts = compressor.compress(parts, scheme)
        if name == NAME:
            unpacked = compressor.decompress(dict(parts), scheme)["weight"].float()
        tensors |= {name.removesuffix("weight") + part: value.contiguous() for part, value in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=layout,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=["lm_head"],
    ).to_dict()
    (folder / "config.json").write_text(json.dumps(config, default=str))
    return unpacked


torch.manual_seed(0)
model = Qwen3MoeForCausalLM(
    Qwen3MoeConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=32, num_experts=4, num_experts_per_tok=2,
    )
)
original = model.model.layers[0].mlp.experts.down_proj[0].norm()
ratios, lines = {}, []
for preset, layout in (
    ("W4A16", "pack-quantized"), ("MXFP4A16", "mxfp4-pack-quantized"), ("NVFP4A16", "nvfp4-pack-quantized")
):
    folder = Path(preset)
    alone = write(folder, model, preset, layout).norm() / original
    loaded, info = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    ratios[preset] = float(loaded.model.layers[0].mlp.experts.down_proj[0].norm() / original)
    silent = not any(info.values())
    lines.append(f"{preset}: norm over the original's: compressed-tensors {alone:.3f}, "
                 f"transformers {ratios[preset]:.3f}, keys complete: {silent}")
    ratios[preset, "valid"] = silent and abs(alone - 1) < 0.05
print("transformers 5.23.0, compressed-tensors 0.20.1", *lines, sep="\n")
same = (
    all(ratios[p, "valid"] for p in ("W4A16", "MXFP4A16", "NVFP4A16"))
    and abs(ratios["W4A16"] - 1) < 0.05
    and abs(ratios["MXFP4A16"] - 1) < 0.05
    and ratios["NVFP4A16"] > 1000
)
print("as stated" if same else "CHANGED")
raise SystemExit(not same)
EOF
