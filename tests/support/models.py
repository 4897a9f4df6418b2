"""Small real models, one per family, built from configs with random weights; nothing is downloaded."""

import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from moe_precision.plans.plan import PrecisionPlan

DECODER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
CONFIGS: dict[str, dict] = {
    "mixtral": {**DECODER, "num_local_experts": 8},
    "qwen2_moe": {
        **DECODER,
        "num_experts": 8,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
    },
    "qwen3_moe": {**DECODER, "num_experts": 8, "moe_intermediate_size": 64},
    "olmoe": {**DECODER, "num_experts": 8},
    "deepseek_v3": {
        **DECODER,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
    },
    "gpt_oss": {**DECODER, "num_local_experts": 8, "head_dim": 16},
    "switch_transformers": {
        "d_model": 64,
        "d_ff": 128,
        "d_kv": 16,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "num_heads": 4,
        "num_experts": 8,
        "vocab_size": 128,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
    },
    "nllb-moe": {
        "d_model": 64,
        "encoder_ffn_dim": 128,
        "decoder_ffn_dim": 128,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "num_experts": 8,
        "vocab_size": 128,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
    },
}


def auto_class(model_type: str) -> type:
    """The Auto class that builds and loads a family."""
    return AutoModelForSeq2SeqLM if model_type in ("switch_transformers", "nllb-moe") else AutoModelForCausalLM


def build(model_type: str, **changes: object) -> PreTrainedModel:
    """A small model with seeded random weights, in evaluation mode."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**CONFIGS[model_type], **changes})
    return auto_class(model_type).from_config(config).eval()


def logits(model: PreTrainedModel) -> Tensor:
    """Logits on one fixed input."""
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(1))
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **extra).logits


def with_bits(plan: PrecisionPlan, bits: Callable[[int, int, int], list[int]]) -> PrecisionPlan:
    """A plan with the given widths: ``bits`` takes the layer's index, the projection's, and the number of experts."""
    edited = {}
    for index, (name, layer) in enumerate(plan.layers.items()):
        names = enumerate(layer.projection_bits)
        edited[name] = {projection: bits(index, place, layer.shape.num_experts) for place, projection in names}
    return plan.with_bits(edited)


def fresh_python(code: str, *arguments: str) -> str:
    """Runs code in a separate Python process and returns what it printed."""
    command = [sys.executable, "-c", code, *arguments]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class PlainMoE(nn.Module):
    """A Mixture of Experts as a user writes it: nn.Linear experts in a list, top-1 routing."""

    def __init__(self, width: int = 32, hidden: int = 64, experts: int = 4, router: bool = True) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width)) for _ in range(experts)
        )
        if router:
            self.router = nn.Linear(width, experts, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (N, width)
        gate = self.router(x).softmax(-1)  # (N, E)
        choice = gate.argmax(-1)  # (N,)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            chosen = choice == index
            out[chosen] = gate[chosen, index, None] * expert(x[chosen])
        return out


def train_on_stdlib(model: PreTrainedModel, steps: int) -> Tensor:
    """Trains a byte-level model on the standard library's source; returns held-out blocks ``(128, 128)`` int64."""
    text = b"".join(path.read_bytes() for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")))
    blocks = torch.frombuffer(bytearray(text[: len(text) // 128 * 128]), dtype=torch.uint8).long().view(-1, 128)
    blocks = blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(1))]
    train, held_out = blocks[256:], blocks[:128]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        batch = train[torch.randint(len(train), (8,), generator=generator)]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch, output_router_logits=True).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    return held_out
