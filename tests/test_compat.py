"""What this package relies on in private names of torch, transformers, PEFT and DeepSpeed: a test each, by its name."""

import re
import weakref
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.functional import silu
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint
from transformers import MixtralForCausalLM
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moe_precision import compat
from moe_precision.quantize import PlanHfQuantizer
from tests.support.models import PlainMoE, build

PACKAGE = Path(compat.__file__).parent


def test_private_names_stay_in_compat():
    private = re.compile(r"\btorch\._[a-zA-Z]|\baten\._|^from (?:torch|transformers)\S* import .*\b_\w", re.MULTILINE)
    files = [file for file in PACKAGE.rglob("*.py") if file.name != "compat.py"]
    assert len(files) > 50
    assert [file.name for file in files if private.search(file.read_text(encoding="utf-8"))] == []


# -- torch: modules ---------------------------------------------------------------------------------------------------


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_wrapped_as(one_process):
    wrappers = (
        torch.compile,
        DistributedDataParallel,
        lambda module: FullyShardedDataParallel(module, device_id=torch.device("cpu")),
        checkpoint_wrapper,
    )
    names = [[name for name, _ in wrap(nn.Linear(2, 2)).named_children()] for wrap in wrappers]
    assert names == [[name] for name in compat.WRAPPED_AS]


def test_flat_parameter(one_process):
    linear = nn.Linear(2, 2)
    FullyShardedDataParallel(linear, device_id=torch.device("cpu"))
    assert list(compat.own_parameters(linear)) == [compat.FLAT_PARAMETER]


def test_own_parameters():
    linear = nn.Linear(2, 2, bias=False)
    linear.__dict__["weight"] = torch.zeros(2, 2)  # as hooks cover it
    own = compat.own_parameters(linear)
    assert isinstance(own["weight"], nn.Parameter)
    assert own["bias"] is None
    own["weight"] = nn.Parameter(torch.ones(2, 2))
    del linear.__dict__["weight"]
    assert linear.weight.sum() == 4
    assert list(compat.own_parameters(weight_norm(nn.Linear(2, 2)))) == ["bias"]


def test_forward_pre_hooks():
    linear, hook = nn.Linear(2, 2), lambda module, args: None
    handle = linear.register_forward_pre_hook(hook)
    assert compat.forward_pre_hooks(linear) == [hook]
    handle.remove()
    assert compat.forward_pre_hooks(linear) == []


def test_is_convolution():
    assert compat.is_convolution(nn.Conv1d(2, 2, 2))
    assert compat.is_convolution(nn.ConvTranspose1d(2, 2, 2))
    assert not compat.is_convolution(nn.Linear(2, 2))


def test_forget_compiled_code():
    linear = nn.Linear(2, 2, bias=False)
    compiled, x = torch.compile(linear, backend="eager"), torch.ones(1, 2)
    before = compiled(x)
    linear.register_forward_hook(lambda module, args, output: output + 1)
    compat.forget_compiled_code()
    torch.testing.assert_close(compiled(x), before + 1)


def test_methods_of_modules_that_packed_ones_override():
    class Module(nn.Linear):
        called = ()

        def _apply(self, *args, **kwargs):
            self.called += ("_apply",)
            return super()._apply(*args, **kwargs)

        def _save_to_state_dict(self, *args, **kwargs):
            self.called += ("_save_to_state_dict",)
            super()._save_to_state_dict(*args, **kwargs)

        def _load_from_state_dict(self, *args, **kwargs):
            self.called += ("_load_from_state_dict",)
            super()._load_from_state_dict(*args, **kwargs)

    inner = Module(2, 2)
    outer = nn.Sequential(inner)
    outer.load_state_dict(outer.to(torch.bfloat16).state_dict())
    assert inner.called == ("_apply", "_save_to_state_dict", "_load_from_state_dict")


# -- torch: autograd and memory ---------------------------------------------------------------------------------------


def test_version_of():
    tensor = torch.zeros(4)
    before = compat.version_of(tensor)
    tensor[1:].add_(1)
    assert compat.version_of(tensor) > before
    assert compat.version_of(tensor.detach()) == compat.version_of(tensor)


def test_storage_users():
    tensor = torch.zeros(4)
    assert compat.storage_users(tensor) == 1
    view = tensor[1:]
    assert compat.storage_users(tensor) == compat.storage_users(view) == 2
    del view
    assert compat.storage_users(tensor) == 1
    product = (tensor * torch.ones(4, requires_grad=True)).sum()  # autograd keeps the tensor itself, not a view
    kept = weakref.ref(tensor)
    del tensor
    assert compat.storage_users(kept()) == 1
    product.backward()


def test_in_backward_pass():
    seen = []

    def forward(x):
        seen.append(compat.in_backward_pass())
        return x.sin()

    x = torch.ones(2, requires_grad=True)
    checkpoint(forward, x, use_reentrant=False).sum().backward()
    assert seen == [False, True]
    assert not compat.in_backward_pass()


def test_run_first_in_backward():
    order = []

    def recorded(x, name, first=False):
        y = x * 2
        y.grad_fn.register_hook(lambda *_: order.append(name))
        if first:
            compat.run_first_in_backward(y.grad_fn)
        return y

    x = torch.ones(2, requires_grad=True)
    (recorded(x, "early", first=True) + recorded(x, "late")).sum().backward()
    (recorded(x, "early") + recorded(x, "late")).sum().backward()  # else what ran last in the forward pass
    assert order == ["early", "late", "late", "early"]


def test_saved_tensors_hooks_are_set():
    assert not compat.saved_tensors_hooks_are_set()
    with saved_tensors_hooks(lambda x: x, lambda x: x):
        assert compat.saved_tensors_hooks_are_set()
    assert not compat.saved_tensors_hooks_are_set()


def test_int4_kernel():
    assert compat.has_int4_kernel()
    codes = torch.randint(0, 16, (32, 64), dtype=torch.int32)
    both = torch.stack([torch.rand(2, 32) + 0.1, torch.randn(2, 32)], dim=-1).bfloat16()  # two groups of 32 inputs
    scale, zero = (part.float().T.repeat_interleave(32, dim=1) for part in both.unbind(-1))  # each (32, 64)
    weight = (codes.float() - 8) * scale + zero
    x = torch.randn(3, 64).bfloat16()
    packed = compat.pack_int4(codes)
    assert packed.dtype == torch.uint8
    assert packed.numel() == 32 * 64 / 2
    product, exact = compat.multiply_int4(x, packed, 32, both).float(), x.float() @ weight.T
    assert (product - exact).norm() < 0.01 * exact.norm()


# -- transformers -----------------------------------------------------------------------------------------------------


def test_register_experts_function():
    called = []

    def function(self, hidden_states, top_k_index, top_k_weights):
        called.append((type(self).__name__, tuple(top_k_index.shape)))
        return torch.zeros_like(hidden_states)

    compat.register_experts_function("of_this_test", function)
    model = build("mixtral")
    model.set_experts_implementation("of_this_test")
    model(input_ids=torch.tensor([[3, 4, 5]]))
    assert called == [("MixtralExperts", (3, 2))] * 2


def test_runs_through_experts_interface():
    experts = build("gpt_oss").model.layers[0].mlp.experts
    assert compat.runs_through_experts_interface(experts)
    flags = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
    assert [getattr(experts, flag) for flag in flags] == [True, True, True, False]
    assert not compat.runs_through_experts_interface(PlainMoE().experts)


def test_apply_gate():
    experts, hidden = build("mixtral").model.layers[0].mlp.experts, torch.randn(3, 256)
    torch.testing.assert_close(compat.apply_gate(experts, hidden), silu(hidden[:, :128]) * hidden[:, 128:])


def test_grouped_linear():
    x, weights = torch.randn(5, 16), torch.randn(2, 8, 16)
    found = compat.grouped_linear(x, weights, torch.tensor([2, 5], dtype=torch.int32))
    torch.testing.assert_close(found, torch.cat([x[:2] @ weights[0].T, x[2:] @ weights[1].T]))


def test_was_read_and_mark_as_read(tmp_path):
    build("mixtral").save_pretrained(tmp_path)
    loaded = MixtralForCausalLM.from_pretrained(tmp_path)
    assert all(compat.was_read(parameter) for parameter in loaded.parameters())
    fresh = build("mixtral")
    assert not any(compat.was_read(parameter) for parameter in fresh.parameters())
    kept, other = (layer.mlp.gate for layer in fresh.model.layers)
    for gate in (kept, other):
        nn.init.constant_(gate.weight, 7)
        gate._is_hf_initialized = False  # as before transformers has seen the module
    compat.mark_as_read([kept.weight])
    assert compat.was_read(kept.weight)
    fresh._init_weights(kept)
    fresh._init_weights(other)
    assert (kept.weight == 7).all()
    assert not (other.weight == 7).any()


def test_may_be_missing():
    model = build("mixtral")
    assert not compat.may_be_missing(model, "model.layers.0.mlp.gate.weight")
    model._keys_to_ignore_on_load_missing = [r"gate\.bias$"]
    assert compat.may_be_missing(model, "model.layers.0.mlp.gate.bias")
    assert type(model)._keys_to_ignore_on_load_missing is None  # the attribute of transformers' classes


def test_tied_names():
    assert compat.tied_names(build("mixtral")) == {}
    assert compat.tied_names(PlainMoE()) == {}
    tied = compat.tied_names(build("mixtral", tie_word_embeddings=True))
    assert tied == {"lm_head.weight": "model.embed_tokens.weight"}


def test_save_under_module_names(tmp_path):
    build("mixtral").save_pretrained(tmp_path / "hub")
    model = MixtralForCausalLM.from_pretrained(tmp_path / "hub")
    written = []
    for name in ("hub names", "module names"):
        if name == "module names":
            compat.save_under_module_names(model)
        model.save_pretrained(tmp_path / name)
        written.append(set(load_file(tmp_path / name / "model.safetensors")))
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in written[0]
    assert written[1] == set(model.state_dict())


def test_mark_as_quantized():
    model = build("mixtral")
    compat.mark_as_quantized(model.config)
    assert model.config._is_quantized
    assert "_is_quantized" not in model.config.to_dict()  # config.json never holds it


def test_layer_classes():
    model = build("mixtral")
    assert compat.layer_classes(model) == {type(model.model.layers[0]).__name__}


def test_methods_of_quantizers_that_ours_overrides():
    own = {"pack", "plan", "waiting"}  # not transformers'
    overridden = {name for name in vars(PlanHfQuantizer) if not name.startswith(("__", "_abc_"))} - own
    assert "_process_model_before_weight_loading" in overridden
    assert [name for name in overridden if not hasattr(HfQuantizer, name)] == []


def test_conversion_ops(tmp_path):
    """A quantizer's operation gets the weight of every parameter that it asks for, and the model that is loading."""
    seen = {}

    class Operation(compat.ConversionOps):
        def convert(self, input_dict, **kwargs):
            (value,) = input_dict.values()
            seen[kwargs["full_layer_name"]] = type(kwargs["model"])
            assert kwargs["full_layer_name"] in kwargs["missing_keys"]
            return {kwargs["full_layer_name"]: value[0] if isinstance(value, list) else value}

    @register_quantization_config("of_this_test")
    class Config(QuantizationConfigMixin):
        def __init__(self):
            self.quant_method = "of_this_test"

    @register_quantizer("of_this_test")
    class Quantizer(HfQuantizer):
        is_trainable = True

        def is_serializable(self):
            return True

        def param_needs_quantization(self, model, param_name, **kwargs):
            return "gate_up_proj" in param_name

        def get_quantize_ops(self):
            return Operation()

    build("mixtral").save_pretrained(tmp_path)
    MixtralForCausalLM.from_pretrained(tmp_path, quantization_config=Config())
    assert seen == dict.fromkeys((f"model.layers.{i}.mlp.experts.gate_up_proj" for i in (0, 1)), MixtralForCausalLM)


# -- PEFT and DeepSpeed -----------------------------------------------------------------------------------------------


def test_available_adapters():
    model = peft.get_peft_model(build("mixtral"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["k_proj"]))
    attention = model.base_model.model.model.layers[0].self_attn
    assert compat.available_adapters(attention.q_proj) == {"default"}
    assert compat.available_adapters(attention.k_proj) == {"other"}


def test_zero3_parameters():
    """The attributes that DeepSpeed puts on placeholders; a run of it is in tests/callbacks/test_zero3.py."""
    placeholder = SimpleNamespace(ds_id=3, ds_shape=torch.Size([4, 2]), shape=torch.Size([0]))
    assert compat.is_zero3_parameter(placeholder)
    assert compat.full_shape(placeholder) == (4, 2)
    assert not compat.is_zero3_parameter(nn.Parameter(torch.zeros(4, 2)))
    assert compat.full_shape(nn.Parameter(torch.zeros(4, 2))) == (4, 2)
