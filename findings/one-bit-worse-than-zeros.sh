#!/usr/bin/env bash
# Three libraries take 1 bit as a width: compressed-tensors 0.20.1, MLX 0.32.4 and hqq 0.2.8.post1.
# One would expect two levels at about plus and minus the mean magnitude, an error of 0.60 on a
# normal matrix, or something better from hqq, which is made for low widths. compressed-tensors
# stores zeros only when symmetric (error 1) and about 96 % zeros when not; MLX and hqq take levels
# near the extremes of each group, which is worse than zeros (errors of about 1.4 and 1.3).
# None of them warns, so a plan that mixes widths should not hand 1 bit to these three.
set -u
dir=$(mktemp -d) && trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv" || exit 2
"$dir/venv/bin/pip" install --quiet torch==2.13.0 || exit 2
"$dir/venv/bin/pip" install --quiet compressed-tensors==0.20.1 'mlx[cpu]==0.32.4' hqq==0.2.8.post1 || exit 2
cd "$dir" && HF_HUB_OFFLINE=1 "$dir/venv/bin/python" - <<'EOF'
import mlx.core as mx
import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

GROUP = 32
torch.manual_seed(0)
weight = torch.randn(64, 256)
groups = weight.unflatten(-1, (-1, GROUP))


def error(other):
    return float((other - weight).norm() / weight.norm())


def compressed_tensors(bits, symmetric):
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=GROUP)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    parts = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    packed = PackedQuantizationCompressor.compress(parts, scheme)
    return PackedQuantizationCompressor.decompress(packed, scheme)["weight"]


def mlx(bits):
    parts = mx.quantize(mx.array(weight.numpy()), group_size=GROUP, bits=bits)
    return torch.from_numpy(np.array(mx.dequantize(*parts, group_size=GROUP, bits=bits)))


def hqq(bits):
    layer = torch.nn.Linear(256, 64, bias=False)
    layer.weight.data.copy_(weight)
    config = BaseQuantizeConfig(nbits=bits, group_size=GROUP, axis=1)
    return HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu").dequantize()


print("compressed-tensors 0.20.1, mlx 0.32.4, hqq 0.2.8.post1; relative error of a normal matrix")
signs = groups.sign() * groups.abs().mean(-1, keepdim=True)
print(f"{'signs times the mean magnitude, 1 bit':40} {error(signs.flatten(-2)):.3f}")
readings = {}
for name, read in (
    ("compressed-tensors symmetric", lambda bits: compressed_tensors(bits, True)),
    ("compressed-tensors asymmetric", lambda bits: compressed_tensors(bits, False)),
    ("mlx affine", mlx),
    ("hqq", hqq),
):
    one, two = read(1), read(2)
    readings[name] = one
    print(f"{name:40} {error(one):.3f}, zeros {float((one == 0).float().mean()):.2f}; at 2 bits {error(two):.3f}")
extremes = torch.stack([groups.amin(-1), groups.amax(-1)], -1)
levels = readings["mlx affine"].unflatten(-1, (-1, GROUP)).sort(-1).values[..., [0, -1]]
at_extremes = torch.allclose(levels, extremes, atol=1e-3)
print("mlx: the two levels of every group are its minimum and maximum:", at_extremes)
same = (
    not readings["compressed-tensors symmetric"].any()
    and 0.9 < error(readings["compressed-tensors asymmetric"]) < 1
    and error(readings["mlx affine"]) > 1.3
    and error(readings["hqq"]) > 1.1
    and at_extremes
)
print("as stated" if same else "CHANGED")
raise SystemExit(not same)
EOF
