"""A small layer whose experts are split over two processes as plain tensors; see test_expert_parallel.py."""

import os

import torch
import torch.distributed as dist
from torch import nn

from moe_precision import allocate, find_moe_layers
from moe_precision.recording.collecting import collect_statistics
from moe_precision.recording.loads import LoadCounter
from moe_precision.recording.second_moments import curvature_of

EXPERTS, WIDTH, NEURONS = 6, 32, 48


class Summed(torch.autograd.Function):
    """The sum over all processes, each of which keeps its own gradient."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        if dist.is_initialized():
            dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad


class Experts(nn.Module):
    """Megatron's SequentialMLP and DeepSpeed's Experts: a list, and how many of them are here."""

    def __init__(self, first, count):
        super().__init__()
        self.num_local_experts = count
        self.local_experts = nn.ModuleList()
        for index in range(first, first + count):
            torch.manual_seed(index)  # the same weights, wherever they are
            up, down = nn.Linear(WIDTH, NEURONS, bias=False), nn.Linear(NEURONS, WIDTH, bias=False)
            up.weight.data *= 1 + index
            self.local_experts.append(nn.Sequential(up, nn.GELU(), down))


class Layer(nn.Module):
    """Each process sees the whole batch and computes what its own experts make of it."""

    def __init__(self, first=0, count=EXPERTS):
        super().__init__()
        self.first = first
        self.experts = Experts(first, count)
        torch.manual_seed(99)
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)

    def forward(self, x):
        weights, chosen = self.router(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for place, expert in enumerate(self.experts.local_experts):
            token, rank = torch.where(chosen == self.first + place)
            if len(token):
                out = out.index_add(0, token, expert(x[token]) * weights[token, rank, None].detach())
        return Summed.apply(out)


def batches():
    generator = torch.Generator().manual_seed(5)
    return [{"x": torch.randn(64, WIDTH, generator=generator)} for _ in range(3)]


def record(model):
    """Everything that a run records, and the plans that are made of it, as plain tensors and dicts."""
    layers = find_moe_layers(model)
    counter = LoadCounter(layers, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    for batch in batches():
        optimizer.zero_grad()
        (model(**batch) ** 2).mean().backward()
        optimizer.step()
    loads = counter.take(training=True)
    counter.close()
    curvature = curvature_of(layers, [optimizer])
    statistics = collect_statistics(model, batches())
    plans = [
        allocate(model, average_bits=2.5, group_size=16, method="router_norm"),
        allocate(
            model, average_bits=2.5, group_size=16, curvature=curvature, statistics=statistics, method="statistics"
        ),
    ]
    name = layers[0].name
    return {
        "norms": layers[0].row_norms().detach(),
        "expert": {projection: matrix.clone() for projection, matrix in layers[0].expert_weights(4).items()},
        "loads": loads[name],
        "rows": curvature.rows[name],
        "columns": curvature.columns[name],
        "diagonals": statistics.diagonals[name],
        "correlations": statistics.correlations[name],
        "tokens": statistics.tokens[name],
        "variances": plans[0].layers[name].signals,
        "bits": [plan.layers[name].projection_bits for plan in plans],
    }


def main(folder: str, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    local = EXPERTS // 2
    torch.save(record(Layer(rank * local, local)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
    os._exit(0)
