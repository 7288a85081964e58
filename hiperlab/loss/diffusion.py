"""The denoising loss, kept per row so that concepts in one batch stay independent. Axes: R rows, K concepts."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def denoising_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each row (DDPM, Ho et al. 2020, eq. 14 with weight 1).

    Args:
        prediction: the U-Net's output (R, C, H, W).
        target: noise or velocity, same shape.

    Returns:
        (R,) one loss per row; their mean is the usual loss.
    """
    return (prediction - target).square().flatten(1).mean(1)


def weighted(prediction: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Both times sqrt(w), so that whichever squared error a method takes of them becomes w (prediction - target)^2.

    The weights are scaled to the latents by area, and the mean is over all cells, as in kohya's `apply_masked_loss`
    (kohya-ss/sd-scripts, library/custom_train_functions.py).

    Args:
        prediction: (R, C, H, W).
        target: same shape.
        mask: the weights w in [0, 1], (R, 1, H', W').
    """
    root = F.interpolate(mask, prediction.shape[-2:], mode="area").sqrt().to(prediction)
    return prediction * root, target * root


def per_concept(rows: Tensor, concept: Tensor, num_concepts: int) -> Tensor:
    """Mean over each concept's rows, (K,). Summing it gives every concept the gradient it would have alone.

    Args:
        rows: (R,) one loss per row.
        concept: (R,) int64 in [0, K); every concept has at least one row.
        num_concepts: K.
    """
    total = rows.new_zeros(num_concepts).index_add(0, concept, rows)
    count = rows.new_zeros(num_concepts).index_add(0, concept, rows.new_ones(len(rows)))
    return total / count
