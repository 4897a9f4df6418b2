"""Real optimizers whose states are no mean squared gradient of each expert matrix: refused by name, and replaced."""

from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader

from moe_precision import find_moe_layers
from moe_precision.recording.curvature import CurvatureError
from moe_precision.recording.optimizer_check import check_second_moments
from moe_precision.recording.second_moments import curvature_of
from tests.support.models import build
from tests.support.trainers import Language, monitor, trainer

other = pytest.importorskip("pytorch_optimizer")
IDS = torch.randint(3, 128, (6, 12), generator=torch.Generator().manual_seed(0))


def split(optimizer_class, model):
    """One of Muon's kind, which takes matrices and leaves the rest to an AdamW of its own."""
    parts = {muon: [p for p in model.parameters() if (p.ndim >= 2) == muon] for muon in (True, False)}
    return optimizer_class([{"params": params, "use_muon": muon} for muon, params in parts.items()], lr=1e-3)


OPTIMIZERS = {
    "SOAP": lambda model: other.SOAP(model.parameters(), lr=1e-3),
    "Shampoo": lambda model: other.Shampoo(model.parameters(), lr=1e-3, preconditioning_compute_steps=3),
    "ScalableShampoo": lambda model: other.ScalableShampoo(model.parameters(), lr=1e-3, start_preconditioning_step=2),
    "Lion": lambda model: other.Lion(model.parameters(), lr=1e-4),
    "Muon": partial(split, other.Muon),
}


def loss_of(model, batch):
    return model(input_ids=batch, labels=batch).loss


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "switch_transformers"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_none_is_read_before_or_after(name, family):
    model = build(family, num_layers=2) if family == "switch_transformers" else build(family, num_hidden_layers=1)
    layers, optimizer = find_moe_layers(model), OPTIMIZERS[name](model)
    named = rf"pytorch_optimizer\.{name} is not among the optimizers"
    with pytest.raises(CurvatureError, match=rf"{named}.*curvature_batches=64"):
        check_second_moments(layers, [optimizer])
    for batch in IDS.split(2):
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    with pytest.raises(CurvatureError, match=rf"{named}.*curvature_batches=N"):
        curvature_of(layers, [optimizer])


@pytest.mark.slow
def test_torchs_muon_takes_experts_that_are_modules_alone():
    model = build("switch_transformers")
    optimizer = torch.optim.Muon([p for p in model.parameters() if p.ndim == 2])
    with pytest.raises(CurvatureError, match=r"torch\.Muon is not among the optimizers"):
        check_second_moments(find_moe_layers(model), [optimizer])
    with pytest.raises(ValueError, match="only supports 2D parameters"):
        torch.optim.Muon(build("mixtral", num_hidden_layers=1).model.layers[0].mlp.experts.parameters())


class WithSOAP(Language):
    def configure_optimizers(self):
        return other.SOAP(self.parameters(), lr=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "switch_transformers"])
def test_auto_takes_gradients_of_its_own(family, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("moe_precision.callbacks.plan_of_run.rank_zero_info", said.append)
    module, batches = WithSOAP(build(family)), DataLoader(IDS, batch_size=2)
    automatic = monitor(method="auto", statistics_batches=0)
    trainer(tmp_path, automatic).fit(module, batches)
    assert automatic.plan.method == "curvature"
    (once,) = [text for text in said if "pytorch_optimizer.SOAP is not among" in text]
    assert "squared gradients of 64 training batches after the last step" in once
    layers = find_moe_layers(module)
    projection, bank = next(iter(layers[0].banks.items()))
    matrices = [weight.parameter() for weight in bank.weights]  # one of all experts, or one each
    squares = [torch.zeros(matrix.shape, dtype=torch.float64) for matrix in matrices]
    for batch in batches:
        module.zero_grad()
        module.loss(batch).backward()
        for total, matrix in zip(squares, matrices, strict=True):
            total += 0 if matrix.grad is None else matrix.grad.double().square()
    expected = torch.stack(squares).reshape(8, *matrices[0].shape[-2:]) / len(batches)
    rows, columns = (
        found[layers[0].name][projection] for found in (automatic.curvature.rows, automatic.curvature.columns)
    )
    assert expected.any()
    torch.testing.assert_close(rows.double(), expected.mean(2), rtol=1e-4, atol=0)
    torch.testing.assert_close(columns.double(), expected.mean(1), rtol=1e-4, atol=0)
