"""Random numbers as pure functions of (seed, purpose, sample number).

Why not torch's generators: their state would have to be saved, moved to workers and split over ranks, and resuming
from a saved state is exact only where nothing else changed (workers, ranks, accumulation). Here nothing is kept: the
number for a sample is worked out from its name, whoever asks, in whatever order, on whatever device comes later.

Why numpy's Philox: it is counter-based, so any key gives an independent stream at the cost of a few multiplications
(a Mersenne twister must be warmed up), it takes the 128 bits of a hash as they are, and it gives the same numbers on
every machine while CUDA's generators differ from the CPU's. Why blake2b: neighbouring seeds and sample numbers must
not give related keys, and Python's own hash changes with each process. numpy promises the bit streams for ever but not
the normal distribution's algorithm; fixed values in tests/data/test_draws.py notice a change.

Purposes in use here: "order", "flip", "template". Other rooms name their own ("noise", "timestep", ...).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor


def generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """A private generator for one draw, keyed by a 128-bit hash of (seed, purpose, *numbers)."""
    name = json.dumps([int(seed), str(purpose), *(int(n) for n in numbers)])  # unambiguous: ("a", 11) is not ("a1", 1)
    digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def normal(seed: int, purpose: str, samples: Tensor | Iterable[int], shape: Sequence[int]) -> Tensor:
    """Unit normals, float32 (B, *shape), row i from (seed, purpose, samples[i]) alone."""
    rows = [generator(seed, purpose, k).standard_normal(tuple(shape), dtype=np.float32) for k in _numbers(samples)]
    return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, *shape)


def integers(seed: int, purpose: str, samples: Tensor | Iterable[int], high: int) -> Tensor:
    """Whole numbers uniform in [0, high), int64 (B,), entry i from (seed, purpose, samples[i]) alone."""
    return torch.tensor([int(generator(seed, purpose, k).integers(high)) for k in _numbers(samples)], dtype=torch.long)


def uniform(seed: int, purpose: str, samples: Tensor | Iterable[int]) -> Tensor:
    """Numbers uniform in [0, 1), float64 (B,), entry i from (seed, purpose, samples[i]) alone.

    float64 so that a comparison `< probability` never meets a 1.0 that float32 rounded up.
    """
    return torch.tensor([generator(seed, purpose, k).random() for k in _numbers(samples)], dtype=torch.float64)


def _numbers(samples: Tensor | Iterable[int]) -> list[int]:
    """The sample numbers as a list of Python ints."""
    return samples.tolist() if isinstance(samples, Tensor) else [int(k) for k in samples]
