#!/usr/bin/env bash
# torchao 0.18.0 quantizes a model in place: quantize_(model, IntxWeightOnlyConfig(...)).
# On a Mixtral of transformers 5.23.0 one would expect the experts, most of the weights, to shrink,
# and 2 bits to take a quarter of the space of 8. The call succeeds and leaves every expert as it was:
# transformers 5 keeps them as 3-D parameters outside nn.Linear, and only nn.Linear modules are
# visited. What is quantized takes the same space at 2, 3 and 4 bits, one int8 per weight, and more
# than at 8 bits because of the scales per group. No warning shows it: compare bytes before and after.
set -u
dir=$(mktemp -d) && trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv" || exit 2
"$dir/venv/bin/pip" install --quiet torch==2.13.0 || exit 2
"$dir/venv/bin/pip" install --quiet transformers==5.23.0 torchao==0.18.0 || exit 2
cd "$dir" && HF_HUB_OFFLINE=1 "$dir/venv/bin/python" -W ignore - 2>"$dir/log" <<'EOF'
import warnings

import torch
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_
from torchao.utils import TorchAOBaseTensor
from transformers import MixtralConfig, MixtralForCausalLM

SHAPE = MixtralConfig(
    vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, num_local_experts=4,
)


def size(parameter):
    """Bytes of a plain parameter, or of all tensors inside a quantized one."""
    if isinstance(parameter, TorchAOBaseTensor):
        inner = (getattr(parameter, name, None) for name in parameter.tensor_data_names)
        return sum(tensor.nbytes for tensor in inner if tensor is not None)
    return parameter.nbytes


def split(model):
    """(bytes of the experts, bytes of the attention, names of quantized parameters)."""
    parameters = dict(model.named_parameters())
    quantized = [name for name, value in parameters.items() if isinstance(value, TorchAOBaseTensor)]
    sums = [sum(size(v) for n, v in parameters.items() if part in n) for part in (".experts.", ".self_attn.")]
    return *sums, quantized


torch.manual_seed(0)
plain = split(MixtralForCausalLM(SHAPE))
print("torchao 0.18.0, transformers 5.23.0, a tiny Mixtral in float32; bytes")
print(f"{'before':8} experts {plain[0]:8}, attention {plain[1]}")
readings = {}
for name, config in (
    ("8 bits", Int8WeightOnlyConfig()),
    ("4 bits", IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))),
    ("3 bits", IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=PerGroup(32))),
    ("2 bits", IntxWeightOnlyConfig(weight_dtype=torch.int2, granularity=PerGroup(32))),
):
    model = MixtralForCausalLM(SHAPE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantize_(model, config)
    experts, attention, quantized = split(model)
    of_experts = [parameter for parameter in quantized if ".experts." in parameter]
    warned = [str(warning.message) for warning in caught if "expert" in str(warning.message).lower()]
    readings[name] = (experts, attention, len(of_experts), len(quantized), len(warned))
    print(f"{name:8} experts {experts:8}, attention {attention}; quantized parameters: "
          f"{len(quantized)}, of experts {len(of_experts)}, warnings about experts {len(warned)}")
low = {readings[name][1] for name in ("4 bits", "3 bits", "2 bits")}
same = (
    all(r[0] == plain[0] and r[2] == 0 and r[3] > 0 and r[4] == 0 for r in readings.values())
    and len(low) == 1
    and plain[1] > low.pop() > readings["8 bits"][1]
)
print("as stated" if same else "CHANGED")
raise SystemExit(not same)
EOF
status=$?
[ "$status" -le 1 ] || cat "$dir/log"
exit "$status"
