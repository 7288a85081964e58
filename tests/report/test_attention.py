"""Attention pictures: bright where a word looks."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from hiperlab.base.capability import WordMaps
from hiperlab.report.attention import attention_grid, heat


def test_heat_is_bright_where_the_map_is_high() -> None:
    map = torch.zeros(4, 4)
    map[0, 3] = 1.0
    light = np.asarray(heat(Image.new("RGB", (64, 64), (90, 90, 90)), map).convert("L"), dtype=int)
    assert light[4, 60] > light[60, 4] + 60 and light[4, 60] == light.max()


def test_a_grid_has_a_cell_for_every_word() -> None:
    found = [
        WordMaps(text, torch.rand(3, 64, 64), tuple(text.split(" ")), torch.rand(len(text.split(" ")), 8, 8))
        for text in ("a cat", "a big cat")
    ]
    image = attention_grid(found, "title")
    assert image.width > 4 * 128 and image.height > 2 * 128
