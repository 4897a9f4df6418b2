"""A checkpoint folder is opened once: its config, what its files hold, its tensors, routers and expert matrices."""

import json
import os
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import moe_precision
from moe_precision import PrecisionPlan, allocate, find_moe_layers, quantize_model
from moe_precision.allocation.weights import StoredWeights
from moe_precision.checkpoints import Checkpoint, CheckpointError, load_model
from moe_precision.export import plan_of_checkpoint
from tests.checkpoints.test_checkpoint_signals import LAYOUTS
from tests.support.model_zoo import build_tiny
from tests.support.models import build, logits


@pytest.fixture
def saved(tmp_path):
    model = build("mixtral")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    return model, tmp_path


def open_files(folder: Path) -> list[str]:
    """Files below a folder that this process holds open, as often as it does."""
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    found = [os.readlink(link) for link in links if os.path.lexists(link)]
    return sorted(os.path.basename(path) for path in found if path.startswith(str(folder.resolve())))


def test_headers_describe_every_tensor(saved):
    _, folder = saved
    checkpoint = Checkpoint(str(folder))
    assert checkpoint.folder == folder
    assert checkpoint.files == sorted(folder.glob("*.safetensors"))
    stored = {name: (t, file) for file in checkpoint.files for name, t in load_file(file).items()}
    assert checkpoint.tensors.keys() == stored.keys()
    for name, (tensor, file) in stored.items():
        found = checkpoint.tensors[name]
        assert (found.dtype, found.shape, found.nbytes, found.file) == ("F32", tensor.shape, 4 * tensor.numel(), file)
    assert checkpoint.nbytes == 4 * sum(tensor.numel() for tensor, _ in stored.values())


def test_tensors_are_read_whole_and_in_part(saved):
    _, folder = saved
    checkpoint = Checkpoint(folder)
    for file in checkpoint.files:
        for name, tensor in load_file(file).items():
            assert torch.equal(checkpoint.read(name), tensor)
            assert torch.equal(checkpoint.slice(name)[1:3], tensor[1:3])
    for read in (checkpoint.read, checkpoint.slice):
        with pytest.raises(CheckpointError, match=r"has no tensor 'lm_head\.bias'"):
            read("lm_head.bias")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts open files in /proc")
def test_files_are_opened_when_they_are_read_and_once(saved):
    _, folder = saved
    with Checkpoint(folder) as checkpoint:
        assert len(checkpoint.sources) > 10
        assert open_files(folder) == []
        first = list(load_file(checkpoint.files[0]))
        for name in (*first, *first):
            checkpoint.read(name)
        assert open_files(folder) == [checkpoint.files[0].name]
        for name in checkpoint.tensors:
            checkpoint.slice(name)
        assert open_files(folder) == [file.name for file in checkpoint.files]
    assert open_files(folder) == []
    checkpoint.read(first[0])  # opens it again
    assert open_files(folder) == [checkpoint.files[0].name]
    allocate(folder, method="weight_error", average_bits=2.5, group_size=64)
    assert open_files(folder) == [checkpoint.files[0].name]
    checkpoint.close()
    assert open_files(folder) == []


@pytest.mark.slow
def test_one_open_checkpoint_serves_signals_and_costs(saved):
    _, folder = saved
    with Checkpoint(folder) as checkpoint:
        weights = StoredWeights(checkpoint)
        signals, costs = weights.snapshot(variance=True), weights.costs((2, 3), 64, None)
    other = StoredWeights(Checkpoint(folder))
    torch.testing.assert_close(costs, other.costs((2, 3), 64, None), rtol=0, atol=0)
    torch.testing.assert_close(signals.router_norms, other.snapshot(variance=False).router_norms, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("family", LAYOUTS)
def test_routers_and_matrices_are_those_of_the_model(family, tmp_path):
    model = build_tiny(family)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    checkpoint = Checkpoint(tmp_path)
    layers = {layer.name: layer for layer in find_moe_layers(model)}
    found = checkpoint.layers()
    assert [layer.shape for layer in found] == [layer.shape for layer in layers.values()]
    assert checkpoint.model_type == model.config.model_type
    for layer in found:
        expected = layers[layer.name]
        assert torch.equal(checkpoint.router_weight(layer), expected.router_weight())
        for projection in layer.projections:
            matrices = list(checkpoint.matrices(layer, projection))
            assert len(matrices) == layer.num_experts
            for expert, matrix in enumerate(matrices):
                assert torch.equal(matrix, expected.expert_weights(expert)[projection])
        for expert, neurons in enumerate(checkpoint.matrices(layer, layer.first, neurons_alone=True)):
            assert torch.equal(neurons, expected.first_projection(expert))


def test_rows_of_a_router_belong_to_experts(saved):
    model, folder = saved
    checkpoint = Checkpoint(folder)
    layer = checkpoint.layers()[1]
    weight = model.get_parameter(layer.router)
    assert torch.equal(checkpoint.router_weight(layer), weight)
    assert torch.equal(checkpoint.router_weight(replace(layer, router_transposed=True)), weight.T)


def test_patterns_reach_the_search_for_layers(saved):
    checkpoint = Checkpoint(saved[1])
    with pytest.raises(ValueError, match="expert_pattern='nothing' matches no matrix"):
        checkpoint.layers({"expert_pattern": "nothing"})


def test_a_new_model_on_meta_each_time(saved):
    model, folder = saved
    checkpoint = Checkpoint(folder)
    one, other = checkpoint.meta_model(), checkpoint.meta_model()
    assert one is not other
    shapes = [{name: t.shape for name, t in of.state_dict().items()} for of in (one, other, model)]
    assert shapes[0] == shapes[1] == shapes[2]
    assert all(parameter.is_meta for parameter in one.parameters())
    one.config.num_hidden_layers = 1
    assert checkpoint.config.num_hidden_layers == other.config.num_hidden_layers == 2
    assert checkpoint.config is checkpoint.config  # read once


def test_it_is_opened_anew_in_another_process(saved):
    checkpoint = Checkpoint(saved[1])
    name = checkpoint.layers()[0].router
    before = checkpoint.read("model.norm.weight")
    again = pickle.loads(pickle.dumps(checkpoint))
    assert again is not checkpoint
    assert again.tensors == checkpoint.tensors
    assert torch.equal(again.read("model.norm.weight"), before)
    assert again.layers()[0].router == name


@pytest.mark.parametrize("inner", [False, True], ids=["config", "text_config"])
def test_a_quantizer_in_the_config_of_either_place(inner, saved):
    _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    assert not Checkpoint(folder).is_quantized
    named = {"quantization_config": {"quant_method": "gptq"}}
    (folder / "config.json").write_text(json.dumps(config | ({"text_config": named} if inner else named)))
    assert Checkpoint(folder).is_quantized
    assert Checkpoint(folder).quantization == {"quant_method": "gptq"}


@pytest.mark.slow
def test_the_float_model_of_a_packed_checkpoint(tmp_path):
    model = build("mixtral")
    names = list(model.state_dict())
    plan = allocate(model, method="uniform", average_bits=2, bits=(2,), group_size=64)
    expected = logits(quantize_model(model, plan))
    model.save_pretrained(tmp_path)
    with Checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.meta_model().state_dict()) == names
        assert not hasattr(checkpoint.meta_model().config, "quantization_config")
        assert plan_of_checkpoint(checkpoint).diff(plan) == []
        assert torch.equal(logits(checkpoint.load()), expected)
    assert torch.equal(logits(load_model(tmp_path, dtype=torch.float32)), expected)


@pytest.mark.parametrize("written", ["{", "[]", "\xff", '{"quantization_config": "x"}'])
def test_a_damaged_config(written, saved):
    _, folder = saved
    (folder / "config.json").write_text(written, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json' is damaged"):
        Checkpoint(folder)


def test_a_class_that_transformers_lacks(saved):
    _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["MyMoE"]}))
    checkpoint = Checkpoint(folder)
    assert "lm_head.weight" in checkpoint.tensors
    for use in (checkpoint.load, checkpoint.layers):
        with pytest.raises(CheckpointError, match=r"names architectures \['MyMoE'\], which transformers lacks"):
            use()


def test_bits_of_a_checkpoint_without_experts(saved, tmp_path):
    plan: PrecisionPlan = allocate(saved[0], method="uniform", average_bits=2, bits=(2,), group_size=64)
    assert Checkpoint(tmp_path).stored_bits_per_expert_weight(plan) == 32
    dense = build("mixtral")
    for layer in dense.model.layers:
        layer.mlp.experts = None
    dense.save_pretrained(tmp_path / "dense")
    with pytest.raises(CheckpointError, match="no tensor below a module called 'experts'"):
        Checkpoint(tmp_path / "dense").stored_bits_per_expert_weight(plan)


def test_a_config_is_read_in_one_place():
    root = Path(moe_precision.__file__).parents[1]
    files = [file for name in ("moe_precision", "callbacks", "recipes") for file in (root / name).rglob("*.py")]
    assert len(files) > 80
    reading = [file.name for file in files if "AutoConfig.from_pretrained(" in file.read_text(encoding="utf-8")]
    assert reading == ["config.py"]


def test_the_working_directory_may_change(saved, monkeypatch, tmp_path):
    _, folder = saved
    monkeypatch.chdir(folder.parent)
    with Checkpoint(folder.name) as checkpoint:
        monkeypatch.chdir(tmp_path)
        assert checkpoint.layers()[0].num_experts == 8
        assert checkpoint.read(next(iter(checkpoint.tensors))).numel() > 0
        assert checkpoint.load().config.model_type == "mixtral"
        assert checkpoint.name == folder.name


@pytest.mark.slow
def test_an_open_checkpoint_serves_everywhere(saved):
    _, folder = saved
    how = {"method": "weight_error", "group_size": 64}
    with Checkpoint(folder) as checkpoint:
        assert allocate(checkpoint, checkpoint, **how).diff(allocate(folder, folder, **how)) == []
        assert load_model(checkpoint).config.model_type == "mixtral"


def test_a_folder_of_adapters_says_merge_first(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = build("mixtral")
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError,
        match=r"no model: merge first(?s:.*)PeftModelForCausalLM.from_pretrained\('.*'\).merge_and_unload\(\)",
    ):
        Checkpoint(tmp_path)
