"""Scores of a concept's pictures as a set: how far their distribution is from the real one, how varied they are.

They are over any encoder's unit embeddings, so their numbers compare only under one protocol; published FID and KID are
over Inception features. Few pictures make a poor estimate: FID is biased upwards, by more the wider the embedding.
Axes: B drawn pictures, R real ones, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from hiperlab.metric.contract import EmbeddedPictures, Measurement, Score, SetScore
from hiperlab.metric.rows import SET

BATCH = 16  # pairs a pass


class _Embedded(nn.Identity):
    """What torchmetrics takes for a feature network, of pictures that are embedded already.

    Args:
        num_features: D.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def kernel_distance(images: Tensor, references: Tensor) -> float:
    """Unbiased squared MMD under k(x, y) = (x.y / D + 1)^3 (Binkowski et al. 2018, eq. 4 and section 4), KID.

    Args:
        images: (B, D).
        references: (R, D).

    Returns:
        The distance, which may be a little below 0, and of order 1 / D on unit rows; NaN with fewer than two rows on a
        side.
    """
    if min(len(images), len(references)) < 2:
        return float("nan")
    x, y = images.double(), references.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def among(a: Tensor) -> Tensor:
        values, count = kernel(a, a), len(a)
        return (values.sum() - values.diagonal().sum()) / (count * (count - 1))

    return float(among(x) + among(y) - 2 * kernel(x, y).mean())


def frechet_distance(images: Tensor, references: Tensor) -> float:
    """Distance of two Gaussians, |m - m_r|^2 + tr(C + C_r - 2 (C C_r)^(1/2)) (Heusel et al. 2017, eq. 6), FID.

    Args:
        images: (B, D).
        references: (R, D).

    Returns:
        The distance; NaN with fewer than two rows on a side.
    """
    if min(len(images), len(references)) < 2:
        return float("nan")
    metric = FrechetInceptionDistance(feature=_Embedded(images.shape[1])).set_dtype(torch.float64)
    metric.update(references.cpu().double(), real=True)
    metric.update(images.cpu().double(), real=False)
    return float(metric.compute())


def diversity(images: Tensor, prompts: Sequence[str]) -> float:
    """Mean of 1 - cosine over all pairs of pictures of one prompt, then over prompts.

    As DIV of DreamBooth (Ruiz et al. 2023, section 4.3), which has LPIPS in the place of 1 - cosine.

    Args:
        images: (B, D) unit rows.
        prompts: of the pictures, B.

    Returns:
        In [0, 2]; NaN where no prompt has two pictures.
    """
    means = []
    for prompt in dict.fromkeys(prompts):
        rows = images[[number for number, each in enumerate(prompts) if each == prompt]].double()
        if (count := len(rows)) > 1:
            cosines = rows @ rows.T
            means.append(1 - (cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1)))
    return float(torch.stack(means).mean()) if means else float("nan")


@dataclass(frozen=True)
class KernelScore(SetScore):
    """KID of a concept's drawn pictures and its real ones."""

    lower: ClassVar[bool] = True

    def measure(self, images: Tensor, references: Tensor, prompts: Sequence[str]) -> float:
        """See `kernel_distance`: images (B, D), references (R, D)."""
        return kernel_distance(images, references)


@dataclass(frozen=True)
class FrechetScore(SetScore):
    """FID of a concept's drawn pictures and its real ones."""

    lower: ClassVar[bool] = True

    def measure(self, images: Tensor, references: Tensor, prompts: Sequence[str]) -> float:
        """See `frechet_distance`: images (B, D), references (R, D)."""
        return frechet_distance(images, references)


@dataclass(frozen=True)
class DiversityScore(SetScore):
    """How much pictures of one prompt differ; a method that repeats one picture has none."""

    def measure(self, images: Tensor, references: Tensor, prompts: Sequence[str]) -> float:
        """See `diversity`: images (B, D); the references are not read."""
        return diversity(images, prompts)


@dataclass(frozen=True)
class PerceptualDiversityScore(Score):
    """DIV of DreamBooth as published: mean LPIPS of pictures of one prompt, over pairs, then over prompts.

    Ruiz et al. 2023, section 4.3. They do not say which network LPIPS has. NaN where no prompt has two pictures.
    """

    def measurements(self, pictures: EmbeddedPictures) -> Iterator[Measurement]:
        """One number per concept, variant and role, as of `SetScore`."""
        for concept in pictures.concepts:
            for members, shared in pictures.sets(concept):
                prompts: dict[str, list[int]] = {}
                for number in members:
                    prompts.setdefault(str(pictures.records[number]["prompt"]), []).append(number)
                means = [_mean_distance(pictures, numbers) for numbers in prompts.values() if len(numbers) > 1]
                value = sum(means) / len(means) if means else float("nan")
                yield Measurement(SET, value, concept, {**shared, "num_pictures": len(members)})


def _mean_distance(pictures: EmbeddedPictures, numbers: Sequence[int]) -> float:
    """Mean perceptual distance of all pairs of some records' pictures."""
    drawn = pictures.opened([pictures.records[number] for number in numbers])
    pairs = list(combinations(drawn, 2))
    parts = [
        pictures.encoder.perceptual(*zip(*pairs[start : start + BATCH], strict=True))
        for start in range(0, len(pairs), BATCH)
    ]
    return float(torch.cat(parts).double().mean())
