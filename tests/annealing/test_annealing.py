"""Training that ends on a plan: straight-through gradients, and packed codes that are those training ended on."""

import copy
from dataclasses import replace

import pytest
import pytorch_lightning as pl
import torch
from peft import LoraConfig, inject_adapter_in_model
from pytorch_lightning.callbacks import ModelCheckpoint, WeightAveraging
from torch.utils.data import DataLoader

from moe_precision import PlanError, PrecisionPlan, allocate, find_moe_layers, quantize_model
from moe_precision.annealing.covers import AnnealError
from moe_precision.annealing.hooks import GridHooks
from moe_precision.callbacks import PrecisionAnneal, RouterNormMonitor, SavePretrained
from moe_precision.checkpoints.checkpoint import load_model
from moe_precision.cli.main import main
from moe_precision.quantize.codec.fitting import quantize_matrix, quantize_on_grid
from moe_precision.quantize.codec.grid import Grid, GridError
from moe_precision.quantize.kernels import scaled
from tests.support.models import PlainMoE, build, logits
from tests.support.trainers import MemoryLogger

pytestmark = pytest.mark.slow

IDS = torch.randint(3, 128, (40, 12), generator=torch.Generator().manual_seed(0))


class Language(pl.LightningModule):
    """A small language model on random tokens."""

    def __init__(self, family="mixtral"):
        super().__init__()
        self.model = build(family).train()

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def fit(folder, *callbacks, module=None, steps=10, ckpt_path=None, data=IDS, **changes):
    module = module or Language()
    settings = {"logger": False, "enable_checkpointing": False, "log_every_n_steps": 2, **changes}
    trainer = pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=steps,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(module, DataLoader(data, batch_size=4), ckpt_path=ckpt_path)
    return module


def anneal(**changes):
    return PrecisionAnneal(**{"start": 0.5, "average_bits": 2.0, "bits": (1, 2, 3), "group_size": 64, **changes})


def test_codes_on_a_grid_are_those_of_the_fit():
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    codes, scale, offset = quantize_matrix(weight, 3, 64)
    again, *_ = quantize_on_grid(scaled(codes, scale, offset), 3, 64, (scale, offset))
    assert torch.equal(again, codes)
    flat = torch.full((1, 64), 0.25)
    codes, scale, offset = quantize_on_grid(flat, 2, 64, (torch.zeros(1, 1).half(), torch.full((1, 1), 0.25).half()))
    assert torch.equal(scaled(codes, scale, offset), flat)


FAMILIES = [
    ("mixtral", {}),
    ("mixtral", {"experts_implementation": "eager"}),
    ("gpt_oss", {}),
    ("switch_transformers", {}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "changes"), FAMILIES)
def test_forward_is_the_packed_model_and_backward_goes_straight_through(family, changes):
    model = build(family, **changes)
    layers = find_moe_layers(model)
    plan = allocate(copy.deepcopy(model), method="random", bits=(1, 2, 3), average_bits=2, group_size=64)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grid = Grid.fit(layers, plan)
    hooks = GridHooks(layers, grid)
    settled = build(family, **changes)
    on_it = GridHooks(find_moe_layers(settled), grid)
    on_it.settle()
    on_it.close()
    packed = quantize_model(settled, plan, grid=grid)
    torch.testing.assert_close(logits(model), logits(packed), atol=1e-5, rtol=1e-4)

    extra = {"decoder_input_ids": IDS[:2]} if model.config.is_encoder_decoder else {}
    model(input_ids=IDS[:2], **extra).logits.square().mean().backward()
    parameters = [weight.parameter() for weight in layers[0].banks[layers[0].first].weights]
    weight = next(parameter for parameter in parameters if parameter.grad is not None)  # of an expert that got a token
    gradient = weight.grad.clone()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    # the gradient is that of a float model with the quantized weights
    hooks.settle()
    hooks.close()
    model.zero_grad()
    model(input_ids=IDS[:2], **extra).logits.square().mean().backward()
    torch.testing.assert_close(weight.grad, gradient, atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(logits(model), logits(packed), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}])
def test_the_packed_model_is_the_one_that_training_ended_on(changes, tmp_path, capsys):
    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            if trainer.global_step == trainer.max_steps:
                self.logits = logits(module.model.eval())
                module.model.train()

    keep, callback = Keep(), anneal()
    fit(tmp_path, callback, SavePretrained(), keep, **changes)
    plan = PrecisionPlan.load(tmp_path / "annealed_plan.json")
    assert plan.method == "curvature"
    assert plan.average_bits <= 2.0
    paths = [str(tmp_path / name) for name in ("checkpoint", "annealed_plan.json", "out")]
    assert main(["quantize", *paths]) == 0
    assert "which training ended on" in capsys.readouterr().out
    torch.testing.assert_close(logits(load_model(tmp_path / "out")), keep.logits, atol=1e-5, rtol=1e-4)


def test_gradient_checkpointing_gives_the_same_gradients():
    found = []
    for checkpointing in (False, True):
        model = build("mixtral").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        layers = find_moe_layers(model)
        plan = allocate(copy.deepcopy(model), method="uniform", average_bits=2, group_size=64)
        GridHooks(layers, Grid.fit(layers, plan))
        model(input_ids=IDS[:2], labels=IDS[:2]).loss.backward()
        found.append(model.model.layers[0].mlp.experts.down_proj.grad)
    torch.testing.assert_close(*found)


def held(hooks):
    """Bytes of all quantized weights that are kept between passes."""
    cover = hooks._covers[0]
    free = [tensor for tensors in cover._buffers._free.values() for tensor in tensors]
    return sum(tensor.nbytes for tensor in (*free, *cover._again._made.values()))


@pytest.mark.parametrize("family", ["mixtral", "switch_transformers"])
def test_only_one_layer_of_quantized_weights_is_ever_held(family):
    model = build(family).train()
    layers = find_moe_layers(model)
    plan = allocate(copy.deepcopy(model), method="uniform", average_bits=2, group_size=64)
    hooks = GridHooks(layers, Grid.fit(layers, plan))
    extra = {"decoder_input_ids": IDS[:2]} if model.config.is_encoder_decoder else {}
    one_layer = sum(w.parameter().nbytes for bank in layers[0].banks.values() for w in bank.weights)
    for _ in range(2):
        loss = model(input_ids=IDS[:2], **extra).logits.square().mean()
        assert 0 < held(hooks) <= one_layer
        saved = graph_tensors(loss.grad_fn)
        sizes = {w.parameter().nbytes for bank in layers[0].banks.values() for w in bank.weights}
        own = {parameter.data_ptr() for parameter in model.parameters()}
        kept = [t.untyped_storage() for t in saved]
        assert not [storage for storage in kept if storage.nbytes() in sizes and storage.data_ptr() not in own]
        loss.backward()
        assert 0 < held(hooks) <= one_layer


def graph_tensors(node):
    """What the graph keeps for its backward pass, as packed."""
    seen, waiting, found = set(), [node], []
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
        for name in dir(node):
            if name.startswith("_raw_saved"):
                values = getattr(node, name)
                for value in values if isinstance(values, tuple) else (values,):
                    data = getattr(value, "data", None)
                    if isinstance(data, torch.Tensor):
                        found.append(data)
    return found


def test_a_weight_that_changes_before_its_backward_pass_is_an_error():
    model = build("mixtral")
    layers = find_moe_layers(model)
    plan = allocate(copy.deepcopy(model), method="uniform", average_bits=2, group_size=64)
    GridHooks(layers, Grid.fit(layers, plan))
    loss = model(input_ids=IDS[:2], labels=IDS[:2]).loss
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj.add_(1)
    with pytest.raises(RuntimeError, match=r"weight 'down_proj' .* 'model\.layers\.0\.mlp' .* inplace operation"):
        loss.backward()


class _Keeps(torch.autograd.Function):
    """A product that saves its weight by itself, as some kernels do."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        return x @ weight.T

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.weight, None


def test_a_kernel_that_keeps_its_weight_gets_to_keep_it():
    model = PlainMoE(width=64, hidden=64, experts=2)
    layers = find_moe_layers(model)
    plan = allocate(copy.deepcopy(model), method="uniform", average_bits=2, group_size=64)
    grid = Grid.fit(layers, plan)
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    model(x).sum()
    gradients = []
    for keeps in (False, True):
        one = copy.deepcopy(model)
        hooks = GridHooks(find_moe_layers(one), grid)
        if keeps:
            for module in one.experts.modules():
                if isinstance(module, torch.nn.Linear):
                    module.forward = lambda x, m=module: _Keeps.apply(x, m.weight) + m.bias
        x.grad = None
        one(x).square().sum().backward()
        gradients.append(x.grad.clone())
        hooks.close()
    torch.testing.assert_close(*gradients)


class Validated(Language):
    """With a validation set that is the arguments of the model."""

    def validation_step(self, batch, batch_idx):
        pass

    def val_dataloader(self):
        return DataLoader([{"input_ids": row, "labels": row} for row in IDS[:6]], batch_size=4)


def test_validation_on_and_off_the_grid(tmp_path):
    logger, callback = MemoryLogger(), anneal()
    kept = {}

    class Keep(pl.Callback):
        def on_train_end(self, trainer, module):  # before the weights move onto the grid
            kept.update({name: tensor.clone() for name, tensor in module.model.state_dict().items()})

    module = fit(tmp_path, Keep(), callback, module=Validated(), logger=logger, val_check_interval=2)
    losses = {step: metrics for step, metrics in logger.calls if "anneal/val_loss" in metrics}
    assert losses.keys() == {6, 8, 10}
    plain = build("mixtral")
    with torch.no_grad():
        on = module.model.eval()(input_ids=IDS[:6], labels=IDS[:6]).loss.item()
        plain.load_state_dict(kept)
        off = plain(input_ids=IDS[:6], labels=IDS[:6]).loss.item()
    assert losses[10]["anneal/val_loss"] == pytest.approx(on, rel=1e-5)
    assert losses[10]["anneal/val_loss_float"] == pytest.approx(off, rel=1e-5)
    assert on != pytest.approx(off, rel=1e-4)


@pytest.mark.slow
def test_a_plan_from_a_run_brings_its_curvature_and_statistics(tmp_path):
    """From the first step on the optimizer has no second moments, and no step has been recorded."""
    monitor = RouterNormMonitor(group_size=64, method="curvature", bits=(1, 2, 3), average_bits=2)
    module = fit(tmp_path / "first", monitor)
    before = copy.deepcopy(module.model)
    callback = anneal(start=0, plan=tmp_path / "first" / "precision_plan.json", statistics_steps=1)
    module = fit(tmp_path / "second", callback, module=module, steps=2)
    layers = find_moe_layers(before)
    weighted = Grid.fit(layers, monitor.plan, monitor.curvature, monitor.statistics)
    plain = Grid.fit(layers, monitor.plan, monitor.curvature)
    for layer, scales in callback.grid.scales.items():
        for name, scale in scales.items():
            assert torch.equal(scale, weighted.scales[layer][name])
            assert not torch.equal(scale, plain.scales[layer][name])


@pytest.mark.slow
def test_resume_in_the_middle_ends_bit_identical(tmp_path):
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=7, save_top_k=-1, filename="{step}")
    same = IDS[:4].repeat(10, 1)  # a DataLoader starts over when a run is resumed
    whole = fit(tmp_path / "whole", anneal(), saver, data=same, enable_checkpointing=True)
    module = fit(tmp_path / "resumed", anneal(), data=same, ckpt_path=str(tmp_path / "saved" / "step=7.ckpt"))
    for (name, a), (_, b) in zip(whole.state_dict().items(), module.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    first, second = (Grid.load(tmp_path / run / "annealed_plan.grid.safetensors") for run in ("whole", "resumed"))
    assert first.plan.diff(second.plan) == []
    for layer, scales in first.scales.items():
        assert all(torch.equal(scales[name], second.scales[layer][name]) for name in scales)


def test_what_is_logged_and_when_it_begins(tmp_path):
    logger = MemoryLogger()
    module = Language()
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), lr=2e-2)  # from code to code
    fit(tmp_path, anneal(start=6), module=module, logger=logger)
    active = {step: metrics["anneal/active"] for step, metrics in logger.calls if "anneal/active" in metrics}
    assert active == {2: 0.0, 4: 0.0, 6: 0.0, 8: 1.0, 10: 1.0}
    flips = {step: metrics["anneal/flips"] for step, metrics in logger.calls if "anneal/flips" in metrics}
    assert flips.keys() == {8, 10}
    assert all(0 < share < 0.5 for share in flips.values())


@pytest.mark.slow
def test_annealing_beats_quantizing_afterwards(trained):
    """On real text: the same steps, on the grid and off it, then 1 bit for all."""
    model, held_out = trained
    loss_of = {}
    for on in (True, False):
        one = copy.deepcopy(model).train()
        layers = find_moe_layers(one)
        plan = allocate(copy.deepcopy(model), method="uniform", average_bits=1, group_size=64)
        hooks = GridHooks(layers, Grid.fit(layers, plan)) if on else None
        optimizer = torch.optim.AdamW(one.parameters(), lr=1e-3)
        for rows in held_out[64:].split(16):
            optimizer.zero_grad()
            one(input_ids=rows, labels=rows).loss.backward()
            optimizer.step()
        grid = None
        if hooks is not None:
            hooks.settle()
            hooks.close()
            grid = hooks.grid
        packed = quantize_model(one, plan, grid=grid)
        with torch.no_grad():
            loss_of[on] = packed(input_ids=held_out[:64], labels=held_out[:64]).loss.item()
    assert loss_of[True] < loss_of[False] - 0.03


def test_a_given_plan_and_one_by_router_norms(tmp_path):
    plan = allocate(build("mixtral"), method="random", average_bits=2, bits=(1, 2, 3), group_size=64)
    fit(tmp_path / "given", anneal(plan=plan))
    assert PrecisionPlan.load(tmp_path / "given" / "annealed_plan.json").diff(plan) == []
    monitor = RouterNormMonitor(group_size=64)
    fit(tmp_path / "norms", monitor, anneal(method="router_norm", bits=(2, 3), average_bits=2.5))
    made = PrecisionPlan.load(tmp_path / "norms" / "annealed_plan.json")
    assert made.method == "router_norm"
    assert made.baseline_step == 0


@pytest.mark.slow
def test_accumulation_logs_each_step_once_and_a_second_fit_plans_anew(tmp_path):
    logger, callback = MemoryLogger(), anneal()
    fit(tmp_path, callback, logger=logger, accumulate_grad_batches=3)
    steps = [step for step, metrics in logger.calls if "anneal/active" in metrics]
    assert steps == [2, 4, 6, 8, 10]
    first = callback.plan
    fit(tmp_path, callback, steps=4)
    assert callback.plan is not first


def test_a_grid_of_other_weights_is_refused(tmp_path):
    module = fit(tmp_path, anneal())
    plan, grid = tmp_path / "annealed_plan.json", tmp_path / "annealed_plan.grid.safetensors"
    with torch.no_grad():
        module.model.model.layers[0].mlp.gate.weight.mul_(1.1)
    with pytest.raises(GridError, match="the grid belongs to other weights"):
        quantize_model(module.model, plan, grid=grid)


def test_experts_at_16_bits_are_left_alone():
    model = build("mixtral")
    layers = find_moe_layers(model)
    with torch.no_grad():
        layers[0].expert_weights(3)["down_proj"].mul_(1e7)  # what float16 scales cannot hold
    plan = allocate(copy.deepcopy(model), method="uniform", average_bits=2, group_size=64)
    for layer in plan.layers.values():
        for widths in layer.projection_bits.values():
            widths[3] = 16
    before = {name: tensor.clone() for name, tensor in layers[0].expert_weights(3).items()}
    hooks = GridHooks(layers, Grid.fit(layers, plan))
    hooks.settle()
    for name, tensor in layers[0].expert_weights(3).items():
        assert torch.equal(tensor, before[name])


def test_a_grid_file(tmp_path):
    model = build("mixtral")
    plan = allocate(copy.deepcopy(model), method="uniform", average_bits=2, group_size=64)
    grid = Grid.fit(find_moe_layers(model), plan)
    grid.save(tmp_path / "x.safetensors")
    again = Grid.load(tmp_path / "x.safetensors")
    for kind in ("scales", "offsets"):
        torch.testing.assert_close(getattr(again, kind), getattr(grid, kind), rtol=0, atol=0)
    assert again.router_norms == {}
    assert again.plan.diff(plan) == []
    other = allocate(copy.deepcopy(model), method="uniform", average_bits=3, group_size=64)
    with pytest.raises(GridError, match="belongs to another plan"):
        quantize_model(model, other, grid=again)
    Grid(replace(plan, group_size=24), grid.scales, grid.offsets).save(tmp_path / "x.safetensors")
    with pytest.raises(GridError, match=r"x\.safetensors' is not an intact grid file: group_size=24 does not divide"):
        Grid.load(tmp_path / "x.safetensors")


def frozen():
    module = Language()
    module.model.model.layers[0].mlp.experts.down_proj.requires_grad_(False)
    return module


def adapted():
    module = Language("switch_transformers")
    inject_adapter_in_model(LoraConfig(target_modules=["wi"]), module.model)
    return module


@pytest.mark.parametrize(
    ("module", "callbacks", "error", "message"),
    [
        (Language, lambda: [anneal(start=10)], AnnealError, "start=10 is step 10 of 10"),
        (frozen, lambda: [anneal()], AnnealError, "is frozen"),
        (adapted, lambda: [anneal()], AnnealError, "behind an adapter"),
        (Language, lambda: [anneal(), WeightAveraging()], AnnealError, "averages weights"),
        (Language, lambda: [anneal(group_size=48)], PlanError, "does not divide"),
        (
            Language,
            lambda: [anneal(method="norm_only", bits=(2, 3), average_bits=2.5)],
            AnnealError,
            "RouterNormMonitor records",
        ),
        (
            Language,
            lambda: [anneal(plan=allocate(build("qwen3_moe"), method="uniform", average_bits=2, group_size=64))],
            PlanError,
            "for a model of type 'qwen3_moe'",
        ),
    ],
)
def test_bad_input_stops_the_run(module, callbacks, error, message, tmp_path):
    with pytest.raises(error, match=message):
        fit(tmp_path, *callbacks(), module=module())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": 1.5}, "a whole step"),
        ({"method": "sensitivity"}, "needs measured costs"),
        ({"average_bits": 5.0}, "outside the levels"),
        ({"export_to": "plan.txt"}, "must end in .json"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        anneal(**arguments)
