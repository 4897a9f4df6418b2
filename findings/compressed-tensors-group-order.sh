#!/usr/bin/env bash
# A compressed-tensors config gives widths by config groups whose targets may be regular expressions.
# Where two match one module, one would expect the first or the last in the file to win, or the
# narrower. In compressed-tensors 0.20.1 the one that sorts first as a string wins, whatever the order:
# "re:.*experts\.3\." beats "re:.*experts\.[0-9]+\." and loses to "re:.*down_proj", since a digit
# sorts before "[" and "d" before "e". The only message, "Could not match", does not help: it names
# a pattern for coming second in the file, also when that pattern won. So an expert can get another
# width than the config seems to say; give mixed widths by full names, or let no two patterns overlap.
set -u
dir=$(mktemp -d) && trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv" || exit 2
"$dir/venv/bin/pip" install --quiet torch==2.13.0 || exit 2
"$dir/venv/bin/pip" install --quiet compressed-tensors==0.20.1 || exit 2
cd "$dir" && "$dir/venv/bin/python" - 2>"$dir/log" <<'EOF'
import logging

import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)

messages = []


class Keep(logging.Handler):
    def emit(self, record):
        messages.append(record.getMessage())


logging.getLogger("compressed_tensors").addHandler(Keep())


def widths(*groups):
    """Applies (target, bits) groups in this order; returns the widths of four experts."""
    block = torch.nn.ModuleDict({"down_proj": torch.nn.Linear(32, 32)})
    experts = [torch.nn.ModuleDict({"down_proj": torch.nn.Linear(32, 32)}) for _ in range(4)]
    model = torch.nn.ModuleDict({"experts": torch.nn.ModuleList(experts)})
    schemes = {}
    for number, (target, bits) in enumerate(groups):
        args = QuantizationArgs(num_bits=bits, strategy="group", group_size=32)
        schemes[f"group_{number}"] = QuantizationScheme(targets=[target], weights=args)
    apply_quantization_config(model, QuantizationConfig(config_groups=schemes))
    return [expert["down_proj"].quantization_scheme.weights.num_bits for expert in experts]


third = (r"re:.*experts\.3\.down_proj$", 8)
same = True
print("compressed-tensors 0.20.1; bits of experts 0 to 3; expert 3 has a pattern of its own at 8 bits")
for pattern, expected in (
    (r"re:.*experts\.[0-9]+\.down_proj$", [4, 4, 4, 8]),
    (r"re:.*down_proj$", [4, 4, 4, 4]),
):
    for groups in ((third, (pattern, 4)), ((pattern, 4), third)):
        messages.clear()
        got = widths(*groups)
        order = "own pattern first" if groups[0] is third else "own pattern last"
        print(f"the others by {pattern:36} {order:18} {got}  {[m for m in messages if 'match' in m]}")
        same &= got == expected
print("as stated" if same else "CHANGED")
raise SystemExit(not same)
EOF
status=$?
[ "$status" -le 1 ] || cat "$dir/log"
exit "$status"
