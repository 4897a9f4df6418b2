"""Recording in torchtitan, whose trainer has no callbacks: its own step is wrapped, and its checkpoints get a state."""

from __future__ import annotations

from typing import Any

from moe_precision.callbacks.step_recorder import StepRecorder, check_whole


class TorchtitanRecorder(StepRecorder):
    """Records router norms in torchtitan's `Trainer` and writes the plan to its dump folder.

    `attach` comes between the construction of the trainer and ``trainer.train()``. The state is in its checkpoints,
    under ``router_norms``.

    Args:
        settings: As in `RouterNormMonitor`, without those that take batches after the last step.

    Example:
        >>> trainer = config.build()
        >>> TorchtitanRecorder(average_bits=2.5, bits=(2, 3)).attach(trainer)
        >>> trainer.train()
    """

    def attach(self, trainer: Any) -> None:
        """Has a trainer's steps recorded from now on.

        Raises:
            ValueError: The model is split by pipeline parallelism.
        """
        check_whole(trainer.parallel_dims.pp, "pipeline parallelism")
        trainer.checkpointer.states["router_norms"] = self
        step = trainer.train_step

        def recorded(*args: Any, **kwargs: Any) -> Any:
            if not self._layers:  # once a checkpoint has been loaded
                folder = trainer.config.dump_folder
                self.begin(trainer.model_parts[0], [*trainer.optimizers], trainer.step - 1, folder)
            try:
                found = step(*args, **kwargs)
            except BaseException:
                self.fail()
                raise
            self.after_step(trainer.step)
            if trainer.step >= trainer.config.training.steps:
                self.end(trainer.step, [*trainer.optimizers])
            return found

        trainer.train_step = recorded
