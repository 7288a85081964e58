"""Where words look: attention maps over the pictures they belong to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from hiperlab.base.capability import WordMaps
from hiperlab.report.grid import grid, to_pil

_SHARE = 0.65  # of the heat in the mixture with the picture


def heat(picture: Image.Image, map: Tensor) -> Image.Image:
    """A map (s, s) as colours over a dimmed picture; each map is scaled to its own range, from dark to bright."""
    values = map.double()
    low, high = values.min(), values.max()
    scaled = (values - low) / (high - low).clamp(min=1e-12)
    levels = Image.fromarray((scaled * 255).round().byte().cpu().numpy()).resize(
        picture.size, Image.Resampling.BILINEAR
    )
    import matplotlib

    colours = matplotlib.colormaps["inferno"](np.asarray(levels))[..., :3]
    grey = np.asarray(picture.convert("L"), dtype=float)[..., None] / 255
    mixed = _SHARE * colours + (1 - _SHARE) * grey
    return Image.fromarray((mixed * 255).round().clip(0, 255).astype(np.uint8))


def attention_grid(found: Sequence[WordMaps], title: str) -> Image.Image:
    """A row per text: its picture, then each word's map over it, the word written above."""
    pictures = [to_pil(each.picture[None])[0] for each in found]
    rows: list[list[Image.Image | None]] = []
    labels: list[str] = []
    for each, picture in zip(found, pictures, strict=True):
        cells = [_labelled(heat(picture, map), word) for word, map in zip(each.words, each.maps, strict=True)]
        rows.append([_labelled(picture, ""), *cells])
        labels.append(each.text)
    return grid(rows, rows=labels, title=title)


def _labelled(picture: Image.Image, word: str) -> Image.Image:
    """One cell, at least 128 pixels wide, with its word above."""
    factor = max(1, 128 // picture.width)
    large = picture.resize((factor * picture.width, factor * picture.height), Image.Resampling.NEAREST)
    return grid([[large]], columns=[word] if word else [" "])
