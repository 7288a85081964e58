"""Training that knows its own end."""

from __future__ import annotations

from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer


class EndWhenFinished(Callback):
    """Ends the fit in order once the method has ended, before `max_steps`; stands before the checkpoints.

    A resumed run that has ended already makes no step.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at what was resumed."""
        self._look(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Look after every step; asking costs a number read from the device where a method can finish early."""
        self._look(trainer, pl_module)

    def _look(self, trainer: Trainer, method: LightningModule) -> None:
        ended = method.ended
        if method.early_stop is not None:  # it asks floating-point numbers, which may round differently per process
            ended = trainer.strategy.broadcast(ended, 0)
        if ended:
            trainer.should_stop = True
