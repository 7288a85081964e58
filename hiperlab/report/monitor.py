"""Scores while training: pictures of held-out prompts, a number, and the artifact of the best one so far."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pytorch_lightning import Callback, LightningModule, Trainer

from hiperlab.base import artifact
from hiperlab.base.best_score import BestScore
from hiperlab.base.method import Method
from hiperlab.errors import StoppedError, UserError
from hiperlab.report.checkpoint import steps_in
from hiperlab.report.samples import draw_between, show


def best_path(folder: str | Path, step: int) -> Path:
    """Where the artifact of a best score lies, beside the checkpoints; its step is in its name."""
    return Path(folder) / f"best-{step:06d}.safetensors"


class ScoreMonitor(Callback):
    """Every `every` optimizer steps, and after the last, draws pictures, scores them and keeps the best artifact.

    The scores are the method's (`Method.best_score`), whose checkpoints hold them; an artifact stays as long as a
    checkpoint, or the training as it is now, calls it the best, so that every one of them can be gone on with. Only
    global rank 0 draws. Logs `monitor/<score>`; pictures go to `folder/step-000100.png` and to loggers that take them.

    Args:
        every: optimizer steps between scores.
        judge: pictures -> their score, NaN where nothing was found.
        prompts: texts with placeholders in place, one per picture.
        seeds: one per prompt.
        how: further named values for `method.sample`.
        folder: for strips of the pictures.
        kept: the folder of the checkpoints.
        settings: the method's composed configuration, kept with the artifact.

    Attributes:
        seconds: that drawing and scoring took in this process.
    """

    def __init__(
        self,
        every: int,
        judge: Callable[[Sequence[Image.Image]], float],
        prompts: Sequence[str],
        seeds: Sequence[int],
        how: Mapping[str, Any],
        folder: Path,
        kept: Path,
        settings: Mapping[str, Any],
    ) -> None:
        self.every, self.judge = every, judge
        self.prompts, self.seeds, self.how = list(prompts), list(seeds), dict(how)
        self.folder, self.kept, self.settings = folder, kept, settings
        self.seconds = 0.0
        self._seen = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on from a checkpoint: score it if it is due and was not (a stop came first), else log its score again.

        The line was dropped with those of the steps that are about to be repeated (`RewindLogs`, which comes first).

        Raises:
            StoppedError: the best artifact of the checkpoint is missing or damaged.
        """
        method, best = _watched(pl_module)
        step = self._seen = trainer.global_step
        if not step:
            return
        if best.best is not None and trainer.is_global_zero:
            path = best_path(self.kept, best.best.step)
            try:
                artifact.read(path)
            except UserError as error:
                raise StoppedError(f"the best artifact so far is lost: {error} Start a new run.", 1) from error
        if best.has(step):
            self._log(trainer, best.score, best.seen[-1].score)
        elif step % self.every == 0:
            self._score(trainer, method, best)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Score at the optimizer-step boundary when due. Told to stop, a run scores after its very last step only."""
        step = trainer.global_step
        if step == self._seen:
            return  # between the micro batches of one step
        self._seen = step
        method, best = _watched(pl_module)
        last = step == trainer.max_steps or method.ended
        if last or (step % self.every == 0 and not trainer.should_stop):
            self._score(trainer, method, best)

    def _score(self, trainer: Trainer, method: Method, best: BestScore) -> None:
        start, step, value = time.monotonic(), trainer.global_step, math.nan
        if trainer.is_global_zero:
            pictures = draw_between(method, self.prompts, self.seeds, self.how)
            with torch.random.fork_rng(devices=[]):
                value = self.judge(pictures)
            show(trainer, "monitor", pictures, self.prompts, self.folder / f"step-{step:06d}.png")
        value = trainer.strategy.broadcast(value, 0)
        is_best = best.see(step, value)
        if trainer.is_global_zero:
            if is_best:
                artifact.write(best_path(self.kept, step), method, 0, self.settings, step)
            self._prune(best)
        self._log(trainer, best.score, value)
        self.seconds += time.monotonic() - start

    def _log(self, trainer: Trainer, score: str, value: float) -> None:
        for logger in trainer.loggers:
            logger.log_metrics({f"monitor/{score}": value}, trainer.global_step)

    def _prune(self, best: BestScore) -> None:
        """Delete artifacts that neither this training nor any checkpoint calls the best."""
        needed = {found.step for step in steps_in(self.kept) if (found := best.best_by(step))}
        needed |= {best.best.step} if best.best else set()
        names = {best_path(self.kept, step).name for step in needed}
        for path in self.kept.glob("best-*.safetensors"):
            if path.name not in names:
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()


def _watched(module: LightningModule) -> tuple[Method, BestScore]:
    assert isinstance(module, Method) and module.best_score is not None, "who trains it gives it one"
    return module, module.best_score
