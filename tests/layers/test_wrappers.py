"""A wrapped model has the names and the norms of the plain one."""

import sys
from types import ModuleType, SimpleNamespace

import peft
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn.utils.parametrizations import weight_norm
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer

from moe_precision import (
    MoELayerError,
    QuantizationError,
    RouterNormHistory,
    allocate,
    find_moe_layers,
    quantize_model,
)
from moe_precision.recording.router_norms import router_norms
from tests.support.models import PlainMoE, build


def names(model):
    return [(layer.name, layer.router, layer.projections) for layer in find_moe_layers(model)]


def measured(model):
    """Norms and variances."""
    layers = find_moe_layers(model)
    history = RouterNormHistory.of(layers, "")
    history.measure_variance(layers)
    return router_norms(layers), torch.stack(list(history.max_variance.values()))


def test_compile_and_activation_checkpointing(mixtral):
    plain, values = names(mixtral), measured(mixtral)
    compiled = torch.compile(mixtral)
    assert names(compiled) == plain
    apply_activation_checkpointing(mixtral, check_fn=lambda module: isinstance(module, MixtralDecoderLayer))
    assert any("_checkpoint_wrapped_module" in name for name, _ in mixtral.named_modules())
    assert names(compiled) == plain
    torch.testing.assert_close(measured(compiled), values)


def test_ddp(mixtral, tmp_path):
    plain, values = names(mixtral), measured(mixtral)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(torch.compile(mixtral))
        assert names(wrapped) == plain
        torch.testing.assert_close(measured(wrapped), values)
    finally:
        torch.distributed.destroy_process_group()


def trained_adapters(model):
    """Adapters as training leaves them: none is zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


LORA = [
    {"target_modules": ["gate"]},
    {"target_parameters": ["mlp.gate.weight"], "target_modules": []},
    {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
]


@pytest.mark.parametrize("settings", LORA, ids=["router module", "router parameter", "experts"])
def test_lora_norms_are_those_of_the_merged_model(settings):
    model = build("mixtral")
    plain, untouched = names(model), measured(model)
    adapted = trained_adapters(peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **settings)))
    assert names(adapted) == plain
    effective = measured(adapted)
    with adapted.disable_adapter():
        torch.testing.assert_close(measured(adapted), untouched)
    merged = adapted.merge_and_unload()
    assert names(merged) == plain
    torch.testing.assert_close(effective, measured(merged))
    assert not torch.equal(torch.cat([v.flatten() for v in effective]), torch.cat([v.flatten() for v in untouched]))


@pytest.mark.slow
def test_lora_on_linear_experts_and_router():
    model = build("switch_transformers")
    plain = names(model)
    adapted = trained_adapters(peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["classifier", "wi"])))
    assert names(adapted) == plain
    effective = measured(adapted)
    torch.testing.assert_close(effective, measured(adapted.merge_and_unload()))


def test_a_wrapped_model_is_not_quantized_in_place():
    model = build("mixtral")
    plan = allocate(model, method="uniform", average_bits=2, group_size=64)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(QuantizationError, match=r"behind a wrapper.*merge_and_unload"):
        quantize_model(adapted, plan)


def test_an_adapter_that_does_not_add_is_an_error():
    model = build("switch_transformers")
    settings = peft.LoraConfig(r=4, target_modules=["classifier"], use_dora=True)
    adapted = peft.get_peft_model(model, settings)
    layers = find_moe_layers(adapted)
    with pytest.raises(MoELayerError, match=r"router\.classifier\.weight' is trained through PEFT's lora .*no DoRA"):
        router_norms(layers)


@pytest.mark.parametrize("settings", [peft.OFTConfig, peft.HiraConfig, peft.HRAConfig, peft.BOFTConfig, peft.IA3Config])
def test_adapters_that_turn_or_scale_are_errors(settings, monkeypatch):
    for compiler in ("CC", "CXX"):  # BOFT sets them to gcc and does not restore them
        monkeypatch.setenv(compiler, "")
    keys = {"feedforward_modules": []} if settings is peft.IA3Config else {}
    adapted = peft.get_peft_model(build("switch_transformers"), settings(target_modules=["classifier"], **keys))
    with pytest.raises(MoELayerError, match="does not simply add to the weight"):
        router_norms(find_moe_layers(adapted))


def test_an_adapter_on_a_bfloat16_router_is_not_rounded_away():
    model = build("switch_transformers").bfloat16()
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["classifier"]), autocast_adapter_dtype=True
    )
    before = router_norms(find_moe_layers(adapted))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(1e-3)
    after = router_norms(find_moe_layers(adapted))
    for layer, changed in zip(find_moe_layers(adapted), (after - before).split(8), strict=True):
        module = adapted.get_submodule("base_model.model." + layer.router.removesuffix(".weight"))
        weight = module.base_layer.weight.double() + module.get_delta_weight("default").double()
        expected = weight.norm(dim=1) - module.base_layer.weight.double().norm(dim=1)
        torch.testing.assert_close(changed, expected.float(), atol=3e-6, rtol=1e-2)
        assert expected.abs().max() > 3e-5


def test_modules_to_save_reads_the_trained_copy(mixtral):
    plain = names(mixtral)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["gate"])
    adapted = peft.get_peft_model(mixtral, settings)
    assert names(adapted) == plain
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.fill_(0.5)
    torch.testing.assert_close(router_norms(find_moe_layers(adapted)), torch.full((16,), 0.5 * 64**0.5))
    with adapted.disable_adapter():
        assert router_norms(find_moe_layers(adapted)).max() < 1


def test_a_parametrized_router_is_read_as_it_is_used():
    model = PlainMoE()
    plain = names(model)
    weight_norm(model.router)
    with torch.no_grad():
        model.router.parametrizations.weight.original0.fill_(3.0)
    assert names(model) == plain
    torch.testing.assert_close(router_norms(find_moe_layers(model)), torch.full((4,), 3.0))


class GatheredParameters:
    """What deepspeed.zero.GatheredParameters promises: a list of placeholders is whole inside, empty again after."""

    entered = 0

    def __init__(self, params, modifier_rank=None):
        assert isinstance(params, list)  # DeepSpeed ignores other iterables silently
        assert modifier_rank is None  # nothing is written
        self.params = params

    def __enter__(self):
        type(self).entered += 1
        for parameter in self.params:
            parameter.data = parameter.ds_tensor

    def __exit__(self, *_):
        for parameter in self.params:
            parameter.data = torch.empty(0)


@pytest.fixture
def zero3(monkeypatch):
    package = ModuleType("deepspeed")
    package.zero = SimpleNamespace(GatheredParameters=GatheredParameters)
    monkeypatch.setitem(sys.modules, "deepspeed", package)
    monkeypatch.setattr(GatheredParameters, "entered", 0)

    def partition(model):
        for index, parameter in enumerate(model.parameters()):
            parameter.ds_id, parameter.ds_shape, parameter.ds_tensor = index, parameter.shape, parameter.data
            parameter.data = torch.empty(0)
        return model

    return partition


@pytest.mark.parametrize("family", ["mixtral", "switch_transformers"])
def test_zero3_placeholders_are_gathered(family, zero3):
    """A stand-in of DeepSpeed's contract; DeepSpeed itself needs a compiler and is not installed here."""
    model = build(family)
    plain, values = names(model), measured(model)
    zero3(model)
    assert names(model) == plain
    torch.testing.assert_close(measured(model), values)
    assert GatheredParameters.entered > 0
    layer = find_moe_layers(model)[0]
    with pytest.raises(MoELayerError, match=r"has shape \(0,\) on this rank, expected \(8, 64\)"):
        layer.router_weight()
    with pytest.raises(MoELayerError, match="is a shard"):
        layer.expert_weights(0)
    with layer.whole():
        assert layer.router_weight().shape == (8, 64)
