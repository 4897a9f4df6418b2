"""Expert load: counted right in every layout, once, and carried by history, callbacks and plans."""

import copy
import pickle

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from moe_precision import AllocationError, RouterNormHistory, allocate, find_moe_layers
from moe_precision.recording.loads import LoadCounter, count_loads, routing
from moe_precision.recording.router_norms import router_norms
from moe_precision.recording.signals import expert_load
from tests.support.models import CONFIGS, PlainMoE, build
from tests.support.trainers import MemoryLogger, Module, data, monitor, trainer


def ids(rows=2, length=9, seed=1):
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_by_hand():
    index = torch.tensor([[0, 2], [2, 3], [4, 2]])  # 4 is no expert of four
    weights = torch.tensor([[0.5, 0.5], [0.25, 0.75], [1.0, 0.125]])
    load = expert_load(index, weights, 4)
    assert load[0].tolist() == [1, 0, 3, 1]
    assert load[1].tolist() == [0.5, 0.0, 0.875, 0.75]
    unknown = expert_load(index, None, 4)
    assert unknown[0].tolist() == [1, 0, 3, 1]
    assert unknown[1].isnan().all()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "olmoe"])
def test_fused_experts_against_what_their_router_says(family):
    model = build(family, num_experts_per_tok=2)
    said = {}
    layers = find_moe_layers(model)

    def keep(name):
        def hook(module, args, output):
            said[name] = output

        return hook

    for layer in layers:
        model.get_submodule(layer.router.rpartition(".")[0]).register_forward_hook(keep(layer.name))
    counter = LoadCounter(layers, model)
    counter.training = False
    model(input_ids=ids())
    loads = counter.take(training=False)
    assert counter.take(training=False) == {}  # taken
    for layer in layers:
        output = said[layer.name]
        logits = (output if isinstance(output, torch.Tensor) else output[0]).reshape(18, -1)
        tokens = loads[layer.name][0]
        chosen = model.config.num_experts_per_tok
        assert tokens.sum() == 18 * chosen
        if family != "deepseek_v3":  # which adds a bias and masks groups
            expected = torch.bincount(logits.topk(chosen, dim=-1).indices.flatten(), minlength=8)
            assert tokens.tolist() == expected.tolist()
        if family in ("mixtral", "gpt_oss"):  # weights of a token sum to one
            assert loads[layer.name][1].sum() == pytest.approx(18.0, rel=1e-5)


def test_switch_leaves_out_what_exceeds_the_capacity():
    model = build("switch_transformers", expert_capacity=3)
    layers = find_moe_layers(model)
    seen = dict.fromkeys((layer.name for layer in layers), 0)
    for layer in layers:
        for expert in layer.expert_modules():

            def count(module, args, name=layer.name):
                seen[name] += args[0].shape[:-1].numel()

            expert.register_forward_pre_hook(count)
    loads = count_loads(model, [{"input_ids": ids(), "labels": ids()}])
    assert {name: load[0].sum() for name, load in loads.items()} == seen
    assert all(load[0].max() <= 2 * 3 for load in loads.values())  # two sequences
    assert all(0 < load[1].sum() < load[0].sum() for load in loads.values())  # probabilities


def test_modules_in_a_list_tell_tokens_alone():
    model = nn.Sequential(PlainMoE(), PlainMoE())
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    counter = LoadCounter(find_moe_layers(model), model)
    model(x)
    loads = counter.take(training=True)
    expected = torch.bincount(model[0].router(x).argmax(-1), minlength=4)
    assert loads["0"][0].tolist() == expected.tolist()
    assert loads["0"][1].isnan().all()


def test_training_and_validation_apart_and_nothing_after_close():
    """Whoever counts says which it is; the mode of the modules, here the wrong one, does not."""
    model = build("mixtral")
    layers = find_moe_layers(model)
    counter = LoadCounter(layers, model)
    model.eval()
    for seed in range(3):  # three micro-batches of one step
        model(input_ids=ids(seed=seed))
    model.train()
    counter.training = False
    model(input_ids=ids(rows=1))
    assert {load[0].sum().item() for load in counter.take(training=True).values()} == {3 * 18 * 2}
    assert {load[0].sum().item() for load in counter.take(training=False).values()} == {9 * 2}
    counter.close()
    model(input_ids=ids())
    assert counter.take(training=False) == {}
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_counts_once(reentrant):
    model = build("mixtral").train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    counter = LoadCounter(find_moe_layers(model), model)
    model(input_ids=ids(), labels=ids()).loss.backward()
    assert {load[0].sum().item() for load in counter.take(training=True).values()} == {18 * 2}


@pytest.mark.slow
def test_a_compiled_model_counts_too():
    model = nn.Sequential(build("mixtral").model.layers[0].mlp).eval()
    counter = LoadCounter(find_moe_layers(model), model)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for training, batches in ((False, 2), (True, 3), (False, 1)):  # between the same two compiled forms
            counter.training = training
            for _ in range(batches):
                compiled(torch.randn(1, 6, 64))
    for training in (False, True):
        (load,) = counter.take(training=training).values()
        assert load[0].sum() == 3 * 6 * 2


@pytest.mark.slow
def test_the_callback_counts_training_and_the_last_validation(tmp_path):
    class Validated(Module):
        def validation_step(self, batch, batch_idx):
            self.loss(batch)

    callback, logger = monitor(), MemoryLogger()
    trainer(
        tmp_path, callback, logger=logger, accumulate_grad_batches=3, val_check_interval=3, log_every_n_steps=1
    ).fit(Validated(), data(6), data(2))
    history = RouterNormHistory.load(tmp_path / "precision_plan.history.safetensors")
    for loads in (callback.history.loads, history.loads):
        assert {load[0].sum().item() for load in loads["training"].values()} == {6 * 8}  # every micro-batch
        assert {load[0].sum().item() for load in loads["validation"].values()} == {2 * 8}  # only its last run
    shares = [m["expert_load/layer_00/max"] for _, m in logger.calls if "expert_load/layer_00/max" in m]
    assert len(shares) == 2  # one step each
    assert all(1 <= share <= 4 for share in shares)


@pytest.mark.slow
def test_a_resumed_run_counts_on_from_the_checkpoint(tmp_path):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    trainer(tmp_path, monitor(every_n_steps=4), saver, enable_checkpointing=True).fit(Module(), data(6))
    resumed = monitor(every_n_steps=4)
    trainer(tmp_path, resumed).fit(Module(), data(6), ckpt_path=str(tmp_path / "step=3.ckpt"))  # between two records
    assert {load[0].sum().item() for load in resumed.history.loads["training"].values()} == {6 * 8}


def test_plans_by_load():
    model = build("mixtral")
    layers = find_moe_layers(model)
    history = RouterNormHistory.of(layers, "mixtral")
    history.record(0, router_norms(layers))
    history.record(1, router_norms(layers) + 1)
    with pytest.raises(AllocationError, match="no tokens were counted"):
        allocate(history=history, method="load", group_size=64)
    tokens = torch.tensor([5.0, 1, 7, 3, 2, 8, 4, 6])
    history.add_load({layer.name: torch.stack([tokens, tokens / 2]) for layer in layers})
    plan = allocate(history=history, method="load", group_size=64)
    layer = plan.layers[layers[0].name]
    assert layer.bits == [3, 2, 3, 2, 2, 3, 2, 3]  # the four most loaded
    assert layer.signals["expert_load"] == tokens.tolist()
    least = allocate(history=history, method="least_load", group_size=64)
    assert least.layers[layers[0].name].bits == [2, 3, 2, 3, 3, 2, 3, 2]


@pytest.mark.parametrize(
    "extra",
    [
        (torch.tensor([2, 1, 0, 0]),),  # tokens per expert
        (torch.tensor([0, 1, 2]),),  # positions
        (torch.ones(3, 4, dtype=torch.int64),),  # as wide as there are experts: a mask or indices
        (torch.ones(3, dtype=torch.bool),),  # padding
    ],
)
def test_other_integers_are_not_taken_for_indices(extra):
    hidden = torch.randn(3, 8)
    assert routing((hidden, *extra), 4) is None
    index = torch.tensor([[0, 2], [1, 2], [3, 0]])
    found, weights = routing((hidden, *extra, index, torch.rand(3, 2)), 4)
    assert found is index
    assert weights.shape == (3, 2)


def test_masks():
    hidden, mask = torch.randn(3, 8), torch.tensor([[True, False], [True, True], [False, False]])
    index, _ = routing((hidden, mask), 2)
    assert expert_load(index, None, 2)[0].tolist() == [2, 1]


def test_copies_and_pickles_of_a_counted_model_do_not_count():
    model = nn.Sequential(PlainMoE())
    counter = LoadCounter(find_moe_layers(model), model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied(torch.randn(5, 32))
    assert counter.take(training=True) == {}
    model(torch.randn(5, 32))
    assert counter.take(training=True)["0"][0].sum() == 5


def test_a_fit_without_a_step_leaves_no_hook(tmp_path):
    module = Module()
    trainer(tmp_path, monitor(), limit_train_batches=1, accumulate_grad_batches=1).fit(module, data(1))
    assert not any(one._forward_pre_hooks for one in module.modules())
    stopped = monitor()
    stopped._start(module, 0)
    assert any(one._forward_pre_hooks for one in module.modules())
    with pytest.warns(UserWarning, match="no optimizer step was taken"):
        assert stopped._finish(False, []) is None
    assert not any(one._forward_pre_hooks for one in module.modules())


def test_a_family_whose_experts_are_not_called_with_indices_has_no_load():
    config = {key: CONFIGS["mixtral"][key] for key in ("vocab_size", "hidden_size")}
    experts = nn.Module()
    experts.gate_up_proj = nn.Parameter(torch.randn(4, config["hidden_size"], 128))
    experts.down_proj = nn.Parameter(torch.randn(4, 64, config["hidden_size"]))
    experts.forward = lambda x: x
    model = nn.Module()
    model.experts, model.router = experts, nn.Linear(config["hidden_size"], 4, bias=False)
    counter = LoadCounter(find_moe_layers(model), model)
    model.experts(torch.randn(3, config["hidden_size"]))
    assert counter.take(training=True) == {}


@pytest.mark.slow
def test_hooks_count_in_code_that_was_compiled_before_them():
    """As in Lightning: the sanity check compiles the model before training begins, and validation runs it again."""
    model = build("mixtral").eval()
    compiled = torch.compile(model, backend="eager")
    ids = torch.randint(3, 128, (2, 9))
    with torch.no_grad():
        compiled(input_ids=ids)
        counter = LoadCounter(find_moe_layers(compiled), compiled)
        compiled(input_ids=ids)
    assert {load[0].sum().item() for load in counter.take(training=True).values()} == {18 * 2}
