"""One training with a time budget: Lightning, atomic checkpoints, exact resume, orderly stops."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, IterableDataset

from hiperlab.clock import Clock
from hiperlab.miniature import record
from hiperlab.miniature.module import StageModule
from hiperlab.miniature.plan import Workshop
from hiperlab.report.checkpoint import AtomicCheckpointIO, StepCheckpoints, newest_valid
from hiperlab.report.signals import StopCallback


class Endless(IterableDataset):
    """Empty batches for ever: a stage knows what to do from its step number."""

    def __iter__(self) -> Iterator[int]:
        while True:
            yield 0


class Watch(Callback):
    """Counts the time, ends the training when the budget is used up, says how it goes, keeps the loss curve.

    The loss is read from the device only when a line is due, so that a GPU is never waited for in between.

    Args:
        name: of the stage.
        seconds: between lines.
        curve: points of earlier sessions, [step, mean loss since the point before].
    """

    def __init__(self, name: str, seconds: float, curve: list[list[float]]) -> None:
        self.name, self.seconds, self.curve = name, seconds, curve
        self.out_of_time = False
        self._sum: torch.Tensor | None = None
        self._count = 0
        self._last = 0.0
        self._start = 0
        self._clock = Clock(seconds)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._last = time.monotonic()
        self._start = trainer.global_step
        self._clock = Clock(self.seconds, self._start)
        self.curve[:] = [point for point in self.curve if point[0] <= trainer.global_step]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        """Count, and stop or speak when due."""
        assert isinstance(pl_module, StageModule)
        loss = outputs["loss"].detach()
        self._sum = loss if self._sum is None else self._sum + loss
        self._count += 1
        now = time.monotonic()
        pl_module.elapsed += now - self._last
        self._last = now
        step, limit = trainer.global_step, pl_module.fit_settings.minutes
        if step == self._start + 1:
            self._clock.restart(step)  # the first step pays for compiling; leave it out of the speed
        if limit is not None and pl_module.elapsed >= 60 * limit and step < pl_module.fit_settings.steps:
            self.out_of_time = trainer.should_stop = True
        last = trainer.should_stop or step == pl_module.fit_settings.steps
        if self._clock.due(last or len(self.curve) < 2):
            self._speak(step, pl_module)

    def _speak(self, step: int, module: StageModule) -> None:
        """One line: `vae 1200/6000  loss 0.0712  11.20 step/s  2.1 min left`."""
        assert self._sum is not None
        mean = float(self._sum) / self._count
        self.curve.append([step, round(mean, 6)])
        self._sum, self._count = None, 0
        parts = [f"{self.name} {step}/{module.fit_settings.steps}", f"loss {mean:.4f}"]
        if speed := self._clock.speed(step):
            left = (module.fit_settings.steps - step) / speed
            if module.fit_settings.minutes is not None:
                left = min(left, max(60 * module.fit_settings.minutes - module.elapsed, 0.0))
            parts += [f"{speed:.2f} step/s", f"{left / 60:.1f} min left"]
        print("  ".join(parts), file=sys.stderr, flush=True)


def train(shop: Workshop, name: str, module: StageModule) -> dict[str, Any]:
    """Train a stage until its steps or its time are used up; goes on from its newest good checkpoint.

    Args:
        shop: where and on what.
        name: of the stage.
        module: its network with the loss; holds the trained weights afterwards, on the CPU.

    Returns:
        For stage.json: status ("finished" or "budget"), steps, seconds, curve.

    Raises:
        StoppedError: a signal arrived; the last step is saved.
    """
    folder = shop.folder(name)
    checkpoints = StepCheckpoints(folder / "checkpoints", module.fit_settings.checkpoint_every, keep=1)
    earlier = newest_valid(folder / "checkpoints") if shop.resume else None
    if not shop.resume:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    known = record.read(folder) or {}
    watch = Watch(name, shop.say_every, list(known.get("curve", [])) if earlier else [])
    module.compiling = shop.compile
    stop = StopCallback(shop.signals, checkpoints, shop.command)
    trainer = pl.Trainer(
        accelerator="gpu" if shop.device.type == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed" if shop.bf16 else "32-true",
        max_steps=module.fit_settings.steps,
        max_epochs=-1,
        gradient_clip_val=module.fit_settings.clip,
        callbacks=[watch, stop, checkpoints],
        plugins=[AtomicCheckpointIO()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    trainer.fit(module, DataLoader(Endless(), batch_size=None), ckpt_path=earlier, weights_only=True)
    record.write(folder, steps=trainer.global_step, seconds=round(module.elapsed, 1), curve=watch.curve)
    stop.raise_if_stopped()
    return {
        "status": "budget" if watch.out_of_time else "finished",
        "steps": trainer.global_step,
        "samples": trainer.global_step * module.fit_settings.batch,
        "seconds": round(module.elapsed, 1),
        "curve": watch.curve,
    }
