#!/usr/bin/env bash
# transformers 5.23.0 runs only the experts 0 and 1 of NLLB-MoE, whatever its router says.
# One would expect each token to go to the two experts with the largest router logits. The router
# returns a mask of 0 and 1 for every token and expert, (tokens, experts); the experts module reads
# the same tensor as indices of experts. So a 0 in the mask sends the token to expert 0 and a 1
# sends it to expert 1, each weighted by the probability of the place where it stands. There is no
# error, and every published checkpoint of this family computes something else than it was trained
# for. Statistics and loads taken by expert show the other experts as never used.
set -u
dir=$(mktemp -d) && trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv" || exit 2
"$dir/venv/bin/pip" install --quiet torch==2.13.0 || exit 2
"$dir/venv/bin/pip" install --quiet transformers==5.23.0 || exit 2
cd "$dir" && HF_HUB_OFFLINE=1 "$dir/venv/bin/python" -W ignore - 2>"$dir/log" <<'EOF'
import torch
from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration

torch.manual_seed(0)
config = NllbMoeConfig(
    d_model=64,
    encoder_ffn_dim=128,
    decoder_ffn_dim=128,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    num_experts=8,
    vocab_size=128,
    encoder_sparse_step=2,
    decoder_sparse_step=2,
)
model = NllbMoeForConditionalGeneration(config).eval()
name, block = next((n, m) for n, m in model.named_modules() if type(m).__name__ == "NllbMoeSparseMLP")
rows, chosen = {}, []
for index in range(8):
    expert = block.experts[f"expert_{index}"]
    expert.register_forward_pre_hook(lambda module, args, i=index: rows.update({i: rows.get(i, 0) + len(args[0])}))
block.router.register_forward_hook(lambda module, args, out: chosen.append((out[0].shape, out[2].topk(2).indices)))
ids = torch.randint(3, 128, (2, 32))
with torch.no_grad():
    model(input_ids=ids, decoder_input_ids=ids)
(shape, top2) = chosen[0]
print("transformers 5.23.0,", name, "with 64 tokens, 8 experts, top-2")
print("what the router returns as choice:", tuple(shape))
print("tokens per expert by the router's logits:", torch.bincount(top2.flatten(), minlength=8).tolist())
print("rows that each expert is given:          ", [rows.get(i, 0) for i in range(8)])
as_stated = tuple(shape) == (64, 8) and set(rows) <= {0, 1} and len(set(top2.flatten().tolist())) > 2
print("as stated" if as_stated else "CHANGED")
raise SystemExit(not as_stated)
EOF
status=$?
[ "$status" -le 1 ] || cat "$dir/log"
exit "$status"
