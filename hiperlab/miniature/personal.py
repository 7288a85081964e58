"""The last bar: Textual Inversion of held-out subjects against the class prompt, as the identity encoder sees it.

The class prompt is the same method before its first step: its vector is then the class noun's own. Both draw the same
prompts with the same seeds.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from hiperlab.base.method import Subject
from hiperlab.data.concept import fill
from hiperlab.data.dataset import DataSet
from hiperlab.data.module import ConceptData
from hiperlab.data.world import WORLD, load_held_out
from hiperlab.method.ti import TextualInversion
from hiperlab.metric.compare import image_similarity
from hiperlab.metric.world.recipe import FolderIdentity
from hiperlab.model.load import pretrained
from hiperlab.report.grid import to_pil

PROMPTS = ("a photo of a {}", "a photo of a {} on the beach", "a photo of a {} in the snow", "a photo of a {} sitting")


@dataclass(frozen=True)
class Gain:
    """What personalising brought, one number per subject.

    Attributes:
        before, after: mean identity similarity of the samples to the subject's own pictures.
    """

    before: tuple[float, ...]
    after: tuple[float, ...]

    @property
    def gains(self) -> list[float]:
        """After - before."""
        return [after - before for before, after in zip(self.before, self.after, strict=True)]

    @property
    def sure(self) -> float:
        """The mean gain less two standard errors: above 0, it is no accident of these subjects."""
        return statistics.mean(self.gains) - 2 * statistics.stdev(self.gains) / len(self.gains) ** 0.5

    def __str__(self) -> str:
        each = ", ".join(f"{gain:+.2f}" for gain in self.gains)
        return (
            f"{statistics.mean(self.before):.3f} to {statistics.mean(self.after):.3f}, gain "
            f"{statistics.mean(self.gains):+.3f}, standard deviation {statistics.stdev(self.gains):.3f} ({each}); "
            "measured: gain less two standard errors"
        )


def measure(
    folder: Path,
    size: int,
    *,
    identity_seeds: Sequence[int],
    steps: int,
    batch: int,
    lr: float,
    draws: int,
    sampling_steps: int,
    guidance: float,
) -> tuple[Gain, Tensor]:
    """Personalise subjects of an exported miniature.

    Args:
        folder: the export.
        size: its picture side.
        identity_seeds: of the held-out subjects, two or more.
        steps: of the training.
        batch: pictures of each subject in a step.
        lr: of Adam.
        draws: pictures per prompt and subject.
        sampling_steps: of the pictures.
        guidance: of the pictures.

    Returns:
        The gain, and pictures to look at (3 per subject, 3, size, size): its own, the class prompt's, the method's.
    """
    stack = pretrained("mini", str(folder), size)
    data = load_held_out(
        list(identity_seeds), None, None, None, WORLD, list(PROMPTS), "none", None, size, False, 0.5
    )  # fmt: skip
    judge: Any = FolderIdentity(str(folder / "judges" / "identity")).load("identity")
    subjects = [Subject(concept.name, concept.placeholder, concept.word) for concept in data.concepts]
    method = TextualInversion(
        stack, subjects, functools.partial(torch.optim.AdamW, lr=lr, weight_decay=0.01), seed=0, num_vectors=1
    )
    sample = functools.partial(_pictures, method, data, draws, sampling_steps, guidance)
    references = [judge.images(concept.views) for concept in data.concepts]
    before = sample()
    _train(method, data, size, steps, batch)
    after = sample()
    scores = [[_similarity(judge, one, real) for one, real in zip(side, references)] for side in (before, after)]
    own = [concept.views[0] for concept in data.concepts]
    show = [torch.stack([_tensor(view), a[0], b[0]]) for view, a, b in zip(own, before, after)]
    return Gain(tuple(scores[0]), tuple(scores[1])), torch.cat(show)


def _pictures(
    method: TextualInversion, data: DataSet, draws: int, steps: int, guidance: float
) -> list[Tensor]:  # fmt: skip
    """Per subject its samples (P, 3, H, W): every prompt with seeds 0 to draws - 1."""
    jobs = [
        (fill(text, concept.placeholder), seed, index)
        for index, concept in enumerate(data.concepts) for text in concept.prompts for seed in range(draws)
    ]  # fmt: skip
    texts, seeds, who = zip(*jobs)
    drawn = method.sample(list(texts), list(seeds), steps=steps, guidance=guidance, concepts=list(who), batch_size=16)
    return list(drawn.chunk(len(data.concepts)))


def _similarity(judge: Any, pictures: Tensor, references: Tensor) -> float:
    return float(image_similarity(judge.images(to_pil(pictures)), references, "cosine", "mean").mean())


def _tensor(picture: Any) -> Tensor:
    return to_tensor(picture)


def _train(method: TextualInversion, data: DataSet, size: int, steps: int, batch: int) -> None:
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(method, datamodule=ConceptData(data, 0, size, batch, 1))
