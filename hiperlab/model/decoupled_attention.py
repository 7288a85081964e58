"""Further tokens beside the text's, with keys, values and a softmax of their own in each cross-attention layer.

As IPAttnProcessor2_0 of the authors' ip_adapter/attention_processor.py (tencent-ailab/IP-Adapter): what is attended to
among them is added, by a factor. Keys and values come ready, so that the processors stay without weights.
Axes: L cross-attention layers in execution order, B rows, M tokens, C width of a layer, D width of the tokens.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DecoupledAttention:
    """The further tokens of B rows.

    Args:
        keys: L tensors (B, M, C_l).
        values: L tensors (B, M, C_l).
        scale: (B,) each row's factor; 0 is the text alone.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    scale: Tensor

    def rows(self, index: Tensor) -> DecoupledAttention:
        """Those of R chosen rows, numbers (R,) in [0, B); repeats are allowed."""
        chosen = [tuple(each[index] for each in states) for states in (self.keys, self.values)]
        return DecoupledAttention(chosen[0], chosen[1], self.scale[index])

    def to(self, dtype: torch.dtype) -> DecoupledAttention:
        """The same, keys and values (B, M, C_l) in another floating type."""
        keys, values = (tuple(each.to(dtype) for each in states) for states in (self.keys, self.values))
        return DecoupledAttention(keys, values, self.scale)

    def form(self) -> Hashable:
        """Equal for those whose rows can share a call: the number of tokens."""
        return self.keys[0].shape[1]


def projected(tokens: Tensor, weights: Sequence[tuple[Tensor, Tensor]], scale: Tensor) -> DecoupledAttention:
    """Keys T W_k^T and values T W_v^T of each layer.

    Args:
        tokens: T (B, M, D).
        weights: W_k and W_v of the L layers, (C_l, D) each, without bias.
        scale: (B,).
    """
    keys, values = zip(*((tokens @ key.mT, tokens @ value.mT) for key, value in weights), strict=True)
    return DecoupledAttention(keys, values, scale)


def joined(parts: Sequence[tuple[DecoupledAttention | None, int]]) -> DecoupledAttention | None:
    """Rows set side by side; a part without any has rows of zeros, whose scale is 0.

    Args:
        parts: further tokens and number of rows of each.
    """
    own = next((part for part, _ in parts if part is not None), None)
    if own is None:
        return None
    every = [_none(own, count) if part is None else part for part, count in parts]
    keys = tuple(torch.cat(each) for each in zip(*(part.keys for part in every), strict=True))
    values = tuple(torch.cat(each) for each in zip(*(part.values for part in every), strict=True))
    return DecoupledAttention(keys, values, torch.cat([part.scale for part in every]))


def _none(like: DecoupledAttention, count: int) -> DecoupledAttention:
    keys, values = (tuple(each.new_zeros(count, *each.shape[1:]) for each in s) for s in (like.keys, like.values))
    return DecoupledAttention(keys, values, like.scale.new_zeros(count))
