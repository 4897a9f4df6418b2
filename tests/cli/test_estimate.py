"""`estimate` and `quantize --dry-run`: sizes by hand, and those of files that are really written."""

import json

import pytest
import torch
from transformers import AutoConfig

from moe_precision import PrecisionPlan, allocate, collect_statistics, quantize_checkpoint, quantize_model
from moe_precision.checkpoints import Checkpoint
from moe_precision.checkpoints.blueprint import model_of
from moe_precision.cli.main import main
from moe_precision.layers import MoELayerError
from moe_precision.plans.numbers import AllocationError
from moe_precision.plans.widths import PlanError
from moe_precision.quantize.sizes import GIB, ModelSizes
from moe_precision.recording.collecting import memory_bytes
from moe_precision.recording.statistics import file_bytes
from tests.support.models import CONFIGS, build

MIXTRAL = {"model_type": "mixtral"}  # the class's own defaults are those of Mixtral-8x7B
EXPERTS = 32 * 8 * 3 * 4096 * 14336  # layers, experts, matrices of an expert, shape
ATTENTION = 2 * 4096 * 4096 + 2 * 4096 * 1024  # q and o; k and v with 8 of 32 heads
REST = 32 * (ATTENTION + 8 * 4096 + 2 * 4096) + 2 * 32000 * 4096 + 4096  # with router and norms; embeddings, head, norm


def config(folder, **values):
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture
def mixtral(tmp_path):
    return config(tmp_path, **MIXTRAL)


def test_the_parts_of_mixtral_by_hand(mixtral):
    sizes = ModelSizes(model_of(mixtral))
    assert sizes.parameters == EXPERTS + REST == 46_702_792_704
    assert sizes.weights == EXPERTS == 45_097_156_608
    assert sizes.group_size == 128
    assert sizes.float_bytes == 2 * sizes.parameters
    assert sizes.rest_bytes == 2 * REST
    assert sizes.stored_bits(2.5) == 2.5 + 18 / 128
    assert sizes.expert_bytes(sizes.stored_bits(2)) / GIB == pytest.approx(EXPERTS * 2.140625 / 8 / 2**30)
    assert memory_bytes(sizes.layers) == 32 * 8 * 4 * (4096**2 + 14336**2)  # gate and up share their input
    assert file_bytes(sizes.layers) == 32 * 8 * sum(4 * n + 2 * n * (n - 1) // 2 for n in (4096, 14336))
    layer = 2 * (8 * 3 * 4096 * 14336 + ATTENTION + 8 * 4096 + 2 * 4096)
    packed = layer - 2 * 8 * 3 * 4096 * 14336 + 8 * 3 * 4096 * 14336 * 2.140625 / 8
    assert sizes.quantizing_bytes(sizes.stored_bits(2)) == pytest.approx(2 * layer + packed)


def test_what_fits_by_hand(mixtral):
    sizes = ModelSizes(model_of(mixtral))
    room = 14.0 - 2 * REST / 2**30
    fit = sizes.fit(total_gib=14.0)
    assert fit.expert_gib == pytest.approx(room)
    assert fit.stored_bits == pytest.approx(room * 2**33 / EXPERTS)  # 2.096
    assert fit.average_bits == pytest.approx(fit.stored_bits - 18 / 128)  # 1.955
    assert (fit.levels, fit.uniform) == ((1, 2), 1)
    exact = sizes.fit(expert_gib=EXPERTS * (3 + 18 / 128) / 2**33)
    assert (exact.average_bits, exact.levels, exact.uniform) == (3, (3,), 3)
    assert sizes.fit(expert_gib=60.0).levels == (8,)  # 11.4 stored bits: more than 8 bits take, less than the float
    assert sizes.fit(expert_gib=60.0).uniform == 8
    assert sizes.fit(total_gib=87.0).uniform == 16  # float: 2 * 46.7e9 bytes are 86.99 GiB
    with pytest.raises(AllocationError, match=r"6 GiB in total is too little: at 1 bit \(1\.141 stored"):
        sizes.fit(total_gib=6.0)
    with pytest.raises(AllocationError, match=r"the experts take 5\.988 GiB, and the rest takes 2\.991 GiB"):
        sizes.fit(expert_gib=5.9)


def test_the_plan_of_a_budget_takes_what_was_estimated():
    """`allocate` by `expert_gib` and `estimate` agree on what an average is."""
    model = build("mixtral")
    gib = 2.28125 / 8 * ModelSizes(model, group_size=64).weights / 2**30
    fit = ModelSizes(model, group_size=64).fit(expert_gib=gib)
    assert fit.average_bits == pytest.approx(2.0)
    plan = allocate(model, method="weight_error", expert_gib=gib * 1.2, group_size=64, bits=(2, 3))
    assert ModelSizes(model, group_size=64).stored_bits_of(plan) == pytest.approx(plan.stored_bits)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss", "switch_transformers"])
@pytest.mark.parametrize("non_expert_bits", [None, 8])
def test_sizes_are_those_of_the_packed_model(family, non_expert_bits):
    """Within the sentinels and the blocks of scales that are not full."""
    model = build(family, **({"hidden_size": 128, "intermediate_size": 128} if family == "mixtral" else {}))
    sizes = ModelSizes(model, group_size=32, non_expert_bits=non_expert_bits)
    plan = allocate(model, method="random", average_bits=2.5, group_size=32)
    expected = sizes.expert_bytes(sizes.stored_bits_of(plan)) + sizes.rest_bytes
    packed = quantize_model(model, plan, non_expert_bits=non_expert_bits)
    tensors = {id(tensor): tensor for tensor in packed.state_dict(keep_vars=True).values()}
    assert sum(tensor.nbytes for tensor in tensors.values()) == pytest.approx(expected, rel=0.01)


def test_statistics_take_what_was_estimated(tmp_path):
    model = build("mixtral")
    sizes = ModelSizes(model)
    path = tmp_path / "x.statistics.safetensors"
    collect_statistics(model, [{"input_ids": torch.arange(3, 100)[None]}]).save(path)
    assert path.stat().st_size == pytest.approx(file_bytes(sizes.layers), rel=0.05)


def test_float_experts_of_a_plan_keep_their_dtype():
    model = build("mixtral", num_hidden_layers=1).float()
    sizes = ModelSizes(model, group_size=64)
    plan = allocate(model, method="uniform", average_bits=2, group_size=64)
    half = plan.with_bits({"model.layers.0.mlp": [16] * 4 + [2] * 4})
    assert sizes.stored_bits_of(half) == pytest.approx((32 + 2 + 18 / 64) / 2)


def printed(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 0
    return "mixtral: " + capsys.readouterr().out.partition("mixtral: ")[2]  # without what libraries print as they load


def test_the_command_prints_the_table(mixtral, capsys):
    out = printed(capsys, "estimate", mixtral, "--total-gib", 14, "--expert-gib", 30, "--average-bits", 3, 2.5)
    assert out.startswith("mixtral: 46,702,792,704 parameters, 45,097,156,608 of them in the routed experts of ")
    assert "| float (bfloat16)    |          16 |          84 |    2.991 |     86.99 |   100.0% |" in out
    assert "| uniform 3 bits      |       3.141 |       16.49 |    2.991 |     19.48 |    22.4% |" in out
    assert "| 2.5 bits on average |       2.641 |       13.86 |    2.991 |     16.85 |    19.4% |" in out
    assert "--total-gib 14: 11.01 GiB for the experts, 2.097 stored bits per weight, 1.956 on average" in out
    assert "levels around it are 1 and 2, and all experts fit at 1 bit\n" in out
    assert "--expert-gib 30: 30 GiB for the experts, 5.714 stored bits" in out
    assert "statistics: 212 GiB of second moments beside the float model, in 32 passes over the text" in out
    assert "a file of 53.01 GiB" in out
    of_file = printed(capsys, "estimate", mixtral / "config.json", "--average-bits", 3, "--statistics-memory", 4)
    assert "6.625 GiB of them for one layer, which is more than --statistics-memory 4" in of_file


@pytest.mark.slow
def test_a_plan_has_its_row_and_a_dry_run_is_the_same(tmp_path, capsys):
    model = build("mixtral")
    model.save_pretrained(tmp_path / "model")
    allocate(model, method="random", average_bits=2.5, group_size=64).save(tmp_path / "plan.json")
    of_plan = ["--plan", tmp_path / "plan.json"]
    estimate = printed(capsys, "estimate", tmp_path / "model", *of_plan)
    assert "plan, 2.5 bits on average" in estimate
    out = tmp_path / "out"
    assert printed(capsys, "quantize", tmp_path / "model", tmp_path / "plan.json", out, "--dry-run") == estimate
    assert not out.exists()
    quantize_checkpoint(tmp_path / "model", tmp_path / "plan.json", out)
    with Checkpoint(out) as packed, Checkpoint(tmp_path / "model") as source:
        sizes = ModelSizes(source.meta_model(), group_size=64)
        plan = PrecisionPlan.load(tmp_path / "plan.json")
        assert packed.nbytes == pytest.approx(sizes.expert_bytes(plan.stored_bits) + sizes.rest_bytes, rel=0.01)


def test_a_plan_of_another_class_of_the_model_is_taken(tmp_path):
    plan = allocate(build("mixtral"), method="random", average_bits=2.5, group_size=64)
    base = ModelSizes(model_of(config(tmp_path, **MIXTRAL, **CONFIGS["mixtral"], architectures=["MixtralModel"])))
    assert base.layers[0].name == "layers.0.mlp"  # "model.layers.0.mlp" in the plan
    assert base.stored_bits_of(plan) == pytest.approx(plan.stored_bits)


def test_a_dry_run_refuses_what_the_run_would(tmp_path, capsys):
    model = build("mixtral")
    model.save_pretrained(tmp_path / "model")
    allocate(build("olmoe"), method="uniform", average_bits=2, group_size=64).save(tmp_path / "plan.json")
    run = ["quantize", str(tmp_path / "model"), str(tmp_path / "plan.json"), str(tmp_path / "out"), "--dry-run"]
    assert main(run) == 2
    assert "the plan is for a model of type 'olmoe'" in capsys.readouterr().err
    assert main([*run, "--backend", "auto-round"]) == 2
    assert "--dry-run tells what our own format takes" in capsys.readouterr().err


@pytest.mark.slow
def test_what_cannot_be_estimated_is_said_in_one_line(tmp_path, mixtral, capsys):
    def error(*arguments):
        assert main(["estimate", *map(str, arguments)]) == 2
        found = capsys.readouterr().err
        assert found.count("\n") == 1
        return found

    assert "neither a config.json nor a folder that holds one" in error("Qwen/Qwen3-30B-A3B")
    assert "expected 1 to 8" in error(mixtral, "--average-bits", 0.5)
    assert "is too little" in error(mixtral, "--total-gib", 5)
    (tmp_path / "dense").mkdir()
    small = {key: value for key, value in CONFIGS["mixtral"].items() if key != "num_local_experts"}
    assert "Mixture-of-Experts" in error(config(tmp_path / "dense", model_type="llama", **small))
    assert "is not a config of transformers" in error(config(tmp_path / "dense", model_type="kimi_k9"))
    assert "names the architecture 'MixtralForDancing'" in error(
        config(tmp_path / "dense", **MIXTRAL, architectures=["MixtralForDancing"])
    )
    (tmp_path / "dense" / "config.json").write_text("{")
    assert "config.json" in error(tmp_path / "dense")
    allocate(build("mixtral"), method="uniform", average_bits=2, group_size=64).save(tmp_path / "plan.json")
    assert "the plan is for another model" in error(mixtral, "--plan", tmp_path / "plan.json")
    assert "leave it out" in error(mixtral, "--plan", tmp_path / "plan.json", "--group-size", 32)


@pytest.mark.slow
def test_the_group_size_is_the_largest_that_fits_and_a_wrong_one_is_refused(tmp_path):
    model = model_of(config(tmp_path, model_type="gpt_oss"))  # 2880 = 45 * 64
    assert ModelSizes(model).group_size == 64
    with pytest.raises(PlanError, match="use 64 or 32"):
        ModelSizes(model, group_size=128)
    odd = {"hidden_size": 72, "intermediate_size": 72, "head_dim": 16}
    with pytest.raises(PlanError, match=r"no group size of 32, 64 or 128 divides .* \[72\]"):
        ModelSizes(build("mixtral", **odd))


def test_a_model_that_was_published_quantized_is_laid_out_as_float(tmp_path):
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    model = model_of(config(tmp_path, **MIXTRAL, num_hidden_layers=1, quantization_config=fp8, dtype="bfloat16"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_model_on_the_meta_device_has_no_weights_to_plan_by():
    with torch.device("meta"):
        model = type(build("mixtral"))(AutoConfig.for_model("mixtral", **CONFIGS["mixtral"]))
    plan = allocate(build("mixtral"), method="uniform", average_bits=2, group_size=64)
    batch = {"input_ids": torch.arange(3, 20)[None]}
    for call in (
        lambda: allocate(model, method="final_norm"),
        lambda: allocate(model, method="uniform", average_bits=2),
        lambda: allocate(model, method="weight_error", group_size=64),
        lambda: quantize_model(model, plan),
        lambda: collect_statistics(model, [batch]),
    ):
        with pytest.raises(MoELayerError, match="is on the meta device, which holds shapes and no weights: load"):
            call()


@pytest.mark.slow
def test_the_dtype_is_that_of_the_config_else_of_the_weights_else_assumed_and_said(tmp_path, capsys):
    build("mixtral").save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written.pop("dtype") == "float32"
    (tmp_path / "config.json").write_text(json.dumps(written))
    of_weights = printed(capsys, "estimate", tmp_path)
    assert "| float (float32) " in of_weights
    assert "assumed" not in of_weights
    (tmp_path / "model.safetensors").unlink()
    assert "dtype: bfloat16 is assumed, since config.json names none" in printed(capsys, "estimate", tmp_path)
    assert main(["estimate", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dtype_is_assumed"]
    (tmp_path / "config.json").write_text(json.dumps({**written, "dtype": "float16"}))
    of_config = printed(capsys, "estimate", tmp_path)
    assert "| float (float16) " in of_config
    assert "assumed" not in of_config
