"""Every block of Python in the README and docs runs, in the order of its page and in one folder per page.

What readers bring themselves stands in `given`: a module, data, a finished run. A block that cannot run has a comment
before it that says why: ``<!-- not run: needs a GPU -->``.
"""

import doctest
import shutil
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import Dataset
from transformers import TrainingArguments

from moe_precision import PrecisionPlan, RouterNormHistory
from moe_precision.callbacks import RouterNormMonitor, SavePretrained
from tests.support.markdown import PAGES, blocks
from tests.support.models import build

pytestmark = pytest.mark.slow

SIZES = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_local_experts": 4}
NOT_RUN = "not run:"
RUNNABLE = [
    page for page in PAGES if any(block.language == "python" for block in blocks(page.read_text(encoding="utf-8")))
]


class Rows(Dataset):
    """Twelve rows of tokens, for Lightning and for transformers' Trainer."""

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError(index)
        ids = torch.randint(3, 128, (16,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}

    def __len__(self):
        return 12

    def __iter__(self):
        return (self[index] for index in range(len(self)))


class Module(pl.LightningModule):
    """A small Mixtral that learns the rows one by one."""

    def __init__(self):
        super().__init__()
        self.model = build("mixtral", **SIZES).train()

    def training_step(self, row, index):
        return self.model(**{name: tensor[None] for name, tensor in row.items()}).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def trainer(**settings):
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return pl.Trainer(accelerator="cpu", devices=1, max_epochs=1, log_every_n_steps=2, **quiet, **settings)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """What a run leaves: a plan, its history and curvature, and a checkpoint."""
    folder = tmp_path_factory.mktemp("finished")
    callbacks = [RouterNormMonitor(average_bits=2.5, bits=(2, 3)), SavePretrained("checkpoint")]
    trainer(default_root_dir=folder, callbacks=callbacks).fit(Module(), Rows())
    return folder


def given(folder: Path) -> dict:
    """The names that a block may use without making them."""
    model = build("mixtral", **SIZES).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def train_step(model):
        row = Rows()[0]
        model(**{name: tensor[None] for name, tensor in row.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=12, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no"
    )
    names = {"module": Module(), "data": Rows(), "model": model, "args": arguments, "train_step": train_step}
    names |= {"optimizer": optimizer, "batches": [{name: row[None] for name, row in one.items()} for one in Rows()]}
    return {"__name__": "docs", **names}


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.name)
def test_blocks_run(page, finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for name, value in {"accelerator": "cpu", "max_epochs": "1", "enable_progress_bar": "false"}.items():
        monkeypatch.setenv(f"PL_TRAINER_{name.upper()}", value)  # what Lightning takes where a block says nothing
    names = given(tmp_path)
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language != "python" or block.comment.startswith(NOT_RUN):
            assert len(block.comment) > len(NOT_RUN) + 10 or not block.comment.startswith(NOT_RUN), "give the reason"
            continue
        if ">>>" in block.code:
            examples = doctest.DocTestParser().get_doctest(block.code, names, page.name, page.name, block.line)
            runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
            assert runner.run(examples).failed == 0
            continue
        code = "\n" * block.line + block.code  # so that a traceback names the page's line
        exec(compile(code, str(page), "exec"), names)


def test_the_loop_without_a_trainer_makes_a_plan(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (page,) = (page for page in RUNNABLE if page.name == "recording.md")
    (loop,) = (block for block in blocks(page.read_text(encoding="utf-8")) if "train_step(model)" in block.code)
    names = given(tmp_path)
    exec(loop.code, names)
    plan = PrecisionPlan.load("precision_plan.json")
    plan.check(names["model"])
    assert plan.baseline_step == 0
    assert plan.method == "statistics"
    history = RouterNormHistory.load("precision_plan.history.safetensors")
    assert any(history.change(name).any() for name in history.layers)
    assert {int(load[0].sum()) for load in history.loads["training"].values()} == {4 * 16 * 2}  # steps, tokens, experts
