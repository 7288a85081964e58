"""Proximal guidance (Han et al. 2024, ProxEdit): small entries of guidance's direction are shrunk to nothing.

Follows phymhan/prompt-to-prompt (ptp_utils.py, diffusion_step; masactrl/diffuser_utils.py). Symbols: delta (conditional
minus unconditional noise), lambda (threshold), q (quantile), m (where the edit is).
Axes: B rows, C latent channels, H, W latent sides, N tokens, D text width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("none", "l0", "hard")


def threshold(delta: Tensor, quantile: float) -> Tensor:
    """lambda, 0-d: the q-quantile of |delta| over all its entries; for q of 0 or less -q itself.

    Args:
        delta: any shape.
        quantile: q, at most 1.
    """
    if quantile <= 0:
        return delta.new_tensor(-quantile)
    return torch.quantile(delta.abs().flatten(), quantile)


def shrunk(delta: Tensor, least: Tensor, kind: str) -> Tensor:
    """What is left of delta, same shape.

    Args:
        delta: any shape.
        least: lambda, 0 or more, to broadcast with it.
        kind: "l0", the authors' name: sign(delta) max(|delta| - lambda, 0), the proximal step of an l1 norm; "hard":
            entries above lambda as they are, the proximal step of an l0 norm; "none": all.
    """
    if kind == "none":
        return delta
    if kind == "hard":
        return delta * (delta.abs() > least)
    return delta - torch.minimum(torch.maximum(delta, -least), least)


def edited(left: Tensor, least: Tensor, dilate: int) -> Tensor:
    """Where the edit is, m (B, C, H, W): 1 where what is left exceeds lambda, grown by `dilate` cells; else 0.

    Args:
        left: `shrunk` (B, C, H, W).
        least: lambda, to broadcast with it.
        dilate: 0 or more.
    """
    mask = (left.abs() > least).to(left)
    return F.max_pool2d(mask, 2 * dilate + 1, 1, dilate) if dilate else mask


def slerp(share: float, first: Tensor, second: Tensor) -> Tensor:
    """The states `share` of the way from `first` to `second` on an arc, both (1, N, D) as one vector each.

    As slerp_tensor in the authors' ptp_utils.py; the angle is that of the normalised vectors.

    Args:
        share: 0 to 1.
        first: (1, N, D).
        second: same shape.
    """
    a, b = first.flatten(1), second.flatten(1)
    cosine = (F.normalize(a, dim=1) * F.normalize(b, dim=1)).sum(1, keepdim=True)
    angle = torch.acos(cosine)
    mixed = (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)
    return mixed.view_as(first)
