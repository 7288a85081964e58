"""A method that is ready to be timed: built as a run builds it, with made-up pictures in memory.

Axes: R rows of a batch, H, W picture sides.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from hiperlab.base.capability import ReadsPicture
from hiperlab.base.method import Method, Subject
from hiperlab.bench.timing import Watch, unwatched
from hiperlab.data.batch import Batch
from hiperlab.draws import normal
from hiperlab.model.stack import FrozenStack
from hiperlab.run.session import Session

SUBJECT = Subject("bench", "<bench-cat>", "cat", source="a photo of a cat", targets=("a photo of a sitting cat",))
PROMPT = f"a photo of a {SUBJECT.placeholder}"


def open_stack(cfg: DictConfig) -> FrozenStack:
    """The frozen model in its precision, as a run makes it, on the device that a run would take."""
    session = Session(cfg, Path())  # a session reads and writes no folder before its stages do
    return session.stack.to(session.device)


def picture(size: int) -> Tensor:
    """A picture (3, size, size) in [-1, 1]: noise, because only its size costs time."""
    return normal(0, "bench", [0], (3, size, size))[0].clamp(-1, 1)


class Trainee:
    """One concept of a method, its optimizer, and batches without end.

    There is one picture: its latents are encoded in the first step, and whatever a method encodes anew in later steps
    is part of its work.

    Args:
        cfg: the composed configuration.
        stack: the frozen model, on its device.
    """

    def __init__(self, cfg: DictConfig, stack: FrozenStack) -> None:
        self.stack, self.rows = stack, int(cfg.fit.batch_size)
        factory = instantiate(cfg.method, _partial_=True)  # partial: Hydra makes configs of dataclasses it is handed
        self.method: Method = factory(model=stack, concepts=[SUBJECT], seed=int(cfg.seed)).to(stack.device).train()
        if isinstance(self.method, ReadsPicture):
            self.method.set_reference(0, picture(stack.size))
        self.optimizer = self.method.configure_optimizers()
        self.clip = cfg.fit.gradient_clip
        self.batches = self._batches()

    @property
    def device(self) -> torch.device:
        """Where it trains."""
        return self.stack.device

    def _batches(self) -> Iterator[Batch]:
        """Micro batches of R rows as the data module gives them, on the device; sample numbers go on."""
        pixels = picture(self.stack.size).expand(self.rows, -1, -1, -1).to(self.device)
        zeros = torch.zeros(self.rows, dtype=torch.long, device=self.device)
        first = 0
        while True:
            sample = torch.arange(first, first + self.rows, device=self.device)
            yield Batch(pixels, [PROMPT] * self.rows, zeros, sample, zeros, zeros.bool())
            first += self.rows

    def step(self, watch: Watch = unwatched) -> Tensor:
        """One optimizer step on the next batch, as a run takes it; returns the loss, 0-d.

        Args:
            watch: what surrounds "backward" and "optimizer".
        """
        self.optimizer.zero_grad()
        loss = self.method.training_step(next(self.batches), 0)
        with watch("backward"):
            loss.backward()
        with watch("optimizer"):
            self.method.configure_gradient_clipping(self.optimizer, self.clip)
            self.optimizer.step()
        return loss.detach()
