"""Nested dropout (Rippel et al. 2014): cutting the tail of the hidden units orders them by importance.

As NeTI uses it (Alaluf et al. 2023, fig. 3; models/neti_mapper.py, apply_nested_dropout).
Axes: L cross-attention layers, R rows, U hidden units.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hiperlab import draws


def keep_first(hidden: Tensor, keep: Tensor) -> Tensor:
    """Zero all units from index keep[i] on; nothing is rescaled.

    Args:
        hidden: (..., U).
        keep: (...,) int64 in [0, U]; U keeps everything, 0 nothing.

    Returns:
        Same shape as `hidden`.
    """
    return hidden * (torch.arange(hidden.shape[-1], device=hidden.device) < keep[..., None])


def draw_keep(seed: int, samples: Tensor, num_layers: int, width: int, probability: float, coin_rows: int) -> Tensor:
    """How many units each (layer, sample) keeps while training.

    The authors toss one coin per call of the mapper, i.e. per layer and micro batch of 2, and cut every sample of a
    chosen call at its own uniform length in 0 .. U-1. Here the coin belongs to groups of `coin_rows` consecutive
    sample numbers, so the same cuts come out whatever the micro batch is.

    Args:
        seed: of the run.
        samples: (R,) global sample numbers.
        num_layers: L calls per micro batch.
        width: U units.
        probability: of cutting a call.
        coin_rows: samples that share a coin (2 in the authors' code).

    Returns:
        (L, R) int64; U where nothing is cut.
    """
    columns = []
    for k in samples.tolist():
        coins = draws.generator(seed, "nested/coin", k // coin_rows).random(num_layers)
        cuts = draws.generator(seed, "nested/keep", k).integers(width, size=num_layers)
        columns.append(np.where(coins < probability, cuts, width))
    return torch.from_numpy(np.stack(columns, axis=1))
