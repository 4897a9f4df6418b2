"""AutoRound carries a plan out, expert by expert and projection by projection."""

import pytest
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_precision.cli.main import main
from moe_precision.export import export, plan_of_checkpoint
from tests.export.real_tools.conftest import TEXT
from tests.support.models import fresh_python


def test_every_expert_gets_its_bits_and_the_model_loads(checkpoint, plan, tmp_path):
    found = export(plan, "autoround")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    rtn = {"iters": 0, "disable_opt_rtn": True, "device_map": "cpu"}
    rounder = AutoRound(model, tokenizer, bits=4, group_size=64, layer_config=found.config, **rtn)
    rounder.quantize_and_save(str(tmp_path), format="auto_round")
    (config,) = tmp_path.glob("**/config.json")
    read = plan_of_checkpoint(config.parent)
    assert read.diff(found.plan) == []
    assert read.notes["group_sizes"] == [64]
    plan.save(tmp_path / "plan.json")
    # in a process of its own: AutoRound leaves transformers' conversion patched
    fresh_python(_RELOAD, str(config.parent), str(checkpoint), str(tmp_path / "plan.json"))


_RELOAD = """
import sys
from transformers import AutoModelForCausalLM
from moe_precision import PrecisionPlan
from tests.export.real_tools.conftest import check_experts, float_experts
layers = float_experts(sys.argv[2])
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
check_experts(model, layers, PrecisionPlan.load(sys.argv[3]))
"""


def test_tuned_on_text_by_the_command(checkpoint, plan, tmp_path, capsys):
    """`quantize --backend auto-round`: the plan's bits, attention untouched, closer than rounding to nearest."""
    plan.save(tmp_path / "plan.json")
    (tmp_path / "text.txt").write_text(TEXT)
    errors = {}
    for iterations in ("0", "20"):
        out = tmp_path / f"tuned-{iterations}"
        command = ["quantize", str(checkpoint), str(tmp_path / "plan.json"), str(out), "--backend", "auto-round"]
        tuning = ["--iterations", iterations, "--samples", "8", "--dataset", str(tmp_path / "text.txt")]
        assert main([*command, *tuning]) == 0
        assert plan_of_checkpoint(out).diff(plan) == []
        errors[iterations] = float(fresh_python(_ERROR, str(out), str(checkpoint)).split()[-1])
    assert errors["20"] < errors["0"] < 1
    assert "AutoRound's format" in capsys.readouterr().out


_ERROR = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from tests.export.real_tools.conftest import TEXT
tokens = AutoTokenizer.from_pretrained(sys.argv[2])(TEXT[-3000:], return_tensors="pt").input_ids[:, :512]
with torch.no_grad():
    float_model = AutoModelForCausalLM.from_pretrained(sys.argv[2])
    expected = float_model.model(tokens).last_hidden_state.float()
    model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    for one, other in zip(model.model.layers, float_model.model.layers, strict=True):
        weights = one.self_attn.q_proj.weight.float(), other.self_attn.q_proj.weight.float()
        torch.testing.assert_close(*weights, atol=1e-3, rtol=1e-3)
    found = model.model(tokens).last_hidden_state.float()
print(float((found - expected).norm() / expected.norm()))
"""


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "switch_transformers"])
def test_names_are_those_after_unfusing(family):
    fresh_python(_UNFUSE, family)


_UNFUSE = """
import sys
import torch
from auto_round.modeling.fused_moe.replace_modules import apply_replacements
from moe_precision import allocate
from moe_precision.export.names import all_places
from tests.support.models import build
model = build(sys.argv[1])
plan = allocate(model, method="uniform", average_bits=4, bits=(4,), group_size=32)
model = apply_replacements(model)
for place in all_places(plan):
    shape = plan.layers[place.layer].shape
    for expert in range(shape.num_experts):
        module = model.get_submodule(place.module_of(expert))
        assert isinstance(module, torch.nn.Linear), (place, type(module))
"""
