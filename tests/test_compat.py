"""What this package relies on in private names of torch: one test each, by its name."""

import copy
import re
import weakref
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import SingleDeviceStrategy
from lightning_fabric.wrappers import _FabricModule
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from moe_precision import compat

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
        Fabric(accelerator="cpu", devices=1).setup,
    )
    names = [[name for name, _ in wrap(nn.Linear(2, 2)).named_children()] for wrap in wrappers]
    assert names == [[name] for name in compat.WRAPPED_AS]
    for wrap in wrappers:
        inner = nn.Linear(2, 2)
        assert compat.wrapped_in(dict(wrap(inner).named_children())) is inner
    assert compat.wrapped_in({"0": inner}) is None


def test_fabric_names_what_its_strategy_has_wrapped_twice():
    """As with DDP, where the module that runs is not the one that was given."""
    inner = nn.Sequential(nn.Linear(2, 2))
    given = nn.Sequential(inner)
    wrapper = _FabricModule(given, SingleDeviceStrategy(), original_module=inner)
    assert list(dict(wrapper.named_children())) == ["_forward_module", "_original_module"]
    assert compat.wrapped_in(dict(wrapper.named_children())) is given


def test_flat_parameter(one_process):
    linear = nn.Linear(2, 2)
    FullyShardedDataParallel(linear, device_id=torch.device("cpu"))
    assert list(compat.own_parameters(linear)) == [compat.FLAT_PARAMETER]


def test_what_wrappers_hold():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    linear = nn.Linear(64, 4)
    assert compat.inside(linear.weight) == []
    quantize_(linear, Int8WeightOnlyConfig())
    assert {tensor.dtype for tensor in compat.inside(linear.weight)} == {torch.int8, torch.float32}


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert compat.is_fake(nn.Linear(2, 2).weight)
    assert not compat.is_fake(nn.Linear(2, 2, device="meta").weight)


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


def test_forget_forward_pre_hook():
    linear, hook, other = nn.Linear(2, 2), lambda module, args: None, lambda module, args: None
    linear.register_forward_pre_hook(other)
    linear.register_forward_pre_hook(hook)
    copied = copy.deepcopy(linear)
    compat.forget_forward_pre_hook(copied, hook)
    assert compat.forward_pre_hooks(copied) == [other]
    assert compat.forward_pre_hooks(linear) == [other, hook]


def test_is_convolution():
    assert compat.is_convolution(nn.Conv1d(2, 2, 2))
    assert compat.is_convolution(nn.ConvTranspose1d(2, 2, 2))
    assert not compat.is_convolution(nn.Linear(2, 2))


@pytest.mark.slow
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


def test_call_through():
    """A module's own hooks are part of the call that is made, and its method `forward` stays as it is."""
    linear, order = nn.Linear(2, 2), []
    linear.register_forward_hook(lambda *args: order.append("hook"))

    def through(call):
        order.append("before")
        return call() + 1

    x = torch.ones(1, 2)
    plain = linear(x)
    compat.call_through(linear, through)
    assert torch.equal(linear(x), plain + 1)
    assert order == ["hook", "before", "hook"]
    assert torch.equal(linear.forward(x), plain)
    compat.called_as_before(linear)
    assert torch.equal(linear(x), plain)


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
