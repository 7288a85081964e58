"""E4T's encoders: one picture and what the denoiser sees of it -> an offset from a class word's embedding.

As e4t/encoder.py of the public reimplementation (mkshing/e4t-diffusion).
Axes: B pictures, P patch tokens, D vision width, U pooled features of the U-Net's first half, d word embedding width,
N = 1 + P / 2 vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.01  # of every LeakyReLU


def pool(maps: Sequence[Tensor]) -> Tensor:
    """Spatial means of feature maps (B, C_i, H_i, W_i), side by side: (B, U)."""
    return torch.cat([each.mean((2, 3)) for each in maps], dim=1)


class PatchHead(nn.Module):
    """The head of E4TEncoder (e4t/encoder.py): the pooled class token and every second patch token, one map for each.

    There is no activation between a token's maps and their mean, so the N maps are kept side by side and applied in
    one product.

    Args:
        width: d.
        vision: D.
        tokens: N.
        features: U.
    """

    def __init__(self, width: int, vision: int, tokens: int, features: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.unet_feature_embedder = nn.Sequential(
            nn.Linear(features, vision), nn.LeakyReLU(SLOPE), nn.Linear(vision, vision)
        )
        self.feature_linear = nn.Linear(2 * vision, vision)
        first = [nn.Linear(vision, vision) for _ in range(tokens)]
        self.first_weight = nn.Parameter(torch.stack([linear.weight.detach() for linear in first]))  # (N, D, D)
        self.first_bias = nn.Parameter(torch.stack([linear.bias.detach() for linear in first]))  # (N, D)
        self.final_linear = nn.Linear(vision, width)

    def forward(self, pooled: Tensor, tokens: Tensor, features: Tensor) -> Tensor:
        """Offset E (B, d) from pooled (B, D), patch tokens (B, P, D) before the last norm, and features (B, U)."""
        vectors = torch.cat([pooled[:, None], tokens[:, 1::2]], dim=1)  # patch tokens 1, 3, 5, ... counted from 0
        seen = self.unet_feature_embedder(features)[:, None].expand_as(vectors)
        mixed = self.feature_linear(torch.cat([vectors, seen], dim=2))
        mean = torch.einsum("nij,bnj->bi", self.first_weight, mixed) / self.tokens + self.first_bias.mean(0)
        return self.final_linear(F.leaky_relu(mean, SLOPE))


class LayerHead(nn.Module):
    """The paper's head: the class token of every second layer, one shared map, mean over layers, beside the U-Net's.

    As E4TEncoderLegacy in e4t/encoder.py.

    Args:
        width: d.
        vision: D.
        features: U.
    """

    def __init__(self, width: int, vision: int, features: int) -> None:
        super().__init__()
        self.vision_linear = nn.Linear(vision, vision)
        self.final_linear = nn.Linear(vision + features, width)

    def forward(self, classes: Tensor, features: Tensor) -> Tensor:
        """Offset E (B, d) from class tokens after the last norm (B, layers / 2, D) and features (B, U)."""
        seen = F.leaky_relu(self.vision_linear(classes).mean(1), SLOPE)
        return self.final_linear(torch.cat([seen, F.leaky_relu(features, SLOPE)], dim=1))
