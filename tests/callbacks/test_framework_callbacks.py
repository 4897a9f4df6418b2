"""OLMo-core, Megatron-Bridge and torchtitan: stand-ins that call what these trainers call, in their order.

Where OLMo-core is installed its own base class is under the callback. Names and order are those of olmo_core 3.0.0
(train/trainer.py), megatron-bridge 0.3.1 (training/train.py) and torchtitan 0.3.0 (trainer.py).
"""

from types import SimpleNamespace

import pytest
import torch

from moe_precision import PrecisionPlan, RouterNormHistory
from moe_precision.callbacks.megatron_bridge_callback import MegatronBridgeCallback
from moe_precision.callbacks.olmo_core_callback import OlmoCoreCallback
from moe_precision.callbacks.torchtitan_recorder import TorchtitanRecorder
from moe_precision.recording.curvature import Curvature
from tests.layers.test_layouts import MoEMLP, megatron, olmo, torchtitan

SETTINGS = {"average_bits": 2.5, "group_size": 16, "every_n_steps": 2}
STEPS = 6


def update(model, optimizer):
    optimizer.zero_grad()
    sum((index + 1) * weight.square().mean() for index, weight in enumerate(model.parameters())).backward()
    optimizer.step()


class OlmoTrainer:
    """``fit`` of olmo_core's Trainer, and its checkpoints."""

    def __init__(self, folder, callback, model=None):
        model = olmo(MoEMLP(48)) if model is None else model
        self.train_module = SimpleNamespace(model=model, optim=torch.optim.AdamW(model.parameters(), lr=1e-2))
        self.global_step, self.save_folder, self.callback = 0, str(folder), callback
        callback.trainer = self

    def fit(self, until=STEPS, fails=False):
        self.callback.pre_train()
        try:
            while self.global_step < until:
                self.global_step += 1
                update(self.train_module.model, self.train_module.optim)
                self.callback.post_train_batch()
            if fails:
                raise RuntimeError("a node is lost")
        except RuntimeError as error:
            self.callback.on_error(error)
            return
        self.callback.post_train()


def check(folder, layout):
    plan = PrecisionPlan.load(folder / "precision_plan.json")
    assert (plan.method, plan.last_step) == ("curvature", STEPS)
    assert plan.patterns == ({} if layout is None else {"layout": layout})
    assert Curvature.load(folder / "precision_plan.curvature.safetensors").layers
    return RouterNormHistory.load(folder / "precision_plan.history.safetensors")


def test_olmo_core(tmp_path):
    torch.manual_seed(0)
    trainer = OlmoTrainer(tmp_path, OlmoCoreCallback(**SETTINGS))
    router = trainer.train_module.model.feed_forward_moe.router
    before = router.weight.detach().view(4, 32).norm(dim=1)
    trainer.fit()
    history = check(tmp_path, "olmo-core")
    assert history.steps == [0, 2, 4, 6]
    torch.testing.assert_close(history.first["feed_forward_moe"], before)
    torch.testing.assert_close(history.last["feed_forward_moe"], router.weight.detach().view(4, 32).norm(dim=1))


def test_olmo_core_resumed_from_its_checkpoint(tmp_path):
    torch.manual_seed(0)
    first = OlmoTrainer(tmp_path, OlmoCoreCallback(**SETTINGS))
    first.fit(until=3, fails=True)
    assert RouterNormHistory.load(tmp_path / "precision_plan.history.safetensors").steps == [0, 2]
    state = first.callback.state_dict()
    again = OlmoTrainer(tmp_path, OlmoCoreCallback(**SETTINGS), first.train_module.model)
    again.global_step = 3
    again.callback.load_state_dict(state)
    again.fit()
    assert check(tmp_path, "olmo-core").steps == [0, 2, 4, 6]
    torch.testing.assert_close(again.callback.history.first, first.callback.history.first)


def bridge(folder, callback, model, optimizer, start=0, until=STEPS, **split):
    """``train`` of Megatron-Bridge: the step is counted after its callbacks."""
    sizes = {"pipeline_model_parallel_size": 1, "tensor_model_parallel_size": 1, "expert_tensor_parallel_size": None}
    state = SimpleNamespace(
        train_state=SimpleNamespace(step=start), cfg=SimpleNamespace(model=SimpleNamespace(**sizes | split))
    )
    context = SimpleNamespace(state=state, model=[model], optimizer=SimpleNamespace(optimizer=optimizer))
    callback.on_train_start(context)
    while state.train_state.step < until:
        update(model, optimizer)
        callback.on_train_step_end(context)
        state.train_state.step += 1
    callback.on_train_end(context)


@pytest.mark.slow
def test_megatron_bridge_goes_on_with_its_history(tmp_path):
    model = megatron()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    bridge(tmp_path, MegatronBridgeCallback(folder=str(tmp_path), **SETTINGS), model, optimizer, until=4)
    history = RouterNormHistory.load(tmp_path / "precision_plan.history.safetensors")
    assert history.steps == [0, 2, 4]
    bridge(tmp_path, MegatronBridgeCallback(folder=str(tmp_path), **SETTINGS), model, optimizer, start=4)
    longer = check(tmp_path, "megatron")
    assert longer.steps == [0, 2, 4, 6]
    torch.testing.assert_close(longer.first, history.first)


def test_megatron_bridge_split_over_processes_is_refused(tmp_path):
    for split, message in (
        ({"pipeline_model_parallel_size": 2}, "pipeline parallelism"),
        ({"tensor_model_parallel_size": 2}, "tensor parallelism of experts"),
    ):
        model = megatron()
        optimizer = torch.optim.AdamW(model.parameters())
        with pytest.raises(ValueError, match=rf"split over 2 processes \({message}\)"):
            bridge(tmp_path, MegatronBridgeCallback(folder=str(tmp_path)), model, optimizer, **split)


class TitanTrainer:
    """``train`` of torchtitan's Trainer, whose checkpointer has named states."""

    def __init__(self, folder, model):
        self.model_parts, self.optimizers = [model], [torch.optim.AdamW(model.parameters(), lr=1e-2)]
        self.parallel_dims, self.step = SimpleNamespace(pp=1), 0
        self.checkpointer = SimpleNamespace(states={})
        self.config = SimpleNamespace(dump_folder=str(folder), training=SimpleNamespace(steps=STEPS))

    def train_step(self, data_iterator):
        update(self.model_parts[0], self.optimizers[0])

    def train(self, until=STEPS):
        while self.step < until:
            self.step += 1
            self.train_step(iter(()))


@pytest.mark.slow
def test_torchtitan(tmp_path):
    trainer = TitanTrainer(tmp_path, torchtitan())
    TorchtitanRecorder(**SETTINGS).attach(trainer)
    trainer.train(until=3)
    state = trainer.checkpointer.states["router_norms"].state_dict()
    assert [*state] == ["router_norms"]
    assert isinstance(state["router_norms"], bytes)
    again = TitanTrainer(tmp_path, trainer.model_parts[0])
    TorchtitanRecorder(**SETTINGS).attach(again)
    again.checkpointer.states["router_norms"].load_state_dict(state)
    again.step = 3
    again.train()
    assert check(tmp_path, None).steps == [0, 2, 4, 6]
    again.parallel_dims.pp = 2
    with pytest.raises(ValueError, match="pipeline parallelism"):
        TorchtitanRecorder(**SETTINGS).attach(again)


@pytest.mark.parametrize("name", ["curvature_batches", "statistics_batches", "distill_steps"])
def test_what_takes_batches_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}=3 cannot be done here: this trainer gives a callback no batches"):
        OlmoCoreCallback(**{name: 3})
