"""Rows that keep their length while an optimizer moves them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def hold_norms(optimizer: Optimizer, rows: nn.Parameter, norms: Tensor) -> Optimizer:
    """After every step, scale each row to its norm, as kyungmnlee/dco's customize.py does with a learnt word.

    Args:
        optimizer: over the rows, perhaps among others.
        rows: (..., D).
        norms: (..., 1), above 0.

    Returns:
        The same optimizer.
    """

    @torch.no_grad()
    def hold(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if rows.grad is not None:
            rows.mul_(norms.to(rows) / rows.norm(dim=-1, keepdim=True))

    optimizer.register_step_post_hook(hold)
    return optimizer
