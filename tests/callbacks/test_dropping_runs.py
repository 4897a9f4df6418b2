"""Runs whose plan may drop experts: recorded, annealed, compared and shown."""

import pytest
import torch

from moe_precision import PrecisionPlan, allocate, find_moe_layers, quantize_model
from moe_precision.allocation.allocator import AllocationError
from moe_precision.callbacks import PrecisionAnneal, RouterNormMonitor
from moe_precision.cli.main import main
from moe_precision.judging.compare import compare
from tests.annealing.test_annealing import Language, fit
from tests.support.dropped import observed

pytestmark = pytest.mark.slow


def test_a_run_drops_experts_by_its_own_statistics(tmp_path, capsys):
    levels = {"bits": (0, 1, 2), "average_bits": 0.8, "group_size": 64, "min_tokens": 1}
    monitor = RouterNormMonitor(statistics_batches=4, **levels)
    fit(tmp_path, monitor, steps=4)
    plan = PrecisionPlan.load(tmp_path / "precision_plan.json")
    assert plan.drops
    assert plan.method == "statistics"
    assert plan.settings.min_tokens == 1
    assert {"tokens", "expert_load", "routing_weight"} <= plan.layers["model.layers.0.mlp"].signals.keys()
    assert main(["show", str(tmp_path / "precision_plan.json")]) == 0
    assert "experts dropped, which had" in " ".join(capsys.readouterr().out.split())


def test_annealing_leaves_dropped_experts_at_zero(tmp_path):
    module = Language()
    uniform = allocate(module.model, method="uniform", average_bits=2, group_size=64)
    uniform.with_bits({key: [0, 2, 2, 2, 2, 2, 0, 2] for key in uniform.layers}).save(tmp_path / "plan.json")
    gradients = []

    class Watch(PrecisionAnneal):
        def on_after_backward(self, *args):
            if self.grid is not None:
                of = find_moe_layers(module.model)[0].banks["gate_up_proj"].weights[0].parameter().grad
                gradients.append([bool(matrix.any()) for matrix in of])

    fit(tmp_path, Watch(plan=tmp_path / "plan.json", start=0.5), module=module, steps=4)
    assert gradients
    assert all(not seen[0] and not seen[6] and seen[1] for seen in gradients)
    plan = PrecisionPlan.load(tmp_path / "annealed_plan.json")
    for layer in find_moe_layers(module.model):
        assert not any(matrix.any() for expert in (0, 6) for matrix in layer.expert_weights(expert).values())
    with torch.no_grad():
        ids = torch.arange(3, 40)[None]
        before = module.model.eval()(ids).logits
        packed = quantize_model(module.model, plan, grid=tmp_path / "annealed_plan.grid.safetensors")
        torch.testing.assert_close(packed(ids).logits, before, atol=1e-4, rtol=1e-4)


def test_annealing_cannot_choose_whom_to_drop():
    with pytest.raises(AllocationError, match="method 'curvature' cannot tell what that costs"):
        PrecisionAnneal(bits=(0, 1, 2), average_bits=1)


def test_methods_that_cannot_drop_are_compared_without_0():
    model, given, data = observed("mixtral")
    methods = ["statistics", "weight_error", "uniform"]
    known = {"curvature": given["curvature"], "statistics": given["statistics"], "group_size": 32}
    found = compare(
        model,
        data[:1],
        torch.ones(128),
        methods=methods,
        budgets=[1.0],
        bits=(0, 1, 2),
        granularities=["expert"],
        **known,
    )
    assert found.skipped == []
    rows = {row.name: row for row in found.rows}
    assert set(rows) == {"statistics, expert", "weight_error, expert", "uniform 1 bits", "uniform 2 bits"}
    assert not rows["weight_error, expert"].plan.drops
    assert rows["weight_error, expert"].average_bits == 1
    assert rows["statistics, expert"].average_bits <= 1
