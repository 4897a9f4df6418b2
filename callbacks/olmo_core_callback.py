"""OLMo-core's `Callback` over the shared recorder."""

from __future__ import annotations

from typing import Any

from moe_precision.callbacks.step_recorder import StepRecorder, base_class, check_whole


class OlmoCoreCallback(StepRecorder, base_class("olmo_core.train.callbacks")):  # type: ignore[misc]
    """Records router norms in OLMo-core's `Trainer` and writes the plan to its save folder.

    Its state is in the trainer's checkpoints. ``layout`` is ``olmo-core`` unless something else is given.

    Args:
        settings: As in `RouterNormMonitor`, without those that take batches after the last step.

    Example:
        >>> trainer.add_callback("router_norms", OlmoCoreCallback(average_bits=2.5, bits=(2, 3)))
        >>> trainer.fit()
    """

    priority = 0
    _trainer: Any = None

    def __init__(self, **settings: Any) -> None:
        named = {"layout", "router_pattern", "expert_pattern"} & set(settings)
        StepRecorder.__init__(self, **({} if named else {"layout": "olmo-core"}) | settings)

    @property
    def trainer(self) -> Any:
        """The trainer, which sets it when the callback is added."""
        return self._trainer

    @trainer.setter
    def trainer(self, trainer: Any) -> None:
        self._trainer = trainer

    def _optimizers(self) -> list[Any]:
        return [self.trainer.train_module.optim]

    def pre_train(self) -> None:
        module = self.trainer.train_module
        check_whole(2 if hasattr(module, "model_parts") else 1, "pipeline parallelism")
        self.begin(module.model, self._optimizers(), self.trainer.global_step, str(self.trainer.save_folder))

    def post_train_batch(self) -> None:
        self.after_step(self.trainer.global_step)

    def post_train(self) -> None:
        self.end(self.trainer.global_step, self._optimizers())

    def on_error(self, exc: BaseException) -> None:
        self.fail()
