"""The scores as torchmetrics metrics: `metric(pictures, texts or references)` gives one number per picture.

`update`/`compute` give the mean over all pictures and all processes. Pictures are (B, 3, H, W) in [0, 1] or PIL.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchmetrics import Metric

from hiperlab.metric.compare import image_similarity, real_similarity, text_similarity
from hiperlab.metric.extractor import Encoder
from hiperlab.metric.picture import as_pictures

Pictures = Tensor | Sequence[Image.Image]


class Similarity(Metric, ABC):
    """Mean similarity of pictures to something; sums travel between processes, rows do not.

    Args:
        encoder: the frozen network; metrics may share one.
        scale: "cosine", "percent" or "clipscore".
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, encoder: Encoder, scale: str) -> None:
        super().__init__()
        self.encoder = encoder
        self.scale = scale
        self.values = torch.empty(0)  # of the last update, (B,)
        # float64: a mean must not depend on how many batches it was summed over
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @abstractmethod
    def measure(self, embeddings: Tensor, targets: Tensor) -> Tensor:
        """Scores (B,) of embedded pictures (B, D) against embedded targets; NaN where there is none."""

    @abstractmethod
    def embed(self, targets: Any) -> Tensor:
        """Embed texts or references: unit rows."""

    def update(self, images: Pictures, targets: Any) -> None:
        """Add B pictures. `targets`: B texts (ClipText) or R reference pictures shared by all B (the others)."""
        self.values = self.measure(self.encoder.images(as_pictures(images)), self.embed(targets))
        found = ~self.values.isnan()
        self.total += self.values[found].double().sum()
        self.count += found.sum()

    def compute(self) -> Tensor:
        """Mean over all pictures that have a score; NaN if none has."""
        return self.total / self.count

    def forward(self, images: Pictures, targets: Any) -> Tensor:
        """Add B pictures and return their scores (B,), where a plain torchmetrics metric would return their mean."""
        self.update(images, targets)
        return self.values


class ClipText(Similarity):
    """CLIP-T: each picture with its own text."""

    def measure(self, embeddings: Tensor, targets: Tensor) -> Tensor:
        """(B, D), (B, D) -> (B,)."""
        return text_similarity(embeddings, targets, self.scale)

    def embed(self, targets: Sequence[str]) -> Tensor:
        """B texts -> (B, D)."""
        return self.encoder.texts(targets)


class ImageSimilarity(Similarity):
    """Each picture with all references, over any picture encoder.

    Args:
        encoder: the frozen encoder.
        scale: as in Similarity.
        pairing: "mean" over the references or "max".
    """

    def __init__(self, encoder: Encoder, scale: str, pairing: str) -> None:
        super().__init__(encoder, scale)
        self.pairing = pairing

    def measure(self, embeddings: Tensor, targets: Tensor) -> Tensor:
        """(B, D), (R, D) -> (B,)."""
        return image_similarity(embeddings, targets, self.scale, self.pairing)

    def copies(self, embeddings: Tensor, targets: Tensor) -> Tensor:
        """Similarity to the nearest reference (B,): above the real pictures' own, it may be a copy."""
        return image_similarity(embeddings, targets, self.scale, "max")

    def ceiling(self, targets: Tensor, pairing: str | None = None) -> Tensor:
        """Score of each reference against the others (R',), itself left out."""
        return real_similarity(targets, self.scale, pairing or self.pairing)

    def embed(self, targets: Pictures) -> Tensor:
        """R reference pictures -> (R, D)."""
        return self.encoder.images(as_pictures(targets))


class ClipImage(ImageSimilarity):
    """CLIP-I: the references' resemblance in CLIP's eyes."""


class Identity(ImageSimilarity):
    """Is it the same one? Over any embedder; a face encoder may find no face (a row of NaN).

    Args:
        encoder: the frozen encoder.
        scale: as in Similarity.
        pairing: as in ImageSimilarity.
        missing: where nothing was found, "zero" scores 0 and "drop" leaves the picture out (NaN).
    """

    def __init__(self, encoder: Encoder, scale: str, pairing: str, missing: str) -> None:
        super().__init__(encoder, scale, pairing)
        self.missing = missing

    def measure(self, embeddings: Tensor, targets: Tensor) -> Tensor:
        """(B, D), (R, D) -> (B,)."""
        return self._missed(super().measure(embeddings, targets), embeddings)

    def copies(self, embeddings: Tensor, targets: Tensor) -> Tensor:
        """Similarity to the nearest reference (B,)."""
        return self._missed(super().copies(embeddings, targets), embeddings)

    def _missed(self, values: Tensor, embeddings: Tensor) -> Tensor:
        """Apply `missing` to pictures without embedding; without any usable reference there is no score at all."""
        if self.missing == "drop":
            return values
        return values.masked_fill(embeddings.isnan().any(-1), 0.0)
