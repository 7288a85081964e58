"""NS-LPIPS (StyleDiffusion, arXiv 2303.15649): LPIPS to the source on the part that was not selected for editing.

As released and as meant: the released script multiplies by a grey mask (its threshold is computed and dropped) and
feeds LPIPS values in [0, 1] where it expects [-1, 1]. Published numbers are the former's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hiperlab.metric.edit.distance import EditReference
from hiperlab.metric.edit.scores import BATCH, EditScore
from hiperlab.metric.extractor import Encoder

SIDE = 256  # at which pictures are compared
LUMA = 0.2989 + 0.587 + 0.114  # torchvision's weights of grey, one short of 1 in the fourth place


@dataclass(frozen=True)
class NsLpips(EditScore):
    """As released: soft mask, input in [0, 1]. Needs LPIPS over AlexNet, and a mask, white (or grey) where edited."""

    lower: ClassVar[bool] = True

    def measure(
        self, encoder: Encoder, pictures: Sequence[Image.Image], texts: Sequence[str], reference: EditReference
    ) -> Tensor:
        """Distances (B,); NaN where no mask is known."""
        if reference.mask is None:
            return torch.full((len(pictures),), torch.nan)
        kept = self.background(_unit([reference.mask.convert("L")]))
        if not kept.any():
            return torch.full((len(pictures),), torch.nan)
        source = self.fed(_unit([reference.source]) * kept)
        parts = [
            encoder.perceptual_raw(self.fed(_unit(pictures[start : start + BATCH]) * kept), source)
            for start in range(0, len(pictures), BATCH)
        ]
        return torch.cat(parts)

    def background(self, mask: Tensor) -> Tensor:
        """How much of each pixel counts, from the mask (1, 1, H, W) in [0, 1]."""
        return (1 - mask) * LUMA

    def fed(self, pixels: Tensor) -> Tensor:
        """What LPIPS is fed, from masked pixels in [0, 1]."""
        return pixels


@dataclass(frozen=True)
class NsLpipsFixed(NsLpips):
    """As meant: a pixel counts or not, threshold 0.5, input in [-1, 1]. Comparable among our own runs only."""

    def background(self, mask: Tensor) -> Tensor:
        """1 where less than half is the edited thing."""
        return ((1 - mask) > 0.5).float()

    def fed(self, pixels: Tensor) -> Tensor:
        """Masked pixels in [-1, 1]."""
        return pixels * 2 - 1


def _unit(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures squeezed to one side, bilinear: (B, C, SIDE, SIDE) in [0, 1]."""
    small = [picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR) for picture in pictures]
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in small])).float() / 255
    return pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
