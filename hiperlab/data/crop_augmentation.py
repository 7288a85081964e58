"""Custom Diffusion's augmentation: the picture smaller on a grey canvas or cropped larger, and the words for it.

As CustomDiffusionDataset in diffusers' train_custom_diffusion.py and in the authors' src/diffusers_data_pipeline.py.
Letters: S side of the canvas in pixels, f pixels per latent cell.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hiperlab import draws

SMALLER = 0.66  # probability of a scale in [S / 3, S]; else it is in [1.2 S, 1.4 S)
FAR = ("a far away ", "very small ")  # for scales below 0.6 S
NEAR = ("zoomed in ", "close up ")  # for scales above S


class Placement(NamedTuple):
    """Where a picture lies.

    Args:
        scale: its side in pixels.
        top: of the picture on the canvas, or of the canvas on the picture where that is larger.
        left: likewise.
        words: what the prompt begins with.
    """

    scale: int
    top: int
    left: int
    words: str


def still(size: int) -> Placement:
    """The picture as it is."""
    return Placement(size, 0, 0, "")


def drawn(seed: int, sample: int, size: int) -> Placement:
    """A random placement on a canvas of side S = `size`, a pure function of seed and sample number."""

    def below(purpose: str, high: int) -> int:
        return int(draws.integers(seed, f"placement {purpose}", [sample], high))

    if float(draws.uniform(seed, "placement", [sample])) < SMALLER:
        low, high = size // 3, size + 1
    else:
        low, high = int(1.2 * size), int(1.4 * size)
    scale = low + below("scale", high - low)
    room = abs(size - scale) + 1
    choice = FAR if scale < 0.6 * size else NEAR if scale > size else ("", "")
    return Placement(scale, below("top", room), below("left", room), choice[below("words", 2)])


def placed(pixels: Tensor, placement: Placement) -> Tensor:
    """A picture or mask (C, S, S) in [-1, 1] put there: on zeros (grey) if smaller, cropped if larger; same shape."""
    size, (side, top, left, _) = pixels.shape[-1], placement
    if side == size:
        return pixels
    resized = F.interpolate(pixels[None], (side, side), mode="bilinear", antialias=True)[0].clamp(-1, 1)
    if side > size:
        return resized[:, top : top + size, left : left + size]
    canvas = torch.zeros_like(pixels)
    canvas[:, top : top + side, left : left + side] = resized
    return canvas


def latent_mask(placement: Placement, size: int, cells: int) -> Tensor:
    """Which latent cells show the picture: (1, cells, cells) of 0 and 1, one cell inside its border.

    Where so small a picture leaves no cell, the one under its middle counts.
    """
    if placement.scale > size:
        return torch.ones(1, cells, cells)
    factor = size // cells
    mask = torch.zeros(1, cells, cells)
    rows, columns = (_inside(start, placement.scale, factor) for start in (placement.top, placement.left))
    mask[:, rows, columns] = 1
    return mask


def _inside(start: int, scale: int, factor: int) -> slice:
    first, last = start // factor + 1, (start + scale) // factor - 1
    middle = (2 * start + scale) // (2 * factor)
    return slice(first, last) if last > first else slice(middle, middle + 1)
