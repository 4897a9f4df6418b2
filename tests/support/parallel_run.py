"""What two CPU processes do with a model that transformers or FSDP2 splits over them; see test_parallel.py."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

from moe_precision import (
    MoELayerError,
    PlanQuantizationConfig,
    PrecisionPlan,
    allocate,
    find_moe_layers,
    quantize_model,
)
from moe_precision.recording.curvature import Curvature
from moe_precision.recording.loads import LoadCounter, count_loads
from moe_precision.recording.processes import processes_per_batch
from moe_precision.recording.router_norms import max_variances, norms_by_layer
from moe_precision.recording.second_moments import curvature_of
from tests.support.models import build, logits

SPLITS = {
    "tp": {"tp_size": 2},
    "ep": {"tp_size": 2, "ep_size": 2},
    "ep_of_own_batches": {"fsdp_size": 2, "ep_size": 2},
    "fsdp": {"fsdp_size": 2},
}


def curvature_of_a_step(model: PreTrainedModel) -> Curvature:
    """What Adam has seen of the experts in one step."""
    ids = torch.arange(3, 90)[None]
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3, foreach=False)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    return curvature_of(find_moe_layers(model), [optimizer])


def main(folder: str, split: str) -> None:
    """Writes what this rank found into ``<folder>/<split>_<rank>.pt``."""
    dist.init_process_group("gloo")
    path = Path(folder)
    config = DistributedConfig(**SPLITS[split])
    found: dict = {"refusals": []}
    plan = PrecisionPlan.load(path / "plan.json")

    def refused(call: Callable[[], object]) -> None:
        try:
            call()
            found["refusals"].append("nothing")
        except ValueError as error:
            found["refusals"].append(f"{type(error).__name__}: {error}")

    load = AutoModelForCausalLM.from_pretrained
    refused(lambda: load(path / "packed", distributed_config=config))
    if split == "tp":
        refused(lambda: load(path / "packed", tp_plan="auto"))
    refused(lambda: load(path / "float", distributed_config=config, quantization_config=PlanQuantizationConfig(plan)))
    model = load(path / "float", distributed_config=config)
    refused(lambda: quantize_model(model, plan))
    layers = find_moe_layers(model)
    found["norms"] = norms_by_layer(layers)
    found["variances"] = {layer.name: max_variances(layer) for layer in layers}
    counter = LoadCounter(layers, model)
    found["logits"] = logits(model)
    found["loads"] = counter.take(training=True)
    counter.close()
    found["counted"] = count_loads(model, [{"input_ids": torch.arange(3, 90)[None]}])
    found["plan"] = allocate(model, method="weight_error", average_bits=3, bits=(2, 4), group_size=32).to_dict()
    found["curvature"] = curvature_of_a_step(model)
    torch.save(found, path / f"{split}_{dist.get_rank()}.pt")
    dist.destroy_process_group()


def pipeline(folder: str) -> None:
    """Looks for layers in a model of which each process holds half."""
    dist.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(
        Path(folder) / "float", distributed_config=DistributedConfig(pp_size=2)
    )
    try:
        found = str([layer.name for layer in find_moe_layers(model)])
    except MoELayerError as error:
        found = str(error)
    torch.save(found, Path(folder) / f"pipeline_{dist.get_rank()}.pt")
    dist.destroy_process_group()


def packed_under_fsdp2(folder: str) -> None:
    """Shards a packed model with FSDP2 and saves it, with its own tensors and with given ones."""
    dist.init_process_group("gloo")
    path = Path(folder)
    model = AutoModelForCausalLM.from_pretrained(path / "packed")
    before = logits(model)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    torch.testing.assert_close(logits(model), before)
    model.save_pretrained(path / "own")  # a collective
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:  # as trainers do
        model.save_pretrained(path / "given", state_dict=state)
    dist.barrier()
    dist.destroy_process_group()


def meshes(folder: str) -> None:
    """Counts how many processes share a batch where a user has split a model himself, as under Lightning."""
    dist.init_process_group("gloo")
    found = {}
    for data, tensor in ((1, 2), (2, 1)):
        mesh = dist.device_mesh.init_device_mesh(
            "cpu", (data, tensor), mesh_dim_names=("data_parallel", "tensor_parallel")
        )
        for sharded in (False, True):
            model = build("mixtral", num_experts_per_tok=2)
            if tensor > 1:
                attention = model.model.layers[0].self_attn
                parallelize_module(attention, mesh["tensor_parallel"], {"q_proj": ColwiseParallel()})
            if sharded:
                fully_shard(model, mesh=mesh["data_parallel"])
            found[data, tensor, sharded] = processes_per_batch(model)
    for named in (None, ("model",)):
        model = build("mixtral")
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,), mesh_dim_names=named)
        parallelize_module(model.model.layers[0].self_attn, mesh, {"q_proj": ColwiseParallel()})
        found[named] = processes_per_batch(model)
    torch.save(found, Path(folder) / f"meshes_{dist.get_rank()}.pt")
    dist.destroy_process_group()
