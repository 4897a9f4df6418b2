"""Megatron-Bridge's `Callback` over the shared recorder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_precision.callbacks.step_recorder import StepRecorder, base_class, check_whole
from moe_precision.plans.beside import existing
from moe_precision.recording.history import RouterNormHistory
from moe_precision.recording.masters import innermost
from moe_precision.recording.processes import is_first


class MegatronBridgeCallback(StepRecorder, base_class("megatron.bridge.training.callbacks")):  # type: ignore[misc]
    """Records router norms in Megatron-Bridge's ``pretrain`` and writes the plan to a folder.

    ``layout`` is ``megatron`` unless something else is given. Its checkpoints hold no state of callbacks: the history
    is written to the folder at every record, and a resumed run goes on with it, up to the step that it resumes from.

    Args:
        folder: Where plan and history are written.
        settings: As in `RouterNormMonitor`, without those that take batches after the last step.

    Example:
        >>> callback = MegatronBridgeCallback(folder="runs/norms", average_bits=2.5, bits=(2, 3))
        >>> pretrain(config, forward_step, callbacks=[callback])
    """

    def __init__(self, *, folder: str, **settings: Any) -> None:
        named = {"layout", "router_pattern", "expert_pattern"} & set(settings)
        StepRecorder.__init__(self, **({} if named else {"layout": "megatron"}) | settings)
        self._folder = folder

    def on_train_start(self, context: Any) -> None:
        split = context.state.cfg.model
        check_whole(split.pipeline_model_parallel_size, "pipeline parallelism")
        check_whole(
            getattr(split, "expert_tensor_parallel_size", None) or split.tensor_model_parallel_size,
            "tensor parallelism of experts",
        )
        step = context.state.train_state.step
        written = existing("history", str(Path(self._folder, self.export_to))) if step else None
        if written is not None:
            state = RouterNormHistory.load(written).state_dict()
            kept = sum(one <= step for one in state["steps"])
            state |= {"steps": state["steps"][:kept], "norms": state["norms"][:kept], "loads": {}, "max_variance": {}}
            self._resumed = {"history": state, "experts": {}} if kept else {}
        self.begin(context.model[0], innermost([context.optimizer]), step, self._folder)

    def on_train_step_end(self, context: Any) -> None:
        before = len(self.history.steps)
        self.after_step(context.state.train_state.step + 1)  # counted after this
        if len(self.history.steps) > before and is_first():
            self._save_history()

    def on_train_end(self, context: Any) -> None:
        self.end(context.state.train_state.step, innermost([context.optimizer]))
