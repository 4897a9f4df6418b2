"""Distills scales on two CPU processes under DDP; see test_distilling_processes.py."""

import copy
import os

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from moe_precision import DistillError, allocate, find_moe_layers
from moe_precision.callbacks.scale_distiller import ScaleDistiller
from moe_precision.quantize.distilling import distilled_grid
from tests.support.models import PlainMoE, build
from tests.support.trainers import Module, data, monitor, trainer

STEPS, BATCHES = 6, 12  # batches of the first process; the second has one more
MODELS = "mixtral", "plain"


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return build("mixtral") if kind == "mixtral" else nn.Sequential(PlainMoE(), PlainMoE()).eval()


def batch(kind: str, rank: int, number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * number + rank)
    shape = (2, 16) if kind == "mixtral" else (16, 32)
    return (
        torch.randint(3, 128, shape, generator=generator)
        if kind == "mixtral"
        else torch.randn(shape, generator=generator)
    )


def distilled(model: nn.Module, batches: list[torch.Tensor]):
    layers = find_moe_layers(model)
    plan = allocate(model, method="uniform", average_bits=2, group_size=32)
    return distilled_grid(model, layers, plan, [lambda x=x: model(x) for x in batches], steps=STEPS)


def main(folder: str, rank: int) -> None:
    callback = monitor(average_bits=2.0, statistics_batches=2, distill_steps=4)
    fitting = trainer(folder, callback, strategy="ddp_find_unused_parameters_true", devices=2)
    fitting.fit(Module(), data())  # begins the group of processes, with different batches on each
    callback.grid.save(f"{folder}/lightning_{rank}.safetensors")
    for kind in MODELS:
        model = DistributedDataParallel(model_of(kind))
        grid, found = distilled(model, [batch(kind, rank, number) for number in range(BATCHES + rank)])
        grid.save(f"{folder}/{kind}_{rank}.safetensors")
        torch.save([found.errors, found.kept], f"{folder}/{kind}_{rank}.pt")
    own = [batch(kind, rank, number) for number in range(BATCHES)]
    said = []
    for batches in (
        [*own[:2], "no batch" if rank else own[2]],
        [],
    ):  # one that fails on the second process alone; none at all
        try:
            distilled(model, batches)
        except Exception as error:
            said.append(repr(error))
    other = allocate(model, method="uniform", average_bits=2 + rank, group_size=32)
    try:
        distilled_grid(model, find_moe_layers(model), other, [], steps=STEPS)
    except DistillError as error:
        said.append(repr(error))
    sharded = fully_shard(copy.deepcopy(model_of("mixtral")))
    distiller = ScaleDistiller("a callback", 2)
    try:
        distiller.start(sharded, find_moe_layers(sharded), 4, 32, "")
    except DistillError as error:
        said.append(repr(error))
    torch.save(said, f"{folder}/said_{rank}.pt")
    torch.distributed.destroy_process_group()
    os._exit(0)  # as in statistics_run.py
