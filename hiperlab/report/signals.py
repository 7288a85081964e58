"""Told to stop, a run saves and stops; the exit code says why (143 SIGTERM, 130 Ctrl-C).

Lightning 2.6 answers SIGTERM with exit code 0 and nothing saved, and hangs when one rank of several is signalled; its
SLURM re-queueing rests on the same handlers. During training ours replace them: under SLURM, send SIGTERM early
(`#SBATCH --signal=TERM@120`) and resume the job with resume=auto.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.plugins.environments import LightningEnvironment

from hiperlab.errors import StoppedError
from hiperlab.report.checkpoint import StepCheckpoints

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ECHO = 0.5  # seconds: a terminal and a wrapper both forward one Ctrl-C; only a later one is a second wish


class StopSignals:
    """A context in which SIGTERM and Ctrl-C end the run in order.

    While `deferred` (training), the handler only sets a flag, which the callback reads at the step boundary.
    Otherwise it raises StoppedError on the spot, as Ctrl-C does in any program. A second Ctrl-C ends the process.
    Outside the main thread Python allows no handlers; then nothing is changed.

    Attributes:
        received: number of the signal that arrived, 0 if none.
        deferred: set the flag only.
    """

    def __init__(self) -> None:
        self.received = 0
        self.deferred = False
        self._since = 0.0
        self._pid = os.getpid()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.getsignal(number) for number in _SIGNALS}
            self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def install(self) -> None:
        """Put the handlers in place (again)."""
        if self._previous:
            for number in _SIGNALS:
                signal.signal(number, self._handle)

    def error(self, message: str = "stopped") -> StoppedError:
        """The exception that ends the run: 128 + signal is what a shell reports."""
        return StoppedError(message, 128 + (self.received or signal.SIGTERM))

    def check(self, message: str = "stopped") -> None:
        """Raise StoppedError if a signal has arrived."""
        if self.received:
            raise self.error(message)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a forked data worker inherits the handler, but not the decision
            if number == signal.SIGTERM:
                _default(number)
            return
        if self.received:
            if number == signal.SIGINT and time.monotonic() - self._since > _ECHO:
                _default(number)
            return
        self.received, self._since = number, time.monotonic()
        if not self.deferred:
            raise self.error(f"stopped by {signal.Signals(number).name}")


class StopCallback(Callback):
    """Reads the flag at the optimizer-step boundary, on all ranks alike, and ends the fit; StepCheckpoints saves.

    Call `raise_if_stopped` after `trainer.fit`.

    Args:
        signals: the run's signal context, already entered.
        checkpoints: the callback that saves the last state.
        command: how to go on, printed when stopped.
    """

    def __init__(self, signals: StopSignals, checkpoints: StepCheckpoints, command: str) -> None:
        self.signals = signals
        self.checkpoints = checkpoints
        self.command = command
        self.stopped = False
        self.code = 0  # exit code of this rank once stopped
        self._seen = 0
        self._step = 0
        self._lightning: tuple[Any, Any] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep Lightning from registering its handlers, which it is about to do."""
        self.signals.deferred = True
        connector = getattr(trainer, "_signal_connector", None)
        if connector is not None:
            self._lightning = (connector, connector.register_signal_handlers)
            connector.register_signal_handlers = lambda: None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install ours once more, should Lightning's private connector ever be named otherwise."""
        self.signals.install()
        self._seen = self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Ask all ranks at the boundary; the largest signal number wins."""
        if trainer.global_step == self._seen:
            return
        self._seen = self._step = trainer.global_step
        received = self.signals.received
        if trainer.world_size > 1:
            flag = torch.tensor(received, device=trainer.strategy.root_device)
            received = int(trainer.strategy.reduce(flag, reduce_op="max").item())
        if received:
            self.code = exit_code(trainer, 128 + received)
            self.stopped = True
            trainer.should_stop = True

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the fit as it was found also when it failed."""
        self._restore()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """From here on a signal raises at once again."""
        self._restore()

    def raise_if_stopped(self) -> None:
        """Raise what ends the run if it was told to stop; to be called after `trainer.fit`.

        A signal between the last step and here counts too: all steps are done and saved, but the stages after are not.

        Raises:
            StoppedError: with the step that was saved and the command to go on.
        """
        if self.stopped or self.signals.received:
            saved = f"saved step {self._step}" if self._step else "stopped before the first step"
            code = self.code if self.stopped else 128 + self.signals.received
            raise StoppedError(f"{saved}; resume with: {self.command}", code)

    def _restore(self) -> None:
        self.signals.deferred = False
        if self._lightning is not None:
            connector, register = self._lightning
            connector.register_signal_handlers = register
            self._lightning = None


def exit_code(trainer: Trainer, code: int) -> int:
    """The code this rank should end with: 0 on the helpers that Lightning itself started.

    Lightning kills the main process (SIGKILL) within five seconds of a helper's non-zero exit, in the middle of what
    it may still be writing; nobody else sees a helper's code. Ranks started by torchrun or srun keep theirs.
    """
    helper = trainer.local_rank > 0 and isinstance(
        getattr(trainer.strategy, "cluster_environment", None), LightningEnvironment
    )
    return 0 if helper else code


def _default(number: int) -> None:
    """Let the system do what it does without us."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
