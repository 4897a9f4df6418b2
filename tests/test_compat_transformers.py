"""What this package relies on in private names of transformers, PEFT and DeepSpeed: one test each, by its name."""

from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import silu
from transformers import MixtralForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.core_model_loading import PrefixChange, WeightRenaming
from transformers.distributed import DistributedConfig
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moe_precision import compat
from moe_precision.quantize import PlanHfQuantizer
from tests.support.models import PlainMoE, build


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


def test_experts_implementation():
    model = build("mixtral")
    model.set_experts_implementation("eager")
    assert compat.experts_implementation(model.model.layers[0].mlp.experts) == "eager"


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


def test_may_be_unused():
    model = build("mixtral")
    assert not compat.may_be_unused(model, "mtp.0.weight")
    model._keys_to_ignore_on_load_unexpected = [r"^mtp\."]
    assert compat.may_be_unused(model, "mtp.0.weight")
    assert type(model)._keys_to_ignore_on_load_unexpected is None


def test_dtype_plan():
    model = build("mixtral")
    assert compat.dtype_plan(model, torch.bfloat16) == {}
    model._keep_in_fp32_modules_strict = {"gate"}
    ((pattern, dtype),) = compat.dtype_plan(model, torch.bfloat16).items()
    assert "gate" in pattern
    assert dtype == torch.float32
    model._keep_in_fp32_modules, model._keep_in_fp32_modules_strict = {"norm"}, {"gate.weight"}  # one in float16 alone
    kept = compat.kept_in_float32(model)
    names = [name for name, _ in model.named_parameters() if any(pattern.search(name) for pattern in kept)]
    assert {name.split(".")[-2] for name in names} == {"gate", "norm", "input_layernorm", "post_attention_layernorm"}


def test_model_of_config():
    config = build("mixtral").config
    config.dtype = torch.bfloat16
    assert compat.model_of_config(MixtralForCausalLM, config).dtype == torch.bfloat16
    assert MixtralForCausalLM(config).dtype == torch.float32


def test_fill_buffers(tmp_path):
    """Those of a model on the meta device are then what loading gives, and its weights are still there."""
    model = build("mixtral")
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = compat.model_of_config(type(model), model.config)
    compat.fill_buffers(empty)
    loaded = dict(type(model).from_pretrained(tmp_path).named_buffers())
    assert loaded
    assert all(torch.equal(buffer, loaded[name]) for name, buffer in empty.named_buffers())
    assert all(parameter.is_meta for parameter in empty.parameters())


def test_tied_names():
    assert compat.tied_names(build("mixtral")) == {}
    assert compat.tied_names(PlainMoE()) == {}
    tied = compat.tied_names(build("mixtral", tie_word_embeddings=True))
    assert tied == {"lm_head.weight": "model.embed_tokens.weight"}


def test_removes_a_prefix():
    assert compat.removes_a_prefix(PrefixChange(prefix_to_remove="language_model", model_prefix="model"))
    assert not compat.removes_a_prefix(PrefixChange(prefix_to_add="language_model"))
    assert not compat.removes_a_prefix(WeightRenaming("a", "b"))


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


def test_save_under_hub_names(tmp_path):
    build("mixtral").save_pretrained(tmp_path / "hub")
    model = MixtralForCausalLM.from_pretrained(tmp_path / "hub")
    compat.save_under_module_names(model)
    compat.save_under_hub_names(model)
    model.save_pretrained(tmp_path / "again")
    names = [set(load_file(tmp_path / folder / "model.safetensors")) for folder in ("hub", "again")]
    assert names[0] == names[1]
    compat.save_under_hub_names(build("mixtral"))  # which never had anything to undo


def test_mark_as_float():
    model = build("mixtral")
    compat.mark_as_quantized(model.config)
    compat.mark_as_float(model)
    assert not hasattr(model.config, "_is_quantized")
    compat.mark_as_float(model)


def test_was_dequantized_on_loading():
    """By the attribute of transformers' operations; real releases are in tests/callbacks/test_save_of_releases.py."""
    model = build("mixtral")
    assert not compat.was_dequantized_on_loading(model)
    model._weight_conversions = [SimpleNamespace(operations=[SimpleNamespace(hf_quantizer=object())])]
    assert compat.was_dequantized_on_loading(model)


def test_parts_of_config():
    assert "qwen3_5_moe_text" in compat.parts_of_config("qwen3_5_moe")
    assert compat.parts_of_config("mixtral") == frozenset()
    assert compat.parts_of_config("PlainMoE") == frozenset()


def test_layer_classes():
    model = build("mixtral")
    assert compat.layer_classes(model) == {type(model.model.layers[0]).__name__}


def test_methods_of_quantizers_that_ours_overrides():
    own = {"pack", "plan", "saving", "waiting", "_is_of_a_new_head"}  # not transformers'
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


@pytest.mark.slow
def test_trainer_run(tmp_path):
    """Neither is among what a callback is given."""
    seen = []

    class Look(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            seen.append(compat.trainer_run())

        on_save = on_train_end = on_train_begin

    def train(folder, resume=None):
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder), max_steps=2 if resume else 1, use_cpu=True, report_to=[], save_steps=1
        )
        rows = [{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}] * 4
        Trainer(build("gpt_oss"), arguments, train_dataset=rows, callbacks=[Look()]).train(resume)

    train("one")
    assert set(seen) == {(str(tmp_path / "one"), None)}
    train("two", resume=str(tmp_path / "one" / "checkpoint-1"))
    assert set(seen[3:]) == {(str(tmp_path / "two"), str(tmp_path / "one" / "checkpoint-1"))}
    assert compat.trainer_run() == (None, None)


def test_split_by():
    model = build("mixtral")
    assert compat.split_by(model) == {}
    model.config.distributed_config = DistributedConfig(tp_size=1)
    assert compat.split_by(model) == {}
    model.config.distributed_config = DistributedConfig(tp_size=2, ep_size=2, fsdp_size=3)  # from_pretrained sets it
    assert compat.split_by(model) == {"tp_size": 2, "ep_size": 2, "fsdp_size": 3}
    assert "distributed_config" not in model.config.to_dict()  # a checkpoint never says how its model was split


def test_is_model_type():
    assert compat.is_model_type("mixtral")
    assert not compat.is_model_type("Module")


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
