"""How far pictures went that should not have changed: of texts about other things, drawn with what was learnt.

Each is compared with what the frozen model draws of the same text from the same noise. PRES (Ruiz et al. 2023, section
4.3) asks whether other subjects of the class turn into the learnt one; this asks how far everything else moved. It is
exactly 0 for a method that leaves the model and such texts as they are.
Axes: B pictures, D embedding width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hiperlab.metric.contract import EmbeddedPictures, Measurement, Score
from hiperlab.metric.rows import PICTURE

BATCH = 16  # pairs a pass


def cosine_distance(images: Tensor, others: Tensor) -> Tensor:
    """1 - cosine of unit rows, pair by pair, as |a - b|^2 / 2, which is exactly 0 for equal ones.

    Args:
        images: (B, D) unit rows.
        others: (B, D) unit rows.

    Returns:
        (B,) in [0, 2], NaN where a row is.
    """
    return (images.double() - others.double()).square().sum(-1) / 2


@dataclass(frozen=True)
class _Drift(Score):
    """A distance between pictures of other things and what the frozen model draws."""

    lower: ClassVar[bool] = True
    needs: ClassVar[str] = "unrelated"

    @abstractmethod
    def distances(self, pictures: EmbeddedPictures, records: Sequence[Mapping[str, Any]]) -> Tensor:
        """(B,) of B records."""

    def measurements(self, pictures: EmbeddedPictures) -> Iterator[Measurement]:
        """One number per unrelated picture."""
        if not pictures.unrelated:
            return
        for record, value in zip(
            pictures.unrelated, self.distances(pictures, pictures.unrelated).tolist(), strict=True
        ):
            yield Measurement(PICTURE, value, record["concept"], record)


@dataclass(frozen=True)
class DriftScore(_Drift):
    """1 - cosine over a picture encoder."""

    def distances(self, pictures: EmbeddedPictures, records: Sequence[Mapping[str, Any]]) -> Tensor:
        """(B,), see `cosine_distance`."""
        images = pictures.files([record["path"] for record in records])
        return cosine_distance(images, pictures.files([record["frozen"] for record in records]))


@dataclass(frozen=True)
class PerceptualDriftScore(_Drift):
    """LPIPS (Zhang et al. 2018), or what the encoder has in its place."""

    def distances(self, pictures: EmbeddedPictures, records: Sequence[Mapping[str, Any]]) -> Tensor:
        """(B,), exactly 0 where the frozen model's picture is the picture."""
        found: list[Tensor] = []
        for start in range(0, len(records), BATCH):
            part = records[start : start + BATCH]
            values = pictures.encoder.perceptual(pictures.opened(part), pictures.opened(part, "frozen"))
            found += [
                value * (record["path"] != record["frozen"]) for record, value in zip(part, values.cpu(), strict=True)
            ]
        return torch.stack(found)
