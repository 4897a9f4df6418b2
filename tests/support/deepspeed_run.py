"""Trains with DeepSpeed on two CPU processes and reads its float32 copies and moments; see test_deepspeed_state.py."""

import importlib

import torch

from moe_precision import find_moe_layers
from moe_precision.recording.masters import Masters
from moe_precision.recording.optimizer_check import check_second_moments
from moe_precision.recording.router_norms import router_norms
from moe_precision.recording.second_moments import curvature_of
from tests.support.models import build

RATE, STEPS = 3e-6, 3


def batch(step):
    ids = torch.randint(3, 128, (1, 16), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": ids}


def main(folder: str, rank: int) -> None:
    import deepspeed

    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # as in zero3_run.py
    deepspeed.init_distributed("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {}
    for stage, half in ((2, False), (2, True), (3, True)):
        model = build("mixtral")
        engine, optimizer, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_clipping": 0.0,  # its default of 1 would scale the gradients
                "bf16": {"enabled": half},
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
            },
        )
        layers = find_moe_layers(engine)
        masters = Masters(layers, [optimizer])
        check_second_moments(layers, [optimizer])
        before = router_norms(layers).clone()
        news = masters.news()
        for step in range(STEPS):
            engine.backward(engine(**batch(step)).loss)
            engine.step()
        weights = find_moe_layers(engine)  # without the copies
        curvature = curvature_of(layers, [optimizer])
        results[stage, half] = {
            "news": news,
            "change": router_norms(layers) - before,
            "of_weights": router_norms(weights) - before,
            "rows": curvature.rows,
            "columns": curvature.columns,
        }
    torch.save(results, f"{folder}/result_{rank}.pt")
