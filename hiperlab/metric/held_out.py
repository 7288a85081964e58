"""Scores against pictures that nothing was trained on, and whether a drawn picture is one of those that were.

Axes: B drawn pictures, R training pictures, H held-out ones, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hiperlab.metric.compare import usable
from hiperlab.metric.contract import EmbeddedPictures, Measurement, Score
from hiperlab.metric.protocol import IdentityScore
from hiperlab.metric.rows import CEILING, PICTURE

RATIO = 1 / 3  # as published


@dataclass(frozen=True)
class HeldOutScore(IdentityScore):
    """`IdentityScore` against pictures of the concept that training did not see; its ceiling is theirs."""

    has_ceiling: ClassVar[bool] = False  # of the training pictures, which are not asked
    needs: ClassVar[str] = "held_out"

    def measurements(self, pictures: EmbeddedPictures) -> Iterator[Measurement]:
        """A number per picture of a concept that has held-out pictures, and one of these."""
        metric = self.build(pictures.encoder)
        for concept, references in pictures.held_out.items():
            numbers = pictures.of(concept)
            values = metric.measure(pictures.images[numbers], references).tolist()
            for number, value in zip(numbers, values, strict=True):
                yield Measurement(PICTURE, value, concept, pictures.records[number])
            if len(real := metric.ceiling(references)):
                yield Measurement(CEILING, real.double().mean().item(), concept)


def copied(images: Tensor, references: Tensor) -> Tensor:
    """1 where a picture is more than three times as near to one training picture as to any other, else 0.

    Yoon et al. 2023 ("Diffusion probabilistic models generalize when they fail to memorize") and Gu et al. 2023
    (arXiv 2310.02664): a sample is memorised where |x - NN1| < |x - NN2| / 3 for its nearest and second nearest
    training pictures. Theirs are distances of pixels, these of unit embeddings.

    Args:
        images: (B, D) unit rows.
        references: (R, D) unit rows; rows of NaN do not count.

    Returns:
        (B,) of 0 and 1, on the CPU; NaN where there is no embedding, or fewer than two training pictures.
    """
    real = usable(references)
    if len(real) < 2:
        return torch.full((len(images),), torch.nan)
    # From differences: 2 - 2 cos of nearly equal rows is rounding.
    apart = (images.double()[:, None] - real.double()[None]).norm(dim=-1)  # (B, R)
    first, second = apart.topk(2, largest=False).values.unbind(-1)
    return (first < second * RATIO).double().masked_fill(images.isnan().any(-1), torch.nan).cpu()


@dataclass(frozen=True)
class CopiedScore(Score):
    """Share of pictures that are copies of a training picture, see `copied`; without two of these there is none."""

    lower: ClassVar[bool] = True

    def measurements(self, pictures: EmbeddedPictures) -> Iterator[Measurement]:
        """0 or 1 per picture."""
        for concept, references in pictures.references.items():
            if len(usable(references)) < 2:
                continue
            numbers = pictures.of(concept)
            for number, value in zip(numbers, copied(pictures.images[numbers], references).tolist(), strict=True):
                yield Measurement(PICTURE, value, concept, pictures.records[number])
