"""What every trained stage shares: a loss by step number, AdamW, and a rate that ends with steps or time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor

from hiperlab.optim import muon


@dataclass(frozen=True)
class Fit:
    """How a stage is optimised.

    Attributes:
        steps: most optimizer steps.
        minutes: budget of wall time, compilation included; null = none, and then the result depends on steps alone.
        batch: samples a step.
        lr: highest learning rate of AdamW.
        warmup: steps until it is reached.
        weight_decay: AdamW's.
        clip: largest gradient norm.
        checkpoint_every: steps between checkpoints.
        muon: highest learning rate of the matrices under Muon; null = AdamW for everything.
        hold: share of the steps or minutes before the rate falls.
    """

    steps: int
    minutes: float | None
    batch: int
    lr: float
    warmup: int
    weight_decay: float
    clip: float
    checkpoint_every: int
    muon: float | None
    hold: float = 0.0


def rate(step: int, warmup: int, progress: float, hold: float = 0.0, floor: float = 0.01) -> float:
    """Share of the highest learning rate: linear warm-up over steps, times a cosine down to `floor`.

    The warm-up counts steps because the first one, which compiles, may use up minutes.

    Args:
        step: number of the step, from 0.
        warmup: steps until the highest rate.
        progress: in [0, 1], the part of the steps or of the time that is used up, whichever is further.
        hold: part before the cosine begins.
        floor: share left at the end.
    """
    progress = max(0.0, (min(progress, 1.0) - hold) / (1 - hold))
    return min(1.0, (step + 1) / warmup) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


class StageModule(LightningModule, ABC):
    """One trained stage.

    Args:
        fit: how it is optimised.
        seed: of everything it draws.

    Attributes:
        elapsed: seconds trained so far, over all sessions; part of the checkpoint.
        compiling: whether `fast` compiles.
    """

    adam_only: tuple[str, ...] = ()  # parts that Muon leaves to AdamW

    def __init__(self, fit: Fit, seed: int) -> None:
        super().__init__()
        self.fit_settings = fit
        self.seed = seed
        self.elapsed = 0.0
        self.compiling = False
        self._fast: dict[str, Callable[..., Any]] = {}

    @abstractmethod
    def loss(self, step: int) -> Tensor:
        """The loss of one step, a function of the weights and the step number."""

    def fast(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function compiled where the stage compiles; kept outside the module's own parts."""
        if not self.compiling:
            return function
        if name not in self._fast:
            self._fast[name] = torch.compile(function)
        return self._fast[name]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Lightning's name for `loss`; the loader's batches are empty, everything follows from the step number."""
        return self.loss(self.global_step)

    def progress(self) -> float:
        """The part used up of steps or time, whichever is further."""
        limit = self.fit_settings.minutes
        part = self.global_step / self.fit_settings.steps
        return min(1.0, max(part, self.elapsed / (60 * limit))) if limit else min(1.0, part)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set the learning rate."""
        optimizer: Any = self.optimizers()
        share = rate(self.global_step, self.fit_settings.warmup, self.progress(), self.fit_settings.hold)
        for group in optimizer.param_groups:
            group["lr"] = group.get("highest_lr", self.fit_settings.lr) * share

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW or Muon, no decay on vectors; not fused, as Lightning refuses to clip a fused optimizer's gradients."""
        settings = self.fit_settings
        if settings.muon is not None:
            matrices, others = muon.split(self.named_parameters(), self.adam_only)
            return muon.Muon(
                matrices, others, lr=settings.muon, adam_lr=settings.lr, weight_decay=settings.weight_decay,
                betas=(0.9, 0.98),
            )  # fmt: skip
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.fit_settings.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.fit_settings.lr, betas=(0.9, 0.98))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the time spent; leave frozen parts out, they lie in their own stage's folder."""
        checkpoint["elapsed"] = self.elapsed
        frozen = self.frozen_parts()
        checkpoint["state_dict"] = {
            key: value for key, value in checkpoint["state_dict"].items() if key.split(".")[0] not in frozen
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the time back, and let the frozen parts be as they are."""
        self.elapsed = float(checkpoint["elapsed"])
        frozen = self.frozen_parts()
        checkpoint["state_dict"].update(
            {key: value for key, value in self.state_dict().items() if key.split(".")[0] in frozen}
        )

    def frozen_parts(self) -> tuple[str, ...]:
        """Names of the parts that come from earlier stages."""
        return ()
