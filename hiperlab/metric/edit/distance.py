"""Scores of an edit: one source picture and its text, a target text, what was drawn for it; free of any network.

Axes: B drawn pictures, all of one source; D width; N patches. A mask is white where an edit may change the picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from hiperlab.metric.pixel_distance import edge_distance

SHIFTS = (-0.08, 0.0, 0.08)  # cameras that the distance to the truth forgives, in picture widths
ZOOMS = (0.95, 1.0, 1.05)
BEST_PSNR = 100.0  # dB, of equal pictures: an infinite one has no mean


@dataclass(frozen=True)
class EditReference:
    """What one edit's pictures are judged against.

    Attributes:
        source: the picture as the method saw it.
        source_text: what it shows.
        truths: target text -> its true picture, where the data knows it.
        mask: white where an edit may change the picture; None where nobody knows.
    """

    source: Image.Image
    source_text: str
    truths: Mapping[str, Image.Image] = field(default_factory=dict)
    mask: Image.Image | None = None


def direction(images: Tensor, source: Tensor, texts: Tensor, text: Tensor) -> Tensor:
    """CLIP directional similarity (StyleGAN-NADA, Gal et al. 2021, eq. 3): does the picture change as the text does?

    Args:
        images: embedded pictures (B, D).
        source: the embedded source picture (D,).
        texts: embedded target texts (B, D).
        text: the embedded source text (D,).

    Returns:
        Cosine (B,); NaN where the text does not change.
    """
    asked = texts - text
    return F.cosine_similarity(images - source, asked, dim=-1).masked_fill(asked.norm(dim=-1) < 1e-6, torch.nan)


def structure_distance(patches: Tensor, others: Tensor) -> Tensor:
    """Mean squared difference of self-similarities (Splice, Tumanyan et al. 2022, eq. 3): (B, N, D), (1 or B, N, D).

    Self-similarity is the cosine of every patch with every patch, so a common change of colour does not count.
    """
    alike, other = ((unit := F.normalize(each.float(), dim=-1)) @ unit.mT for each in (patches, others))
    return (alike - other).square().flatten(1).mean(1)


def perceptual_distance(maps: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """LPIPS without its learnt weights (Zhang et al. 2018, eq. 1, w = 1): (B, C, H, W) per depth, twice.

    Returns:
        The mean over depths of the mean squared distance of unit features (B,), in [0, 4].
    """
    rows = [
        (F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)).square().sum(1).mean((1, 2))
        for a, b in zip(maps, others, strict=True)
    ]
    return torch.stack(rows).mean(0)


def mse(pictures: Tensor, others: Tensor) -> Tensor:
    """Mean squared error (B,) of (B, 3, H, W) and (1 or B, 3, H, W) in [0, 1]."""
    return (pictures - others).square().flatten(1).mean(1)


def psnr(pictures: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB (B,); equal pictures have `BEST_PSNR`."""
    return -10 * mse(pictures, others).clamp(min=10 ** (-BEST_PSNR / 10)).log10()


def ssim(pictures: Tensor, others: Tensor) -> Tensor:
    """Structural similarity (B,) with torchmetrics' settings, as in PIE-Bench."""
    values = structural_similarity_index_measure(pictures, others.expand_as(pictures), data_range=1.0, reduction="none")
    assert isinstance(values, Tensor)
    return values.reshape(len(pictures))


def truth_distance(picture: Tensor, truth: Tensor) -> Tensor:
    """Distance of a picture (3, H, W) to the true result (3, H, W), in [0, 1], a number.

    The mean of two parts, each as in `metric.world.distance.distances`: values after a 3x3 blur, and edges. It is the
    least over mirrorings and small moves of the camera, because no method is asked to keep the camera.
    """
    views = cameras(truth)
    drawn = picture[None].expand_as(views)
    blurred, true = (F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) for x in (drawn, views))
    pixel = (blurred - true).abs().flatten(1).mean(1)
    edges = edge_distance(drawn, views, torch.ones_like(views[:, 0]))
    return ((pixel + edges) / 2).min()


def cameras(picture: Tensor) -> Tensor:
    """A picture (3, H, W) as it is, mirrored, moved sideways and zoomed, edges repeated: (G, 3, H, W)."""
    views = []
    for zoom in ZOOMS:
        for shift in SHIFTS:
            if zoom == 1 and shift == 0:
                views.append(picture)
                continue
            where = torch.tensor([[1 / zoom, 0, 2 * shift], [0, 1 / zoom, 0]], dtype=picture.dtype)
            places = F.affine_grid(where[None], [1, *picture.shape], align_corners=False)
            views.append(F.grid_sample(picture[None], places, padding_mode="border", align_corners=False)[0])
    stacked = torch.stack(views)
    return torch.cat([stacked, stacked.flip(-1)])
