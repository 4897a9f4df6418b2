"""Reads norms and variances of a model that DeepSpeed ZeRO-3 has sharded over two CPU processes; see test_zero3.py."""

import importlib

import torch

from moe_precision import MoELayerError, find_moe_layers
from tests.support.fsdp1_run import measured
from tests.support.models import build


def main(folder: str, rank: int) -> None:
    import deepspeed  # reads the environment

    # Else it compiles C++ for a faster reduction, and a run that is killed meanwhile leaves a lock on which all later
    # runs wait. As an attribute, `deepspeed.comm.torch` is PyTorch itself.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    deepspeed.init_distributed("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = build("mixtral")
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "bf16": {"enabled": dtype == torch.bfloat16},
                "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
            },
        )
        layer = find_moe_layers(engine)[0]
        try:
            outside = str(layer.router_weight().shape)
        except MoELayerError as error:
            outside = str(error)
        before = measured(engine)
        ids = torch.randint(3, 128, (1, 16), generator=torch.Generator().manual_seed(0))
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
        results[str(dtype)] = {
            "outside": outside,
            "before": before,
            "expected": measured(build("mixtral").to(dtype)),
            "after": measured(engine)["norms"],
        }
    torch.save(results, f"{folder}/result_{rank}.pt")
