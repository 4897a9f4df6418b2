#!/usr/bin/env bash
# MXFP4 is a published format: blocks of 32 values of 4 bits with one power-of-two scale.
# One would expect the 16 bytes of a block to mean the same in every file that calls itself MXFP4.
# compressed-tensors 0.20.1 keeps neighbours (2j, 2j+1) in byte j, and transformers 5.23.0 reads
# gpt-oss in that order; gguf 0.19.0 keeps values j and j+16 there. The scale byte is the same.
# Bytes copied from one to the other stay in their block with the right magnitudes, in the wrong
# places: norms, maxima and histograms per block agree, yet the weights are noise (error above 1,
# worse than zeros). A converter has to reorder the nibbles and check by position.
set -u
dir=$(mktemp -d) && trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv" || exit 2
"$dir/venv/bin/pip" install --quiet torch==2.13.0 || exit 2
"$dir/venv/bin/pip" install --quiet transformers==5.23.0 compressed-tensors==0.20.1 gguf==0.19.0 || exit 2
cd "$dir" && HF_HUB_OFFLINE=1 "$dir/venv/bin/python" - <<'EOF'
import gguf
import numpy as np
import torch
from compressed_tensors.compressors.mxfp4 import MXFP4PackedCompressor
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

MXFP4 = gguf.GGMLQuantizationType.MXFP4
torch.manual_seed(0)
weight = torch.randn(8, 128)


def error(other):
    return float((other - weight).norm() / weight.norm())


def read_by_gguf(scales, nibbles):
    blocks = np.concatenate([scales.numpy()[..., None], nibbles.numpy()], -1)
    return torch.from_numpy(gguf.quants.dequantize(blocks.reshape(8, -1), MXFP4))


scheme = preset_name_to_scheme("MXFP4A16", ["Linear"])
blocks = weight.unflatten(-1, (4, 32))
scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights)
packed = MXFP4PackedCompressor.compress({"weight": weight, "weight_scale": scale}, scheme)
scales, nibbles = packed["weight_scale"], packed["weight_packed"].unflatten(-1, (4, 16))  # (8, 4), (8, 4, 16)

own = MXFP4PackedCompressor.decompress(dict(packed), scheme)["weight"].float()
gpt_oss = convert_moe_packed_tensors(nibbles[None], scales[None], dtype=torch.float32)[0].T  # (8, 128)
copied = read_by_gguf(scales, nibbles)
codes = torch.stack([nibbles & 15, nibbles >> 4], -1).flatten(-2)  # (8, 4, 32), by position
reordered = read_by_gguf(scales, codes[..., :16] | codes[..., 16:] << 4)
by_gguf = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), MXFP4), MXFP4))

same_values = torch.equal(*(w.unflatten(-1, (4, 32)).sort(-1).values for w in (own, copied)))
print("compressed-tensors 0.20.1, transformers 5.23.0, gguf 0.19.0; relative error of a normal matrix")
print(f"compressed-tensors by itself                 {error(own):.3f}")
print(f"its bytes read as gpt-oss's by transformers  {error(gpt_oss):.3f}")
print(f"gguf by itself                               {error(by_gguf):.3f}")
print(f"compressed-tensors' bytes read by gguf       {error(copied):.3f}; same values per block: {same_values}")
print(f"the same with the nibbles reordered          {error(reordered):.3f}")
same = (
    torch.equal(own, gpt_oss) and torch.equal(own, reordered) and same_values
    and error(own) < 0.15 and error(by_gguf) < 0.15 and error(copied) > 1
)
print("as stated" if same else "CHANGED")
raise SystemExit(not same)
EOF
