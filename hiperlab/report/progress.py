"""Progress over optimizer steps: a bar on a terminal, a line now and then in a job log."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ProgressBar
from tqdm import tqdm

from hiperlab.clock import Clock


class StepProgress(ProgressBar):
    """Shows loss, speed and remaining time; the loader is endless, so the total is `max_steps`.

    The loss is read from the device only when something is drawn. Only global rank 0 shows anything.

    Args:
        seconds: between lines where there is no terminal.
        stream: where to write; None means stderr.
    """

    def __init__(self, seconds: float = 10.0, stream: TextIO | None = None) -> None:
        super().__init__()
        self.seconds = seconds
        self.stream = stream
        self._bar: tqdm | None = None
        self._enabled = True
        self._seen = 0  # steps shown
        self._start = 0  # step the fit began at
        self._clock = Clock(seconds)

    def enable(self) -> None:
        """Show progress (Lightning calls it)."""
        self._enabled = True

    def disable(self) -> None:
        """Show nothing (Lightning calls it on all ranks but the first)."""
        self._enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar where a resumed run left off."""
        stream = self.stream or sys.stderr
        self._seen = self._start = trainer.global_step
        self._clock = Clock(self.seconds, self._start)
        if self._enabled and stream.isatty():
            self._clock.seconds = 0.5  # between two looks at the loss
            self._bar = tqdm(
                total=trainer.max_steps, initial=self._seen, desc="fit", unit="step", file=stream, dynamic_ncols=True
            )

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Advance at the optimizer-step boundary."""
        step = trainer.global_step
        if not self._enabled or step == self._seen:
            return
        advance, self._seen = step - self._seen, step
        if step == self._start + 1:
            self._clock.restart(step)  # the first step pays for warming up; leave it out of the speed
        due = self._clock.due(step == trainer.max_steps)
        if self._bar is not None:
            if due:
                self._bar.set_postfix_str(_loss(trainer), refresh=False)
            self._bar.update(advance)
        elif due:
            print(self._line(trainer, step), file=self.stream or sys.stderr, flush=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the terminal in order before the error is printed."""
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the bar."""
        self._close()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print without tearing the bar apart."""
        text = kwargs.get("sep", " ").join(str(arg) for arg in args)
        if self._bar is not None:
            self._bar.write(text, file=self.stream or sys.stderr)
        else:
            print(text, file=self.stream or sys.stderr, flush=True)

    def _line(self, trainer: Trainer, step: int) -> str:
        """The line of a job log: `fit 120/500  loss=0.1234  3.20 step/s  02:05 left`."""
        parts = [f"fit {step}/{trainer.max_steps}", _loss(trainer)]
        if speed := self._clock.speed(step):
            left = tqdm.format_interval((trainer.max_steps - step) / speed)
            parts += [f"{speed:.2f} step/s", f"{left} left"]
        return "  ".join(filter(None, parts))

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _loss(trainer: Trainer) -> str:
    """The newest loss as `loss=0.1234`, or nothing before the first value."""
    loss = trainer.callback_metrics.get("loss")
    return "" if loss is None else f"loss={loss.item():.4f}"
