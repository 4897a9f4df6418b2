"""Collects statistics on two CPU processes under DDP or FSDP2; see test_statistics_processes.py."""

import os

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from moe_precision import find_moe_layers
from moe_precision.recording.collecting import collect_from_steps, collect_statistics
from moe_precision.recording.in_turn import StatisticsInTurn
from moe_precision.recording.statistics import StatisticsError
from tests.support.models import build

BATCHES, STEPS = 3, 4  # batches of each process after training; steps that are recorded in training


def batch(model_type: str, rank: int, number: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(10 * number + rank))
    return {"input_ids": ids, "decoder_input_ids": ids} if model_type == "switch_transformers" else {"input_ids": ids}


def wrapped(model: nn.Module, strategy: str) -> nn.Module:
    if strategy == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=True)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def main(folder: str, rank: int, strategy: str, model_type: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = wrapped(build(model_type), strategy)
    own = [batch(model_type, rank, number) for number in range(BATCHES + rank)]  # one more on the second process
    collect_statistics(model, own).save(f"{folder}/after_{rank}.safetensors")

    layers = find_moe_layers(model)
    recorder = StatisticsInTurn(model, layers, 0, STEPS)
    for step in range(STEPS):
        recorder.before_batch(step)
        one = batch(model_type, rank, step)
        model(**one, labels=one["input_ids"]).loss.backward()  # and no update, so that one process can repeat it
        recorder.after_batch(step + 1)
    recorder.finish().save(f"{folder}/during_{rank}.safetensors")

    def fails() -> None:
        raise RuntimeError("only here")

    try:
        collect_from_steps(model, layers, [fails if rank else list])
    except (RuntimeError, StatisticsError) as error:
        torch.save({"error": repr(error)}, f"{folder}/said_{rank}.pt")
    torch.distributed.destroy_process_group()
    os._exit(0)  # freeing DDP's group now may hang: its destructor holds the GIL and waits for a thread that wants it
