"""Distances of pictures by their pixels: edges and blurs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def edge_distance(pictures: Tensor, targets: Tensor, region: Tensor) -> Tensor:
    """1 - cosine of edge strengths inside a region, mean over three sizes: (G, 3, H, W) twice, (G, H, W) -> (G,)."""
    parts = []
    mask = region[:, None]
    for scale in range(3):
        if scale:
            pictures, targets, mask = (F.avg_pool2d(x, 2) for x in (pictures, targets, mask))
        a, b = ((edges(x) * mask[:, :, 1:, 1:]).flatten(1) for x in (pictures, targets))
        parts.append(1 - F.cosine_similarity(a, b, dim=1, eps=1e-6))
    return torch.stack(parts).mean(0)


def blur(pictures: Tensor) -> Tensor:
    """Pictures (G, C, H, W), every pixel the mean of its 3 x 3 neighbourhood."""
    return F.avg_pool2d(pictures, 3, 1, 1, count_include_pad=False)


def edges(pictures: Tensor) -> Tensor:
    """Edge strength (G, 1, H-1, W-1)."""
    gray = pictures.mean(1, keepdim=True)
    return (gray.diff(dim=-1)[:, :, 1:].square() + gray.diff(dim=-2)[..., 1:].square()).add(1e-8).sqrt()
