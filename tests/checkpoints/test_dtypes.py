"""Tensors that a family keeps in float32 stay in it wherever a model is cast, as in transformers' own save and load."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3PreTrainedModel

from moe_precision import PlanQuantizationConfig, allocate, find_moe_layers, quantize_model
from moe_precision.callbacks import SavePretrained
from moe_precision.checkpoints import Checkpoint, load_model
from moe_precision.checkpoints.dtypes import cast
from moe_precision.export import auto_round_backend
from moe_precision.quantize.writer import quantize_checkpoint
from tests.support.model_zoo import build_tiny
from tests.support.models import build
from tests.support.trainers import Module, trainer

BIAS = "mlp.gate.e_score_correction_bias"
KEPT = tuple(DeepseekV3PreTrainedModel._keep_in_fp32_modules_strict)  # the router too from transformers 5.24 on


def close_scores(**changes):
    """A DeepSeek-V3 of 64 experts whose correction terms lie closer together than bfloat16 tells apart."""
    model = build("deepseek_v3", n_routed_experts=64, **changes)
    for layer in find_moe_layers(model):
        gate = model.get_submodule(layer.router.removesuffix(".weight"))
        gate.e_score_correction_bias.copy_(1 + torch.randperm(64, generator=torch.Generator().manual_seed(0)) / 1024)
        gate.weight.data /= 10
    return model


def chosen(model):
    """Experts of every token in the first layer that has any."""
    seen = []
    layer = find_moe_layers(model)[0]
    hook = layer.container().register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    with torch.no_grad():
        model(input_ids=torch.arange(3, 123)[None])
    hook.remove()
    return seen[0].sort(dim=-1).values


class Language(Module):
    def loss(self, x):
        return self.model(input_ids=x, labels=x).loss

    def on_train_batch_end(self, *args):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.slow
def test_a_saved_model_chooses_the_experts_of_the_trained_one(tmp_path):
    model = close_scores()
    tokens = DataLoader(torch.randint(3, 128, (4, 8)), batch_size=4)
    trainer(tmp_path, SavePretrained(dtype="bfloat16")).fit(Language(model), tokens)
    stored = load_file(tmp_path / "checkpoint" / "model.safetensors")
    for name, tensor in stored.items():
        assert tensor.dtype == (torch.float32 if name.endswith(KEPT) else torch.bfloat16)
        assert not name.endswith(BIAS) or len(tensor.unique()) == 64
    again = load_model(tmp_path / "checkpoint")
    assert again.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "by_transformers")
    expected = chosen(load_model(tmp_path / "by_transformers", dtype=torch.bfloat16))
    assert torch.equal(chosen(again), expected)
    rounded = chosen(model.eval().to(torch.bfloat16))  # what all in bfloat16 would choose
    assert (rounded != expected).any(dim=-1).float().mean() > 0.3


# families that keep routers, correction terms, norms, convolutions or sinks in float32; some of them in float16 only
FAMILIES = ["deepseek_v3", "ernie4_5_moe", "gpt_oss", "hy_v4", "longcat_flash", "mistral_large4_text", "nemotron_h"]


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES, "mixtral"])
def test_casting_is_what_transformers_does(family, tmp_path):
    model = build_tiny(family).float()
    model.save_pretrained(tmp_path)
    kept = 0
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        expected = type(model).from_pretrained(tmp_path, dtype=dtype).state_dict()
        found = cast(model, model.state_dict(), dtype)
        assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in expected.items()}
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items() if tensor.isfinite().all())
        kept += sum(t.dtype == torch.float32 for t in expected.values()) if dtype != torch.float32 else 0
    assert (kept > 0) == (family != "mixtral")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe", "gpt_oss"])
def test_packed_models_keep_what_the_float_one_keeps(family, dtype, tmp_path):
    build_tiny(family).float().save_pretrained(tmp_path / "float32")
    model = load_model(tmp_path / "float32", dtype=dtype)
    model.save_pretrained(tmp_path / "float")
    plan = allocate(model, method="uniform", average_bits=4, bits=(4,), group_size=32)
    quantize_checkpoint(tmp_path / "float", plan, tmp_path / "written")
    load_model(tmp_path / "float", quantization_config=PlanQuantizationConfig(plan)).save_pretrained(
        tmp_path / "loaded"
    )
    expected = model.state_dict()
    for folder in ("written", "loaded"):
        found = load_model(tmp_path / folder).state_dict()
        same = [name for name, tensor in expected.items() if name in found and found[name].shape == tensor.shape]
        assert len(same) > len(expected) / 2
        for name in same:
            assert found[name].dtype == expected[name].dtype, name
            assert torch.equal(found[name], expected[name]), name
    half = load_model(tmp_path / "written", dtype=torch.float16 if dtype == torch.bfloat16 else torch.bfloat16)
    other = load_model(tmp_path / "float", dtype=half.dtype).state_dict()
    assert all(half.state_dict()[name].dtype == other[name].dtype for name in same)


@pytest.mark.slow
def test_what_auto_round_has_rounded_is_restored(tmp_path):
    close_scores().save_pretrained(tmp_path / "float")
    load_model(tmp_path / "float", dtype=torch.bfloat16).save_pretrained(tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    save_file({name: t.bfloat16() for name, t in load_file(file).items()}, file, metadata={"format": "pt"})
    auto_round_backend._restore_float32(tmp_path / "out", Checkpoint(tmp_path / "float"))
    found, expected = load_file(file), load_file(tmp_path / "float" / "model.safetensors")
    assert {name for name, t in found.items() if t.dtype == torch.float32} == {n for n in found if n.endswith(KEPT)}
    assert all(torch.equal(found[name], expected[name]) for name in found if name.endswith(BIAS))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["deepseek_v32", "mistral_large4_text"])
def test_linear_layers_that_stay_in_float32_are_not_packed(family):
    model = build_tiny(family).float()
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    kept = {name for name in linears if name.endswith("indexer.weights_proj")}
    assert kept
    plan = allocate(model, method="uniform", average_bits=4, bits=(4,), group_size=32)
    quantize_model(model, plan, non_expert_bits=8)
    left = {name for name in linears if isinstance(model.get_submodule(name), torch.nn.Linear)}
    assert kept <= left
    assert len(left) < len(linears) / 2
