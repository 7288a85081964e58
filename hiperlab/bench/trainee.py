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


def subject(number: int) -> Subject:
    """A made-up concept, number 0 and more."""
    placeholder = f"<bench-{number}>"
    return Subject(f"bench-{number}", placeholder, "cat", "a photo of a cat", ("a photo of a sitting cat",))


def prompt(number: int) -> str:
    """A text that names it."""
    return f"a photo of a {subject(number).placeholder}"


def open_stack(cfg: DictConfig) -> FrozenStack:
    """The frozen model in its precision, as a run makes it, on the device that a run would take."""
    session = Session(cfg, Path())  # a session reads and writes no folder before its stages do
    return session.stack.to(session.device)


def picture(size: int) -> Tensor:
    """A picture (3, size, size) in [-1, 1]: noise, because only its size costs time."""
    return normal(0, "bench", [0], (3, size, size))[0].clamp(-1, 1)


class Trainee:
    """Concepts of a method that share each pass, their optimizer, and batches without end.

    There is one picture a concept: its latents are encoded in the first step, and whatever a method encodes anew in
    later steps is part of its work.

    Args:
        cfg: the composed configuration.
        stack: the frozen model, on its device.
        concepts: how many.
    """

    def __init__(self, cfg: DictConfig, stack: FrozenStack, concepts: int = 1) -> None:
        self.stack, self.rows, self.concepts = stack, int(cfg.fit.batch_size), concepts
        factory = instantiate(cfg.method, _partial_=True)  # partial: Hydra makes configs of dataclasses it is handed
        subjects = [subject(number) for number in range(concepts)]
        self.method: Method = factory(model=stack, concepts=subjects, seed=int(cfg.seed)).to(stack.device).train()
        if isinstance(self.method, ReadsPicture):
            for number in range(concepts):
                self.method.set_reference(number, picture(stack.size))
        self.optimizer = self.method.configure_optimizers()
        self.clip = cfg.fit.gradient_clip
        self.batches = self._batches()

    @property
    def device(self) -> torch.device:
        """Where it trains."""
        return self.stack.device

    def _batches(self) -> Iterator[Batch]:
        """Micro batches of R rows a concept as the data module gives them, on the device; sample numbers go on."""
        count = self.rows * self.concepts
        pixels = picture(self.stack.size).expand(count, -1, -1, -1).to(self.device)
        concept = torch.arange(self.concepts, device=self.device).repeat_interleave(self.rows)
        prompts = [prompt(number) for number in concept.tolist()]
        zeros = torch.zeros_like(concept)
        first = 0
        while True:
            sample = torch.arange(first, first + self.rows, device=self.device).repeat(self.concepts)
            yield Batch(pixels, prompts, concept, sample, zeros, zeros.bool())
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
