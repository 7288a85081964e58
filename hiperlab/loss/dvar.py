"""When a loss has stopped moving: DVAR (Voronov et al. 2023), on losses of fixed inputs.

Follows yandex-research/DVAR (early_stopping.py). Letters: L_k (loss of evaluation k), n (window), r_k (ratio).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


def variance_ratio(losses: Sequence[float], window: int) -> float:
    """r_k of the losses L_1 .. L_k: the variance of the last n over that of all, 1 for fewer than n of them.

    Population variances in float64, each in two passes: running sums of squares would lose small ones. NaN where all
    losses are equal.

    Args:
        losses: L_1 .. L_k.
        window: n, 1 or more.
    """
    if len(losses) < window:
        return 1.0
    values = np.asarray(losses, dtype=np.float64)
    whole = float(values.var())
    return float(values[-window:].var()) / whole if whole else math.nan


@dataclass
class Dvar:
    """The criterion: it has ended once r_k was below a threshold, whatever follows.

    Attributes:
        window: n, 1 or more evaluations.
        threshold: epsilon; r_k has to be less. r_n is 1, so the earliest end is after n + 1 evaluations.
        losses: L_1 .. L_k so far.
        ratio: r_k.
        ended_at: the first k with r_k below the threshold, None before.
    """

    window: int
    threshold: float
    losses: list[float] = field(default_factory=list)
    ratio: float = 1.0
    ended_at: int | None = None

    def see(self, loss: float) -> None:
        """Take L_{k+1}."""
        self.losses.append(float(loss))
        self.ratio = variance_ratio(self.losses, self.window)
        if self.ended_at is None and self.ratio < self.threshold:
            self.ended_at = len(self.losses)
