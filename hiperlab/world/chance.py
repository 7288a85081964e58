"""Chance as a pure function: every random choice of the world follows from (seed, purpose) alone, on every machine."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Chance:
    """A stream of choices keyed by a seed and a purpose.

    Only raw Philox doubles are used (no ziggurat normals), so no number depends on a machine's mathematics library.

    Args:
        seed: any integer.
        purpose: what is drawn ("identity", "scene", ...); streams of different purposes are independent.
    """

    def __init__(self, seed: int, purpose: str) -> None:
        key = int.from_bytes(blake2b(f"{purpose}:{seed}".encode(), digest_size=16).digest(), "big")
        self.generator = np.random.Generator(np.random.Philox(key=key))

    def array(self, *shape: int) -> np.ndarray:
        """Uniform doubles in [0, 1) of the given shape."""
        return self.generator.random(shape)

    def between(self, low: float, high: float) -> float:
        """One uniform number in [low, high)."""
        return low + (high - low) * float(self.generator.random())

    def happens(self, probability: float) -> bool:
        """True with the given probability."""
        return float(self.generator.random()) < probability

    def pick(self, options: Sequence[T], weights: Sequence[float] | None = None) -> T:
        """One of the options, equally likely unless weights (any positive scale) are given."""
        share = np.cumsum(np.ones(len(options)) if weights is None else np.asarray(weights, float))
        return options[int(np.searchsorted(share, float(self.generator.random()) * share[-1], side="right"))]
