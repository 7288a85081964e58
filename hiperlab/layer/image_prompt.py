"""A picture's CLIP features as tokens for cross-attention: one projection, or a resampler with queries of its own.

Parameters are named as in the files of tencent-ailab/IP-Adapter.
Axes: B pictures, P tokens of the picture encoder, F its width, M tokens given, D their width, H heads of width d.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

HEAD_WIDTH = 64  # d; files do not say it


class LinearPrompt(nn.Module):
    """T = LN(reshape(W g + b)) of one projected CLIP embedding g, as ImageProjModel in ip_adapter/ip_adapter.py.

    Args:
        features: F.
        width: D.
        tokens: M, 4 in all published files.
    """

    def __init__(self, features: int, width: int, tokens: int) -> None:
        super().__init__()
        self.proj = nn.Linear(features, tokens * width)
        self.norm = nn.LayerNorm(width)

    def forward(self, embedding: Tensor) -> Tensor:
        """Tokens (B, M, D) of g (B, F)."""
        width = self.norm.weight.shape[0]
        tokens: Tensor = self.norm(self.proj(embedding).unflatten(-1, (-1, width)))
        return tokens


class _Look(nn.Module):
    """The queries look at the picture and at one another, as PerceiverAttention in ip_adapter/resampler.py."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, picture: Tensor, queries: Tensor) -> Tensor:
        picture, queries = self.norm1(picture), self.norm2(queries)
        q = self._heads(self.to_q(queries))
        k, v = (self._heads(part) for part in self.to_kv(torch.cat([picture, queries], dim=1)).chunk(2, dim=-1))
        # Half of the root on each side, and a softmax in float32: half precision would overflow.
        root = HEAD_WIDTH**-0.25
        weights = ((q * root) @ (k * root).mT).float().softmax(dim=-1).to(v)
        looked: Tensor = self.to_out((weights @ v).transpose(1, 2).flatten(2))
        return looked

    @staticmethod
    def _heads(states: Tensor) -> Tensor:
        """(B, N, H*d) -> (B, H, N, d)."""
        return states.unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2)


class Resampler(nn.Module):
    """M learnt queries that look at a picture's tokens several times, as Resampler in ip_adapter/resampler.py.

    Args:
        features: F.
        inner: width of the queries.
        width: D.
        tokens: M.
        heads: H, of width 64.
        depth: how often they look.
        hidden: width of the layers in between.
    """

    def __init__(
        self, features: int, inner: int, width: int, tokens: int, heads: int = 12, depth: int = 4, hidden: int = 0
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, tokens, inner) / inner**0.5)
        self.proj_in, self.proj_out = nn.Linear(features, inner), nn.Linear(inner, width)
        self.norm_out = nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            nn.ModuleList([_Look(inner, heads * HEAD_WIDTH), _feed_forward(inner, hidden or 4 * inner)])
            for _ in range(depth)
        )

    def forward(self, states: Tensor) -> Tensor:
        """Tokens (B, M, D) of the encoder's states (B, P, F)."""
        picture, queries = self.proj_in(states), self.latents.expand(len(states), -1, -1)
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleList)
            look, feed_forward = layer
            queries = queries + look(picture, queries)
            queries = queries + feed_forward(queries)
        tokens: Tensor = self.norm_out(self.proj_out(queries))
        return tokens


def _feed_forward(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, width, bias=False)
    )
