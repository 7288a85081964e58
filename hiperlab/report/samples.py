"""Samples while training: the same few prompts and seeds every time, so that a strip shows what was learned."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn

from hiperlab.errors import UserError
from hiperlab.report.grid import save_png, strip, to_pil


class TrainingSamples(Callback):
    """Every `every` optimizer steps (and before the first, and after the last) draws one picture per prompt.

    Writes `folder/train-000100.png` and hands the pictures to every logger that has `log_images`. Only global rank 0
    samples. Draws are keyed on their seeds, so training goes on exactly as it would have without.

    Args:
        folder: the run's `grids` folder.
        every: optimizer steps between samples; 0 turns the callback off.
        prompts: texts with placeholders in place.
        seeds: one per prompt.
        steps: denoising steps.
        guidance: classifier-free guidance scale.
        options: further named values for `method.sample`, such as concepts or sampler.

    Attributes:
        seconds: that drawing took in this process.
    """

    def __init__(
        self,
        folder: str | Path,
        every: int,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int,
        guidance: float,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if every < 0 or len(prompts) != len(seeds):
            raise UserError(
                f"sample_every={every}, {len(prompts)} prompts, {len(seeds)} seeds: expected 0 or more steps and one "
                "seed per prompt."
            )
        self.folder = Path(folder)
        self.every = every if prompts else 0
        self.prompts = list(prompts)
        self.seeds = list(seeds)
        self.how: dict[str, Any] = {"steps": steps, "guidance": guidance, **(options or {})}
        self.seconds = 0.0
        self._seen = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The starting point, unless the run is resumed."""
        self._seen = trainer.global_step
        if self.every and trainer.global_step == 0:
            self._sample(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Sample at the optimizer-step boundary when due; not when the run was told to stop."""
        step = trainer.global_step
        if step == self._seen or not self.every:
            return
        self._seen = step
        last = step == trainer.max_steps or pl_module.ended
        if not trainer.should_stop and (step % self.every == 0 or last):
            self._sample(trainer, pl_module)

    def _sample(self, trainer: Trainer, method: LightningModule) -> None:
        """Draw, write, hand on; every submodule keeps the mode it was found in."""
        if not trainer.is_global_zero:
            return
        start = time.monotonic()
        pictures = draw_between(method, self.prompts, self.seeds, self.how)
        show(trainer, "samples", pictures, self.prompts, self.folder / f"train-{trainer.global_step:06d}.png")
        self.seconds += time.monotonic() - start


def draw_between(
    method: LightningModule, prompts: Sequence[str], seeds: Sequence[int], how: Mapping[str, Any]
) -> list[Image.Image]:
    """One picture per prompt between two optimizer steps; training goes on as if nothing had been drawn.

    Every submodule keeps the mode it was found in, torch's random state stays as it was.

    Args:
        method: in training.
        prompts: texts with placeholders in place.
        seeds: one per prompt.
        how: further named values for `method.sample`.
    """
    modes = [(module, module.training) for module in method.modules()]
    devices = [method.device] if method.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            return to_pil(method.sample(prompts, seeds, **how))  # type: ignore[operator]
    finally:
        _restore(modes)


def show(trainer: Trainer, key: str, pictures: Sequence[Image.Image], prompts: Sequence[str], path: Path) -> None:
    """Write pictures as a strip, and hand them to every logger that takes some, under `key`."""
    save_png(strip(pictures, prompts), path)
    for logger in trainer.loggers:
        if hasattr(logger, "log_images"):
            logger.log_images(key, pictures, prompts, trainer.global_step)


def _restore(modes: Sequence[tuple[nn.Module, bool]]) -> None:
    """Set `training` directly: `train()` would also change the children."""
    for module, training in modes:
        module.training = training
