"""How far bfloat16 weights and their float32 copies show the change of router norms that a float32 run has.

    python -m benchmarks.masters --rates 3e-6 3e-5

A small Mixtral trains from the same weights on the same batches with DeepSpeed (ZeRO 1, one process), in float32 and in
bfloat16 with float32 copies. Needs deepspeed. Ratios to the float32 run; a minute for each rate on one core.
"""

from __future__ import annotations

import argparse
import importlib
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig

from benchmarks.studies.study_report import markdown_table
from moe_precision.judging.statistics import rank_correlation
from moe_precision.layers.moe_layers import find_moe_layers
from moe_precision.recording.masters import read_masters
from moe_precision.recording.router_norms import router_norms

CONFIG = MixtralConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=8,
)


def changes(deepspeed: Any, half: bool, rate: float, steps: int) -> tuple[Tensor, Tensor]:
    """Change of all router norms in a run, of what is trained and of the model's weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": half},
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    engine, optimizer, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    trained, weights = find_moe_layers(engine), find_moe_layers(engine)
    read_masters(trained, [optimizer])
    before = router_norms(trained).clone()
    for step in range(steps):
        ids = torch.randint(3, 128, (1, 16), generator=torch.Generator().manual_seed(step % 50))
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    return router_norms(trained) - before, router_norms(weights) - before


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-6, 3e-5])
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed: Any = importlib.import_module("deepspeed")
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed(
        "gloo", init_method=f"file://{Path(tempfile.mkdtemp(), 'rendezvous')}", rank=0, world_size=1
    )
    rows = []
    for rate in options.rates:
        expected, _ = changes(deepspeed, False, rate, options.steps)
        for name, found in zip(
            ("float32 copies", "bfloat16 weights"), changes(deepspeed, True, rate, options.steps), strict=True
        ):
            error = float((found - expected).norm() / expected.norm())
            rows.append([f"{rate:g}", name, f"{error:.2f}", f"{rank_correlation(found, expected):.2f}"])
    print(markdown_table("Change of router norms", ["rate", "read", "error", "rank correlation"], rows))


if __name__ == "__main__":
    main()
