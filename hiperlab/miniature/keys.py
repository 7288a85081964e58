"""Chance keyed by numbers: what a step draws follows from (seed, purpose, step) alone, so resuming needs no state.

Per step and not per sample: a GPU step of 1024 samples has 3 ms for its noise, a keyed numpy generator per sample
would take 40. Indices are drawn on the CPU (equal everywhere); noise on the device (equal on devices of one kind).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hiperlab.draws import generator


def stream(seed: int, purpose: str, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator for one purpose in one step."""
    key = int(generator(seed, purpose, step).integers(2**62))
    return torch.Generator(device).manual_seed(key)


def rows(seed: int, purpose: str, step: int, count: int, batch: int) -> Tensor:
    """`batch` row numbers in [0, count), int64, equally likely, with repeats."""
    return torch.randint(count, (batch,), generator=stream(seed, purpose, step))


def normals(seed: int, purpose: str, step: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Unit normals of one step, on the device."""
    return torch.randn(shape, generator=stream(seed, purpose, step, device), device=device)
