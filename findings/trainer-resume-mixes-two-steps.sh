#!/usr/bin/env bash
# transformers 5.23.0: Trainer.train(resume_from_checkpoint=...) leaves a Qwen3-MoE with the routers of
# the checkpoint and the experts of the start, and says nothing that stops a run.
# One would expect all weights of the checkpoint, or an error. On disk each expert has tensors of its own;
# in the model all experts of a layer are one parameter. from_pretrained converts between the two, the
# Trainer loads the file as it is: names that agree (attention, routers, embeddings) are taken, the
# experts are not. Training goes on from a model that existed at no step. For Mixtral, whose routers are
# renamed too, neither routers nor experts are taken.
set -u
dir=$(mktemp -d) && trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv" || exit 2
"$dir/venv/bin/pip" install --quiet torch==2.13.0 || exit 2
"$dir/venv/bin/pip" install --quiet transformers==5.23.0 accelerate==1.15.0 || exit 2
cd "$dir" && HF_HUB_OFFLINE=1 "$dir/venv/bin/python" -W ignore - 2>"$dir/log" <<'EOF'
import copy

import torch
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

shape = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
FAMILIES = {
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(**shape, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16),
    ),
    "mixtral": (MixtralForCausalLM, MixtralConfig(**shape, num_local_experts=4)),
}
ids = torch.randint(3, 64, (8, 16), generator=torch.Generator().manual_seed(0))
rows = [{"input_ids": row, "labels": row} for row in ids]


class AtTheStart(TrainerCallback):
    """Keeps the weights with which training goes on."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}


def fit(model, steps, **resume):
    seen = AtTheStart()
    settings = {"max_steps": steps, "save_steps": 2, "learning_rate": 0.1, "report_to": [], "use_cpu": True}
    args = TrainingArguments(model.config.model_type, disable_tqdm=True, **settings)
    Trainer(model, args, train_dataset=rows, callbacks=[seen]).train(**resume)
    return seen.weights


as_stated = True
for family, (kind, config) in FAMILIES.items():
    torch.manual_seed(0)
    model = kind(config)
    start = copy.deepcopy(model)
    fit(model, 2)
    saved = kind.from_pretrained(f"{family}/checkpoint-2").state_dict()
    resumed = fit(copy.deepcopy(start), 4, resume_from_checkpoint=f"{family}/checkpoint-2")
    before = start.state_dict()
    found = {}
    for part in ("q_proj", "gate.weight", "experts.gate_up_proj", "experts.down_proj"):
        name = next(name for name in saved if part in name)
        same = [torch.equal(resumed[name], of[name]) for of in (saved, before)]
        found[part] = {(True, False): "of the checkpoint", (False, True): "of the start"}.get(tuple(same), "other")
    print("transformers 5.23.0, Trainer resumed,", family, found)
    routers = {"qwen3_moe": "of the checkpoint", "mixtral": "of the start"}[family]
    expected = ["of the checkpoint", routers, "of the start", "of the start"]
    as_stated &= list(found.values()) == expected
print("as stated" if as_stated else "CHANGED")
raise SystemExit(not as_stated)
EOF
status=$?
[ "$status" -le 1 ] || cat "$dir/log"
exit "$status"
