"""Reads norms and variances of a model that raw FSDP1 has sharded over two CPU processes; see test_fsdp1.py."""

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer

from moe_precision import MoELayerError, RouterNormHistory, find_moe_layers
from moe_precision.recording.router_norms import router_norms
from tests.support.models import build


def measured(model: nn.Module) -> dict:
    layers = find_moe_layers(model)
    history = RouterNormHistory.of(layers, "mixtral")
    history.record(0, router_norms(layers))
    history.measure_variance(layers)
    return history.state_dict()


def main(folder: str, rank: int) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    expected = measured(build("mixtral"))
    results = {}
    for original in (True, False):
        for policy in (ModuleWrapPolicy({MixtralDecoderLayer}), None):  # one unit per layer, or the whole model in one
            # as Lightning wraps: the root unit is outside the transformers model
            sharded = FSDP(
                nn.ModuleDict({"model": build("mixtral")}),
                auto_wrap_policy=policy,
                use_orig_params=original,
                device_id=torch.device("cpu"),
            )
            case = f"original={original}, policy={policy is not None}"
            results[case] = measured(sharded)
            try:
                find_moe_layers(sharded)[0].router_weight()
                results[case + " outside"] = "no error"
            except MoELayerError as error:
                results[case + " outside"] = str(error)
            local = max((p.numel() for p in sharded.parameters()), default=0)
            results[case + " still sharded"] = local < sum(p.numel() for p in build("mixtral").parameters())
    torch.save({"expected": expected, "results": results}, f"{folder}/result_{rank}.pt")
    torch.distributed.destroy_process_group()
