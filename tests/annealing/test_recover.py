"""recipes/recover.yaml: a finished checkpoint is fine-tuned on its plan, all of it or only the routers."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from pytorch_lightning import Callback
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from moe_precision import PrecisionPlan, allocate, quantize_model
from moe_precision.callbacks import SavePretrained
from moe_precision.checkpoints.checkpoint import load_model
from moe_precision.cli.main import main
from moe_precision.recipes import CausalLM, Seq2SeqLM, TextDataModule
from tests.cli.test_cli import TEXT
from tests.recipes.test_recipes import MIXTRAL, quiet_trainer
from tests.support.models import build, logits

RECIPE = Path(__file__).parents[2] / "recipes" / "recover.yaml"
WIDE = {**MIXTRAL, "hidden_size": 32, "intermediate_size": 64}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small checkpoint, its plan, and the recipe for them."""
    root = tmp_path_factory.mktemp("finished")
    (root / "text.txt").write_text(TEXT)
    data = {"dataset": str(root / "text.txt"), "sequence_length": 32, "batch_size": 4}
    torch.manual_seed(0)
    trainer = quiet_trainer(root, max_steps=4, callbacks=[SavePretrained()])
    trainer.fit(CausalLM(config=WIDE), datamodule=TextDataModule(vocab_size=300, **data))
    model = load_model(root / "checkpoint")
    allocate(model, method="random", bits=(1, 2, 3), average_bits=2, group_size=32).save(root / "precision_plan.json")
    recipe = yaml.safe_load(RECIPE.read_text())
    recipe["model"]["init_args"]["checkpoint"] = str(root / "checkpoint")
    recipe["data"]["init_args"] = {**data, "tokenizer": str(root / "checkpoint")}
    recipe["trainer"] |= {"logger": False, "max_steps": 6, "val_check_interval": 3, "enable_progress_bar": False}
    recipe["trainer"]["callbacks"][0]["init_args"]["plan"] = str(root / "precision_plan.json")
    (root / "recover.yaml").write_text(yaml.safe_dump(recipe))
    return root


def recover(finished, output, *more):
    return main(["fit", "--config", str(finished / "recover.yaml"), f"--trainer.default_root_dir={output}", *more])


@pytest.mark.slow
def test_a_finished_model_ends_on_its_plan(finished, tmp_path, capsys):
    assert recover(finished, tmp_path) == 0
    plan = PrecisionPlan.load(tmp_path / "annealed_plan.json")
    assert plan.diff(PrecisionPlan.load(finished / "precision_plan.json")) == []
    assert main(["quantize", *(str(tmp_path / name) for name in ("checkpoint", "annealed_plan.json", "packed"))]) == 0
    annealed = logits(load_model(tmp_path / "checkpoint", dtype=torch.float32))
    torch.testing.assert_close(logits(load_model(tmp_path / "packed")), annealed, atol=1e-5, rtol=1e-4)
    before = logits(load_model(finished / "checkpoint", dtype=torch.float32))
    assert (annealed - before).abs().max() > 1e-2


@pytest.mark.slow
def test_routers_alone_over_packed_experts(finished, tmp_path):
    assert recover(finished, tmp_path, "--train=routers", f"--plan={finished / 'precision_plan.json'}") == 0
    tuned = load_model(tmp_path / "checkpoint")
    float_model = load_model(finished / "checkpoint", dtype=torch.float32)
    packed = quantize_model(copy.deepcopy(float_model), finished / "precision_plan.json")
    before, after = packed.state_dict(), tuned.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{i}.mlp.gate.weight" for i in range(2)}
    assert not (tmp_path / "annealed_plan.json").exists()


def test_a_plan_named_in_yaml_stays_a_path(finished, tmp_path):
    """So that the files beside it are found; jsonargparse reads a file where it knows the fields of its dataclass."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--callbacks", type=list[Callback])
    shutil.copy(finished / "precision_plan.json", tmp_path / "plan.json")
    (tmp_path / "plan.curvature.safetensors").write_bytes(b"")
    callback = {"class_path": "PrecisionAnneal", "init_args": {"plan": str(tmp_path / "plan.json")}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"callbacks": [callback]}))
    (made,) = parser.instantiate(parser.parse_args(["--config", str(tmp_path / "config.yaml")])).callbacks
    assert made.plan == PrecisionPlan.load(tmp_path / "plan.json")
    assert made._beside._curvature == tmp_path / "plan.curvature.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--trainer.callbacks=[]", "--plan=PLAN"], "for a recipe with PrecisionAnneal"),
        (["--trainer.callbacks=[]", "--train=routers"], "give --plan"),
        (["--plan=none.json"], "--plan 'none.json': no such file"),
    ],
)
def test_flags_that_do_not_fit_the_recipe(more, message, finished, tmp_path, capsys):
    more = [flag.replace("PLAN", str(finished / "precision_plan.json")) for flag in more]
    assert recover(finished, tmp_path, *more) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_routers_alone_need_the_float_checkpoint(finished, tmp_path):
    packed = tmp_path / "packed"
    quantize_model(load_model(finished / "checkpoint"), finished / "precision_plan.json").save_pretrained(packed)
    with pytest.raises(ValueError, match="is quantized already"):
        recover(finished, tmp_path, f"--model.checkpoint={packed}", "--train=routers")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": WIDE, "train": "experts"}, "'all' or 'routers'"),
        ({"config": WIDE, "train": "routers"}, "needs checkpoint and plan"),
        ({"checkpoint": "x", "train": "routers"}, "needs checkpoint and plan"),
        ({"checkpoint": "x", "plan": "y.json"}, "use PrecisionAnneal"),
    ],
)
@pytest.mark.parametrize("module", [CausalLM, Seq2SeqLM])
def test_arguments_that_do_not_go_together(module, arguments, message):
    with pytest.raises(ValueError, match=message):
        module(**arguments)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "switch_transformers"])
def test_gradients_pass_through_packed_experts(family):
    """As through a float model with the same weights, and without keeping a float weight."""
    model = build(family)
    plan = allocate(copy.deepcopy(model), method="random", bits=(2, 3), average_bits=2.5, group_size=64)
    packed = quantize_model(copy.deepcopy(model), plan)
    with torch.no_grad():
        for name, layer in plan.layers.items():
            for projection in layer.projection_bits:
                for expert in range(layer.shape.num_experts):
                    matrix = find(model, name, projection, expert)
                    matrix.copy_(find(packed, name, projection, expert))
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(1))
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    gradients = []
    for one in (model, packed):
        one(input_ids=ids, **extra).logits.square().mean().backward()
        gradients.append(one.get_parameter(next(iter(plan.layers.values())).shape.router).grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)


def find(model, layer, projection, expert):
    """A float or dequantized expert matrix, ``(out, in)``."""
    from moe_precision import find_moe_layers

    module = model.get_submodule(layer)
    if getattr(model, "is_quantized", False):
        if hasattr(module.experts, "packed"):
            return module.experts.packed[projection].weight(expert)
        return getattr(module.experts, f"expert_{expert}").get_submodule(projection).packed.weight(0)
    (found,) = (one for one in find_moe_layers(model) if one.name == layer)
    return found.banks[projection].read(expert)


@pytest.mark.slow
def test_transformers_trainer_takes_a_packed_model(tmp_path):
    model = build("mixtral")
    plan = allocate(copy.deepcopy(model), method="uniform", average_bits=2, group_size=64)
    packed = quantize_model(model, plan).requires_grad_(False)
    router = packed.get_parameter("model.layers.0.mlp.gate.weight").requires_grad_(True)
    before = router.detach().clone()
    items = [{"input_ids": list(range(3, 15)), "labels": list(range(3, 15))}] * 8
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no"
    )
    trainer = Trainer(packed, arguments, train_dataset=items)
    trainer.train()
    assert not torch.equal(router, before)
    trainer.save_model(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(packed.eval()))
