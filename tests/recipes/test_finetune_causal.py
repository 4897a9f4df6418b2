"""recipes/finetune_causal.yaml by its name: a checkpoint is named, and the plan rests on all that a run can give."""

import pytest
import torch

from moe_precision import PrecisionPlan
from moe_precision.checkpoints import load_model
from moe_precision.checkpoints.tokenizer import load_tokenizer
from moe_precision.cli.main import main
from moe_precision.plans.beside import PlanFiles
from tests.cli.conftest import model_with_text  # noqa: F401


@pytest.mark.slow
def test_a_checkpoint_is_finetuned_and_planned_for(model_with_text, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)  # outside of a checkout
    monkeypatch.setattr("sys.argv", ["pytest"])  # LightningCLI warns where there are arguments other than its own
    callbacks = (
        "[{class_path: moe_precision.callbacks.RouterNormMonitor,"
        " init_args: {group_size: 64, statistics_batches: 2, bits: [2, 3]}},"
        "{class_path: moe_precision.callbacks.SavePretrained}]"
    )
    arguments = [
        *("--model.checkpoint=model", "--data.dataset=text.txt", "--data.sequence_length=32"),
        *("--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.logger=false"),
        *("--trainer.enable_progress_bar=false", f"--trainer.callbacks={callbacks}"),
    ]
    assert main(["fit", "--config", "finetune_causal", *arguments]) == 0
    run = tmp_path / "runs" / "finetune_causal"
    plan = PrecisionPlan.load(run / "precision_plan.json")
    assert plan.method == "statistics"
    assert plan.notes["calibration_tokens"] > 0
    assert PlanFiles.of(run / "precision_plan.json").statistics.is_file()
    tokenizer = load_tokenizer(run / "checkpoint")  # that of the checkpoint, not one trained on the text
    assert tokenizer.get_vocab() == load_tokenizer(tmp_path / "model").get_vocab()
    tuned = load_model(run / "checkpoint", dtype=torch.float32).state_dict()
    assert not all(torch.equal(value, tuned[name]) for name, value in model_with_text.state_dict().items())
