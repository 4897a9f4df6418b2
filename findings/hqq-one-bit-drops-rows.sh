#!/usr/bin/env bash
# hqq 0.2.8.post1 at 1 bit packs eight rows of groups into one row of bytes.
# One would expect a number of groups that is no multiple of 8 to be padded, as hqq does at 3 bits,
# or to be refused, as it does at 2 and 4 bits (RuntimeError while quantizing). At 1 bit HQQLinear
# quantizes without an error and keeps only whole eights: of 12 groups 8 are stored, and of the 4
# groups of a router of 4 experts and 64 inputs none at all. A checkpoint saved then has lost
# weights, and the first sign is an error about sizes when it is used. So count the groups before.
set -u
dir=$(mktemp -d) && trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv" || exit 2
"$dir/venv/bin/pip" install --quiet torch==2.13.0 || exit 2
"$dir/venv/bin/pip" install --quiet hqq==0.2.8.post1 || exit 2
cd "$dir" && HF_HUB_OFFLINE=1 "$dir/venv/bin/python" -W ignore - 2>"$dir/log" <<'EOF'
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear


def quantize(bits, outputs):
    """Quantizes a Linear of 64 inputs in groups of 64: one group per output."""
    torch.manual_seed(0)
    config = BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
    layer = torch.nn.Linear(64, outputs, bias=False)
    try:
        packed = HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu")
    except RuntimeError:
        return "refused while quantizing"
    stored = packed.state_dict()["W_q"]
    room = stored.numel() * stored.element_size() * 8 // bits // 64
    try:
        packed.dequantize()
    except RuntimeError:
        return f"room for {room} of {outputs} groups in the state dict; refused when used"
    return "stored and read back"


print("hqq 0.2.8.post1, one group of 64 inputs per output")
expected = {
    (1, 16): "stored and read back",
    (1, 12): "room for 8 of 12 groups in the state dict; refused when used",
    (1, 4): "room for 0 of 4 groups in the state dict; refused when used",
    (2, 10): "refused while quantizing",
    (3, 12): "stored and read back",
    (4, 9): "refused while quantizing",
}
got = {key: quantize(*key) for key in expected}
for (bits, outputs), answer in got.items():
    print(f"{bits} bits, {outputs:2} outputs: {answer}")
print("as stated" if got == expected else "CHANGED")
raise SystemExit(got != expected)
EOF
status=$?
[ "$status" -le 1 ] || cat "$dir/log"
exit "$status"
