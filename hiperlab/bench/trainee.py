"""A method that is ready to be timed: built as a run builds it, with made-up pictures in memory.

Axes: R rows of a batch, H, W picture sides.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig
from torch import Tensor

from hiperlab.base.capability import ReadsPicture
from hiperlab.base.method import Method, Subject
from hiperlab.bench.timing import Watch, unwatched
from hiperlab.data.batch import Batch
from hiperlab.draws import normal
from hiperlab.model.shared_calls import together
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
    """Concepts that share each pass, their optimizers, and batches without end.

    There is one picture a concept: its latents are encoded in the first step, and whatever a method encodes anew in
    later steps is part of its work.

    Args:
        cfg: the composed configuration.
        stack: the frozen model, on its device.
        concepts: how many.
        folded: each concept has a method of its own, as jobs of a sweep that share passes; so it is where a method
            takes one concept only.
    """

    def __init__(self, cfg: DictConfig, stack: FrozenStack, concepts: int = 1, folded: bool = False) -> None:
        self.stack, self.rows, self.concepts = stack, int(cfg.fit.batch_size), concepts
        factory = instantiate(cfg.method, _partial_=True)  # partial: Hydra makes configs of dataclasses it is handed
        stacked = get_class(cfg.method._target_).stacks_concepts and not folded  # type: ignore[attr-defined]
        groups = [list(range(concepts))] if stacked else [[number] for number in range(concepts)]
        self.methods: list[Method] = []
        for group in groups:
            subjects = [subject(number) for number in group]
            made: Method = factory(model=stack, concepts=subjects, seed=int(cfg.seed)).to(stack.device).train()
            if isinstance(made, ReadsPicture):
                for number in range(len(group)):
                    made.set_reference(number, picture(stack.size))
            self.methods.append(made)
        self.optimizers = [method.configure_optimizers() for method in self.methods]
        self.clip = cfg.fit.gradient_clip
        self.batches = self._batches(groups)

    @property
    def device(self) -> torch.device:
        """Where it trains."""
        return self.stack.device

    def _batches(self, groups: list[list[int]]) -> Iterator[list[Batch]]:
        """Micro batches of R rows a concept as the data module gives them, on the device; sample numbers go on."""
        first = 0
        while True:
            yield [self._batch(group, first) for group in groups]
            first += self.rows

    def _batch(self, group: list[int], first: int) -> Batch:
        pixels = picture(self.stack.size).expand(self.rows * len(group), -1, -1, -1).to(self.device)
        concept = torch.arange(len(group), device=self.device).repeat_interleave(self.rows)
        prompts = [prompt(group[number]) for number in concept.tolist()]
        zeros = torch.zeros_like(concept)
        sample = torch.arange(first, first + self.rows, device=self.device).repeat(len(group))
        return Batch(pixels, prompts, concept, sample, zeros, zeros.bool())

    def loss(self, shared: bool = True) -> Tensor:
        """The loss of the next batch, 0-d: the sum of all methods'.

        Args:
            shared: whether their passes are; else each has its own.
        """
        batches = next(self.batches)
        pairs = list(zip(self.methods, batches, strict=True))
        if len(pairs) == 1 or not shared:
            return torch.stack([method.training_step(batch, 0) for method, batch in pairs]).sum()
        found = together(self.stack, [method.training_calls(batch) for method, batch in pairs])
        return torch.stack([loss for loss in found if loss is not None]).sum()

    def step(self, watch: Watch = unwatched) -> Tensor:
        """One optimizer step on the next batch, as a run takes it; returns the loss, 0-d.

        Args:
            watch: what surrounds "backward" and "optimizer".
        """
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss = self.loss()
        with watch("backward"):
            loss.backward()
        with watch("optimizer"):
            for method, optimizer in zip(self.methods, self.optimizers, strict=True):
                method.configure_gradient_clipping(optimizer, self.clip)
                optimizer.step()
        return loss.detach()

    def draw(self, pictures: int, **how: Any) -> None:
        """Draw so many pictures of the concepts in turn, in shared calls; `how` is as `Method.sample` takes it."""
        numbers = [number % self.concepts for number in range(pictures)]
        alone = len(self.methods) == 1
        works = []
        for place, method in enumerate(self.methods):
            mine = [row for row, number in enumerate(numbers) if alone or number == place]
            if mine:
                texts = [prompt(numbers[row]) for row in mine]
                which = [numbers[row] if alone else 0 for row in mine]
                works.append(method.sample_calls(texts, mine, concepts=which, batch_size=len(mine), **how))
        together(self.stack, works)
