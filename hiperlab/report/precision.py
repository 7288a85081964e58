"""float16 training of a few float32 parameters around a float16 stack: loss scaling without autocast."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from pytorch_lightning.plugins.precision import MixedPrecision


class ScaledPrecision(MixedPrecision):
    """Lightning's gradient scaling, minus its autocast: which part has which dtype is said by `precision/*.yaml`.

    The loss is scaled before backward so that float16 activations' gradients do not underflow; gradients are unscaled
    before the finite guard and before clipping; the scale is part of every checkpoint (resuming without it would
    restart at 65536 and skip steps).

    Args:
        device: "cuda" or "cpu", where the trained parameters are.
    """

    def __init__(self, device: str) -> None:
        super().__init__("16-mixed", device, torch.amp.GradScaler(device))

    def forward_context(self) -> AbstractContextManager[None]:  # type: ignore[override]
        """No autocast: dtypes are explicit."""
        return contextlib.nullcontext()
