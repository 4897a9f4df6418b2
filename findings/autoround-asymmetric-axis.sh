#!/usr/bin/env bash
# AutoRound 0.16.1 writes its own format (quant_method "auto-round"), with or without zero points.
# One would expect sym=False to add zero points to one layout. It changes the layout, and at 4 bits
# only: symmetric 4 bits pack along the inputs and store the zero point less one (GPTQ's layout);
# asymmetric 4 bits pack along the outputs in the order 0 2 4 6 1 3 5 7 with the zero point as it is
# (AWQ's); asymmetric 3 bits pack along the inputs again, with the zero point as it is.
# quant_method, bits, group_size and sym are no key to that: a reader needs packing_format, for a wrong
# choice of zero point or order raises nothing where qzeros have the same shape.
set -u
dir=$(mktemp -d) && trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv" || exit 2
"$dir/venv/bin/pip" install --quiet torch==2.13.0 || exit 2
"$dir/venv/bin/pip" install --quiet transformers==5.23.0 auto-round==0.16.1 || exit 2
cd "$dir" && CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 "$dir/venv/bin/python" - >"$dir/log" 2>&1 <<'EOF'
import json
from pathlib import Path

import torch
from auto_round import AutoRound
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NAME, AWQ = "model.layers.0.mlp.up_proj", [0, 2, 4, 6, 1, 3, 5, 7]


def unpack(words, bits):
    """Dense little-endian codes along the last axis: (a, b) int32 -> (a, 32 b / bits)."""
    stream = (words[..., None] >> torch.arange(32)) & 1
    return (stream.flatten(-2).unflatten(-1, (-1, bits)) << torch.arange(bits)).sum(-1)


def along_outputs(words):
    """Eight nibbles to a word along the outputs, in AWQ's order: (a, b) -> (a, 8 b)."""
    return unpack(words, 4).unflatten(-1, (-1, 8))[..., torch.tensor(AWQ).argsort()].flatten(-2)


def weight(codes, zeros, scales):
    """(in, out) codes, (groups, out) zeros and scales -> (out, in)."""
    return ((codes - zeros.repeat_interleave(32, 0)) * scales.float().repeat_interleave(32, 0)).T


torch.manual_seed(0)
words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(64)}, unk_token="t0"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", eos_token="t1")
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )
).to(torch.bfloat16)
model.save_pretrained("source")
original = model.model.layers[0].mlp.up_proj.weight.detach().float().clone()
lines, seen, errors = ["AutoRound 0.16.1, a Linear of 128 inputs and 256 outputs, groups of 32"], [], []
for sym, bits in ((True, 4), (False, 4), (False, 3)):
    model = LlamaForCausalLM.from_pretrained("source", dtype=torch.bfloat16)
    AutoRound(
        model, tokenizer, bits=bits, group_size=32, sym=sym, iters=0, disable_opt_rtn=True, device_map="cpu"
    ).quantize_and_save(f"sym{sym}{bits}", format="auto_round")
    (file,) = Path(f"sym{sym}{bits}").rglob("*.safetensors")
    config = json.loads((file.parent / "config.json").read_text())["quantization_config"]
    tensors = load_file(file)
    codes, zeros, scales = (tensors[f"{NAME}.{part}"] for part in ("qweight", "qzeros", "scales"))
    seen.append((config["quant_method"], config["packing_format"], tuple(codes.shape), tuple(zeros.shape)))
    error = {}
    for shift in (0, 1):
        if codes.shape[0] == 128:
            read, order = along_outputs(codes), along_outputs(zeros)
            straight = unpack(zeros, 4)
            error["along the outputs, zeros in plain order", shift] = weight(read, straight + shift, scales)
            error["along the outputs, AWQ's order", shift] = weight(read, order + shift, scales)
        else:
            read = unpack(codes.T.contiguous(), bits).T
            error["along the inputs", shift] = weight(read, unpack(zeros, bits) + shift, scales)
    error = {key: float((value - original).norm() / original.norm()) for key, value in error.items()}
    errors.append(min(error, key=error.get))
    lines.append(f"sym={sym}, {bits} bits: {seen[-1]}")
    lines += [f"    {key[0]}, zeros {'+ 1' if key[1] else 'as stored'}: error {value:.3f}" for key, value in error.items()]
    right = min(error.values())
    assert right < 0.25, error
same = seen == [
    ("auto-round", "auto_round:auto_gptq", (16, 256), (4, 32)),
    ("auto-round", "auto_round:auto_awq", (128, 32), (4, 32)),
    ("auto-round", "auto_round", (12, 256), (4, 24)),
] and errors == [("along the inputs", 1), ("along the outputs, AWQ's order", 0), ("along the inputs", 0)]
lines.append("as stated" if same else "CHANGED")
Path("report").write_text("\n".join(lines) + "\n")
raise SystemExit(0 if same else 1)
EOF
status=$?
if [ -f "$dir/report" ]; then cat "$dir/report"; else tail -20 "$dir/log"; fi
exit "$status"
