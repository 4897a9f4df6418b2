"""The examples in the docstrings of all public functions and classes run."""

import doctest
import inspect
import shutil

import pytest
import torch

import moe_precision
from moe_precision import RouterNormHistory, collect_statistics, find_moe_layers, quantize_model
from moe_precision.recording.gradients import curvature_of_losses
from moe_precision.recording.router_norms import router_norms
from tests.support.models import build

pytestmark = pytest.mark.slow

PUBLIC = {  # what is raised is explained where it is raised
    name: thing
    for name in moe_precision.__all__
    if (inspect.isclass(thing := getattr(moe_precision, name)) and not issubclass(thing, BaseException))
    or inspect.isfunction(thing)
}


def examples(thing) -> str:
    """The docstring of a function, or those of a class and of its own public methods."""
    parts = (
        [thing, *(part for name, part in vars(thing).items() if name[0] != "_")] if inspect.isclass(thing) else [thing]
    )
    return "\n\n".join(inspect.getdoc(part) or "" for part in parts if not isinstance(part, str | int | float | tuple))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The files that a run and a conversion leave: history, plan, a float and a packed checkpoint."""
    folder = tmp_path_factory.mktemp("finished")
    model = build("mixtral")
    layers = find_moe_layers(model)
    history = RouterNormHistory.of(layers, "mixtral")
    history.record(0, router_norms(layers) * 0.9)
    history.record(10, router_norms(layers))
    history.save(folder / "precision_plan.history.safetensors")
    model.save_pretrained(folder / "checkpoint")
    plan = moe_precision.allocate(model=model, history=history, average_bits=2.5, bits=(2, 3), group_size=64)
    plan.save(folder / "precision_plan.json")
    ids = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(0))
    curvature_of_losses(layers, [lambda: model(input_ids=ids, labels=ids).loss]).save(
        folder / "precision_plan.curvature.safetensors"
    )
    collect_statistics(model, [{"input_ids": ids}]).save(folder / "precision_plan.statistics.safetensors")
    quantize_model(model, plan).save_pretrained(folder / "quantized")
    return folder


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_names_have_examples_that_run(name, finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    assert not (problem := wrong_with(name)), problem


def wrong_with(name: str) -> str:
    """What is wrong with the example of a public name, run in this folder; empty if nothing is."""
    text = examples(PUBLIC[name])
    if ">>>" not in text:
        return f"the docstring of {name} needs an example"
    names = {public: getattr(moe_precision, public) for public in moe_precision.__all__}
    names["model"] = build("mixtral")
    names["history"] = RouterNormHistory.load("precision_plan.history.safetensors")
    names["plan"] = moe_precision.PrecisionPlan.load("precision_plan.json")
    found = doctest.DocTestParser().get_doctest(text, names, name, None, None)
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(found, out=said.append)
    return "".join(said)
