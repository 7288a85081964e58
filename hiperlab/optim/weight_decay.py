"""Weight decay as fine-tuning has it, for methods that train a weight's offset instead of the weight itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer


def decay_whole_weights(optimizer: Optimizer, pairs: Iterable[tuple[nn.Parameter, Tensor]]) -> Optimizer:
    """Let AdamW decay W + delta towards 0, not delta towards 0, i.e. not the weight towards the frozen one.

    AdamW (Loshchilov & Hutter 2019, algorithm 2) multiplies what it trains by 1 - lr * decay and takes a step. Taking
    lr * decay * W from delta afterwards makes that product the one of W + delta. Afterwards, because Lightning works
    out the gradient inside the optimizer's step. Other optimizers are left alone.

    Args:
        optimizer: over the offsets, perhaps among others.
        pairs: each offset (K, *shape) with its frozen weight (*shape).

    Returns:
        The same optimizer.
    """
    if not isinstance(optimizer, AdamW):
        return optimizer
    frozen = dict(pairs)

    @torch.no_grad()
    def take(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            share = group["lr"] * group["weight_decay"]
            for offset in group["params"]:
                if share and offset.grad is not None and offset in frozen:
                    weight = frozen[offset].to(offset.device, offset.dtype)
                    offset.sub_(weight[None], alpha=float(share))

    optimizer.register_step_post_hook(take)
    return optimizer
