"""What an engine is given of a packed checkpoint is what transformers runs, and anything else is an error."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moe_precision import PlanError, allocate, load_model, quantize_model
from moe_precision.quantize.checksums import DamagedCheckpointError
from moe_precision.serving.errors import ServingError
from moe_precision.serving.names import is_packed, refuse_packed, refuse_packed_files, with_other_names
from moe_precision.serving.packed_model import PackedModel, same_packing
from moe_precision.serving.share import even_share, mapped_share
from tests.support.models import build, with_bits

ROWS = [[2, 0, 3, 16, 8, 2, 0, 4], [3, 0, 2, 16, 2, 8, 0, 1]]  # widths of gate_up_proj, and of down_proj


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss"])
def served(request, tmp_path_factory):
    """A packed model and its folder; gpt_oss has biases and gates between its rows."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = build(request.param, hidden_size=32, intermediate_size=32, num_hidden_layers=2, vocab_size=16)
    for name, parameter in model.named_parameters():
        if name.endswith("_bias"):
            torch.nn.init.normal_(parameter)
    plan = allocate(model, method="uniform", average_bits=2, group_size=32)
    plan = with_bits(plan, lambda layer, place, experts: ROWS[place][:experts])
    packed = quantize_model(model, plan)
    packed.save_pretrained(folder)
    return packed, folder


@pytest.fixture
def copied(served, tmp_path):
    """A copy of the folder that a test may change, and a function that edits its config.json."""
    folder = Path(shutil.copytree(served[1], tmp_path / "packed"))

    def edit(change):
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return folder, edit


def tensors_of(folder):
    return load_file(folder / "model.safetensors").items()


def filled(folder, shares, dtype=torch.float32, tensors=None):
    """Layer 1 as each of several processes holds it."""
    packed = PackedModel(folder, dtype)
    found = []
    for held in shares:
        experts = {name: packed.experts(name, held, "cpu") for name in packed.layers}
        list(packed.distribute(tensors_of(folder) if tensors is None else tensors, experts))
        found.append(experts["model.layers.1.mlp"])
    return found


def routed(hidden=32):
    torch.manual_seed(1)
    ids = torch.stack([torch.randperm(8)[:2] for _ in range(9)])
    return torch.randn(9, hidden), ids.int(), torch.rand(9, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shares", [[range(8)], [[0, 1, 2], [3, 4, 5, 6, 7]], [[1], [0, *range(2, 8)]], [[1, 3, 5, 7], [0, 2, 4, 6]]]
)
def test_processes_together_give_what_transformers_gives(served, shares):
    model, folder = served
    x, ids, weights = routed()
    expected = model.model.layers[1].mlp.experts(x, ids.long(), weights)
    parts = [experts(x, ids, weights) for experts in filled(folder, shares)]
    torch.testing.assert_close(sum(parts), expected, atol=1e-5, rtol=1e-5)


def test_a_token_for_no_expert_gets_nothing(served):
    x, ids, weights = routed()
    (experts,) = filled(served[1], [range(8)])
    assert not experts(x, torch.full_like(ids, -1), weights).any()


def test_what_is_not_packed_has_the_names_of_the_hub(served):
    model, folder = served
    packed = PackedModel(folder, torch.float32)
    others = dict(packed.distribute(tensors_of(folder), {}))
    assert not any(is_packed(name) or ".experts." in name for name in others)
    routers = {name for name in others if "layers.0" in name and ("gate" in name or "router" in name)}
    family = model.config.model_type
    expected = {
        "mixtral": {"model.layers.0.block_sparse_moe.gate.weight"},
        "gpt_oss": {"model.layers.0.mlp.router.weight", "model.layers.0.mlp.router.bias"},
    }
    assert routers == expected[family]


def test_an_engine_may_register_a_config_of_its_own(served, monkeypatch):
    """As vLLM does for kimi_linear: its class has other names than transformers' model asks for."""
    folder = served[1]
    family = served[0].config.model_type
    registered = type("Engine", (PreTrainedConfig,), {"model_type": family})
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, family, registered)
    assert type(AutoConfig.from_pretrained(folder)) is registered
    packed = PackedModel(folder, torch.float32)
    assert type(packed.model.config) is type(served[0].config)
    assert list(packed.layers) == ["model.layers.0.mlp", "model.layers.1.mlp"]


@pytest.mark.slow
def test_activations_of_16_bits_choose_the_kernel_that_transformers_chooses(served):
    (experts,) = filled(served[1], [range(8)], torch.bfloat16)
    theirs = load_model(served[1], dtype="bfloat16").moe_precision_kernels()
    for path, expected in theirs.items():
        if ".layers.1." in path:
            bucket = experts.experts.get_submodule(path.removeprefix("model.layers.1.mlp.experts."))
            assert bucket.described(torch.bfloat16) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["packed.down_proj.bits_2.ends", "packed.gate_up_proj.bits_16.matrices", "down_proj"])
def test_a_missing_tensor_is_an_error(served, name):
    tensors = [(key, value) for key, value in tensors_of(served[1]) if key != f"model.layers.1.mlp.experts.{name}"]
    with pytest.raises(ServingError, match=rf"'model.layers.1.mlp'.*1 tensors.*{name}"):
        filled(served[1], [range(8)], tensors=tensors)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.layers.1.mlp.experts.packed.down_proj.bits_5.codes", torch.zeros(1), "no expert of this width"),
        ("model.layers.1.mlp.experts.packed.other.bits_2.codes", torch.zeros(1), "no expert of this width"),
        ("model.layers.1.mlp.experts.packed.down_proj.bits_2.zeros", torch.zeros(1), "another format"),
        ("model.layers.1.mlp.experts.packed.down_proj.bits_2.codes", torch.zeros(2, 32, 8), "expected .*uint8"),
        ("model.layers.1.mlp.experts.packed.down_proj.bits_2.codes", torch.zeros(3, 32, 8).byte(), "expected"),
        ("model.layers.1.mlp.experts.down_proj", torch.zeros(8, 32, 32), "expected"),
        ("model.layers.7.mlp.experts.packed.down_proj.bits_2.codes", torch.zeros(1), "the plan has no such layer"),
    ],
)
def test_a_tensor_of_another_checkpoint_is_an_error(served, name, tensor, message):
    with pytest.raises(ServingError, match=message):
        filled(served[1], [range(8)], tensors=[(name, tensor)])


@pytest.mark.parametrize("name", ["model.layers.0.mlp.experts.packed.down_proj.bits_2.codes", "lm_head.weight"])
def test_a_tensor_that_comes_twice_is_an_error(served, name):
    tensors = [*tensors_of(served[1]), (name, dict(tensors_of(served[1]))[name])]
    with pytest.raises(ServingError, match="is in the checkpoint twice: another checkpoint lies beside it"):
        filled(served[1], [range(8)], tensors=tensors)


def test_an_engine_with_other_widths_is_an_error(served):
    checkpoint = PackedModel(served[1], torch.float32).checkpoint
    entry = json.loads(json.dumps(checkpoint.quantization))
    same_packing(entry, checkpoint)
    bits = entry["plan"]["layers"]["model.layers.1.mlp"]["projections"]["down_proj"]["bits"]
    bits[0], bits[2] = bits[2], bits[0]
    with pytest.raises(ServingError, match="without overrides of quantization_config"):
        same_packing(entry, checkpoint)


def test_experts_that_no_loader_has_filled_are_an_error(served):
    packed = PackedModel(served[1], torch.float32)
    experts = packed.experts("model.layers.0.mlp", range(8), "cpu")
    with pytest.raises(ServingError, match="default load format"):
        experts.check_filled("model.layers.0.mlp")


def test_layers_are_found_by_their_numbers(served):
    packed = PackedModel(served[1], torch.float32)
    assert packed.layer_at("model.layers.1.block_sparse_moe.experts") == "model.layers.1.mlp"
    with pytest.raises(ServingError, match=r"names no layer there; it names model.layers.0.mlp, model.layers.1.mlp"):
        packed.layer_at("model.layers.2.mlp.experts")


def test_a_config_without_its_quantization_is_an_error(copied):
    folder, edit = copied
    edit(lambda config: config.pop("quantization_config"))
    with pytest.raises(ServingError, match=r"copy the config\.json that was written with the weights"):
        PackedModel(folder, torch.float32)
    with pytest.raises(ServingError, match="'there' has no quantization_config"):
        list(refuse_packed(tensors_of(folder), "'there'"))
    with pytest.raises(ServingError, match="has no quantization_config"):
        refuse_packed_files(str(folder))


def test_float_weights_of_other_models_pass():
    tensors = [("model.layers.0.mlp.experts.0.w1.weight", torch.zeros(1)), ("packed.weight", torch.ones(1))]
    assert list(refuse_packed(tensors, "it")) == tensors


def test_another_plan_is_an_error(copied):
    folder, edit = copied

    def swap(config):
        bits = config["quantization_config"]["plan"]["layers"]["model.layers.1.mlp"]["projections"]["down_proj"]["bits"]
        bits[0], bits[2] = bits[2], bits[0]

    edit(swap)
    with pytest.raises(DamagedCheckpointError, match=r"does not belong to the config\.json"):
        PackedModel(folder, torch.float32).check_files()


def test_a_flipped_bit_is_an_error(copied):
    file = copied[0] / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedCheckpointError, match="is damaged"):
        PackedModel(copied[0], torch.float32).check_files()


@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        ("format_version", 4, PlanError, "format version 4, this release of moe-precision reads 3"),
        ("non_expert_bits", 8, ServingError, "packed experts only"),
        ("quant_method", "gptq", ServingError, "no quantization_config of moe_precision"),
    ],
)
def test_other_packing_is_an_error(copied, key, value, error, message):
    folder, edit = copied
    edit(lambda config: config["quantization_config"].update({key: value}))
    with pytest.raises(error, match=message):
        PackedModel(folder, torch.float32)


def test_another_model_is_an_error(copied):
    folder, edit = copied
    edit(lambda config: config.update(intermediate_size=64))
    with pytest.raises(PlanError, match="the plan is for another model"):
        PackedModel(folder, torch.float32)


def test_another_dtype_is_an_error(served):
    with pytest.raises(ServingError, match=r"got torch.float64.*--dtype bfloat16"):
        PackedModel(served[1], torch.float64)


def test_a_name_of_the_hub_that_is_not_here_is_an_error():
    with pytest.raises(ServingError, match="hf download nobody/absent"):
        PackedModel("nobody/absent", torch.float32)


@pytest.mark.slow
def test_experts_in_modules_are_an_error(tmp_path):
    model = build("switch_transformers")
    plan = allocate(model, method="uniform", average_bits=2, group_size=32)
    quantize_model(model, plan).save_pretrained(tmp_path)
    with pytest.raises(ServingError, match="load the model with transformers"):
        PackedModel(tmp_path, torch.float32)


def test_shares():
    assert [even_share(7, rank, 2) for rank in range(2)] == [[0, 1, 2], [3, 4, 5, 6]]
    assert mapped_share([0, -1, 1, -1]) == [0, 2]
    with pytest.raises(ServingError, match="use at most 2 processes"):
        even_share(2, 0, 3)
    with pytest.raises(ServingError, match="without load balancing"):
        mapped_share([1, 0])


def test_a_parameter_under_two_names_is_loaded_under_both():
    """As in vLLM's transformers backend: experts are registered first, and hold the router of the block as well."""
    block = torch.nn.ModuleDict({"experts": torch.nn.ModuleDict(), "gate": torch.nn.Linear(2, 3)})
    block["experts"]["gate"] = block["gate"]
    assert {name for name, _ in block.named_parameters()} == {"experts.gate.weight", "experts.gate.bias"}
    loaded = {"gate.weight", "a name of the checkpoint"}
    assert with_other_names(block, loaded) == {*loaded, "experts.gate.weight"}  # and not the bias
