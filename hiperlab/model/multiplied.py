"""A weight times (1 + a matrix of low rank): E4T's change of a projection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hiperlab.model.offsets import Change


@dataclass(frozen=True)
class Multiplied(Change):
    """W' = W (1 + left right^T), elementwise product (E4T, methods/e4t.md section 3).

    Args:
        left: (outputs, k).
        right: (inputs, k).
    """

    left: Tensor
    right: Tensor

    def apply(self, weight: Tensor) -> Tensor:
        """In the more precise of the two types, then in the weight's."""
        kind = torch.promote_types(weight.dtype, self.left.dtype)
        delta = (self.left @ self.right.mT).to(weight.device, kind)
        return (weight.to(kind) * (1 + delta)).to(weight.dtype)

    def tensors(self) -> tuple[Tensor, ...]:
        """Both factors."""
        return self.left, self.right
