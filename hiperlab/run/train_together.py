"""Train several methods in one loop whose U-Net calls they share, each as if it were alone.

What watches over a lone training (checkpoints, samples, the guard against losses that are not finite) watches over each
of them: it is shown a view of the Trainer that knows that one only.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.loggers import Logger
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from hiperlab.base.side_by_side import SideBySide
from hiperlab.data.module import ConceptData
from hiperlab.errors import StoppedError
from hiperlab.report.checkpoint import AtomicCheckpointIO
from hiperlab.report.progress import StepProgress
from hiperlab.report.signals import StopCallback
from hiperlab.run.session import speaks_for
from hiperlab.run.trainee import Trainee, begin, make_trainer, split_batch

log = logging.getLogger(__name__)


class Views:
    """The Trainer as the watchers of each method see it.

    Args:
        trainees: what is trained.
    """

    def __init__(self, trainees: Sequence[Trainee]) -> None:
        self.module: SideBySide | None = None
        self.all = [_View(self, number, trainee.loggers()) for number, trainee in enumerate(trainees)]


class _View:
    """What a callback asks of a Trainer, for one of several methods."""

    is_global_zero, world_size, global_rank, local_rank = True, 1, 0, 0

    def __init__(self, views: Views, number: int, loggers: list[Logger]) -> None:
        self.views, self.number, self.loggers = views, number, loggers
        self.ended_at: int | None = None
        self.ends = False
        self.callback_metrics: dict[str, float] = {}

    @property
    def real(self) -> Trainer:
        """The Trainer of all."""
        assert self.views.module is not None
        return self.views.module.trainer

    @property
    def global_step(self) -> int:
        """Optimizer steps of this method."""
        return self.real.global_step if self.ended_at is None else self.ended_at

    @property
    def max_steps(self) -> int:
        """As of all."""
        return self.real.max_steps

    @property
    def should_stop(self) -> bool:
        """Whether this method ends now."""
        return self.ends or self.real.should_stop

    @should_stop.setter
    def should_stop(self, value: bool) -> None:
        self.ends = value

    @property
    def precision_plugin(self) -> Any:
        """As of all."""
        return self.real.precision_plugin

    @property
    def strategy(self) -> Any:
        """One process writes for all."""
        return SimpleNamespace(checkpoint_io=self.real.strategy.checkpoint_io, broadcast=lambda value, _: value)

    def save_checkpoint(self, path: Path, weights_only: bool = False) -> None:
        """Write this method's own checkpoint."""
        assert self.views.module is not None
        self.views.module.writing = self.number
        self.real.save_checkpoint(path, weights_only=weights_only)


class _Watch(Checkpoint):
    """Shows every event to the watchers of each method that is still trained; theirs are the only checkpoints.

    Args:
        views: the Trainer as each sees it.
        trainees: what is trained.
    """

    def __init__(self, views: Views, trainees: Sequence[Trainee]) -> None:
        self.views, self.watchers = views, [trainee.watchers() for trainee in trainees]
        self.folders = [trainee.session.folder for trainee in trainees]
        self._seen = 0

    def _show(self, module: SideBySide, hook: str, given: Callable[[int], tuple[Any, ...]]) -> None:
        for number in list(module.active):
            with self._guarded(module, number):
                for watcher in self.watchers[number]:
                    getattr(watcher, hook)(self.views.all[number], module.method(number), *given(number))

    @contextmanager
    def _guarded(self, module: SideBySide, number: int) -> Iterator[None]:
        """A method that is stopped by its own watcher leaves; the others go on."""
        with speaks_for(self.folders[number]):
            try:
                yield
            except StoppedError as error:
                log.error("%s", error)
                module.leave(number, error)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the first batch."""
        assert isinstance(pl_module, SideBySide)
        self._seen = trainer.global_step
        self._show(pl_module, "on_train_start", lambda number: ())
        self._dismiss(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Each with its own batch."""
        assert isinstance(pl_module, SideBySide)
        self._show(pl_module, "on_train_batch_start", lambda number: (batch[number], batch_idx))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Each with its own loss."""
        assert isinstance(pl_module, SideBySide)
        self._show(pl_module, "on_before_backward", lambda number: (pl_module.losses[number],))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Each with its own optimizer; its metrics go to its loggers."""
        assert isinstance(pl_module, SideBySide)
        self._show(pl_module, "on_before_optimizer_step", lambda number: (pl_module.optimizer_of(number),))
        each = {number: pl_module.method(number).step_metrics() for number in pl_module.active}
        if not each:
            return
        values = iter(torch.stack([value for found in each.values() for value in found.values()]).tolist())  # one wait
        for number, found in each.items():
            view = self.views.all[number]
            metrics = {name: next(values) for name in found}
            view.callback_metrics.update(metrics)
            for logger in view.loggers:
                logger.log_metrics(metrics, trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """After each batch; those that have finished leave."""
        assert isinstance(pl_module, SideBySide)
        self._show(pl_module, "on_train_batch_end", lambda number: (None, None, 0))
        if trainer.global_step != self._seen:
            self._seen = trainer.global_step
            self._dismiss(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """All are told."""
        assert isinstance(pl_module, SideBySide)
        self._show(pl_module, "on_exception", lambda number: (exception,))

    def _dismiss(self, module: SideBySide) -> None:
        for number in list(module.active):
            view = self.views.all[number]
            if view.ends:
                view.ended_at = module.trainer.global_step
                module.leave(number)


def _name(trainee: Trainee) -> str:
    """A training by its run and what it learns."""
    return f"{trainee.session.folder.name} ({', '.join(subject.name for subject in trainee.method.concepts)})"


class _Batches(pl.LightningDataModule):
    """A list of each method's own batches."""

    def __init__(self, each: Sequence[ConceptData]) -> None:
        super().__init__()
        self.each = each

    def train_dataloader(self) -> list[DataLoader]:
        for data in self.each:
            data.trainer = self.trainer
        return [data.train_dataloader() for data in self.each]


def train_together(trainees: Sequence[Trainee], micro: int | None, stop: StopCallback) -> tuple[SideBySide, list[Any]]:
    """Train them to their ends.

    Args:
        trainees: of runs that ask for the same Trainer, precision and `fit` settings, at the same step.
        micro: most images of a concept at a time.
        stop: ends them all when the process is told to stop.

    Returns:
        The module, whose `failed` says who did not get to the end, and the view of each.
    """
    cfg = trainees[0].session.cfg
    rows, accumulate = split_batch(cfg.fit.batch_size, micro, 1)
    each = [trainee.data(rows, accumulate) for trainee in trainees]
    begin(trainees, rows, 1)
    starts = [trainee.start for trainee in trainees]
    views = Views(trainees)
    module = SideBySide(
        [trainee.method for trainee in trainees],
        read=lambda number: AtomicCheckpointIO().load_checkpoint(starts[number]),
    )
    views.module = module
    watch = _Watch(views, trainees)
    trainer = make_trainer(trainees[0].session, [stop, watch, StepProgress()], [])
    trainer.accumulate_grad_batches = accumulate
    log.info(
        "%d trainings share their passes: %s",
        len(trainees), ", ".join(map(_name, trainees)),
    )  # fmt: skip
    status = "failed"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
            warnings.filterwarnings("ignore", ".*Found .* module.* in eval mode.*")
            trainer.fit(module, datamodule=_Batches(each), ckpt_path=starts[0], weights_only=True)
        status = "success"
    finally:
        for view in views.all:
            for logger in view.loggers:
                logger.finalize(status)
    return module, views.all
