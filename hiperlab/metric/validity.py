"""What a score is worth: does it order pictures as the truth does, and does it reward copying?

Pure arithmetic on numbers that were found elsewhere: scores and truths of pictures of several subjects.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

DRAWS = 2000
LEVEL = 0.95


class Agreement(NamedTuple):
    """How well a score orders pictures.

    Attributes:
        tau: mean over subjects of Kendall's tau-b within each, in [-1, 1]; NaN where no subject has one.
        low, high: 95 % interval over other subjects; NaN with fewer than two.
        subjects: how many have a tau.
    """

    tau: float
    low: float
    high: float
    subjects: int


def kendall_tau_b(scores: ArrayLike, truths: ArrayLike) -> float:
    """Kendall's rank correlation with ties (Kendall 1945): (P - Q) / sqrt((P + Q + T) (P + Q + U)).

    P pairs are ordered alike by both, Q the other way round, T are ties in the scores only, U in the truths only.

    Args:
        scores: (N,) numbers; pairs with NaN on a side are left out.
        truths: (N,) numbers.

    Returns:
        In [-1, 1]; NaN where one of them is constant.
    """
    x, y = np.asarray(scores, dtype=np.float64), np.asarray(truths, dtype=np.float64)
    assert x.shape == y.shape and x.ndim == 1, f"{x.shape} scores, {y.shape} truths"
    known = ~(np.isnan(x) | np.isnan(y))
    first, second = np.triu_indices(int(known.sum()), k=1)
    a, b = (np.sign(values[known][first] - values[known][second]) for values in (x, y))
    spread = np.sqrt(float((a != 0).sum()) * float((b != 0).sum()))
    return float((a * b).sum() / spread) if spread else float("nan")


def agreement(scores: ArrayLike, truths: ArrayLike, subjects: Sequence[str], draws: int = DRAWS) -> Agreement:
    """Kendall's tau-b of a score with the truth, within subjects, with a percentile bootstrap over subjects.

    Within: a subject that is harder for all would else look like agreement. The draws' seed is fixed.

    Args:
        scores: (N,) of pictures, more is better (turn round a score of which less is).
        truths: (N,) likewise.
        subjects: whose picture each is, N.
        draws: number of resamplings.
    """
    x, y, names = np.asarray(scores, dtype=np.float64), np.asarray(truths, dtype=np.float64), np.asarray(subjects)
    found = np.array([kendall_tau_b(x[names == name], y[names == name]) for name in dict.fromkeys(subjects)])
    found = found[~np.isnan(found)]
    low, high = _interval(found, draws)
    return Agreement(float(found.mean()) if len(found) else float("nan"), low, high, len(found))


def copy_bias(scores: ArrayLike, copies: ArrayLike) -> float:
    """How much better copies of training pictures are scored than honest pictures: standardised mean difference.

    (mean of copies - mean of others) / standard deviation of the others, Glass's delta (Glass 1976). Above 0 a score
    rewards copying; a good one is far below.

    Args:
        scores: (N,) of pictures, more is better; NaN are left out.
        copies: (N,) whether each is a copy.

    Returns:
        Standard deviations; infinite where all others are equal, NaN without a copy or without two others.
    """
    x, copied = np.asarray(scores, dtype=np.float64), np.asarray(copies, dtype=bool)
    known = ~np.isnan(x)
    pasted, honest = x[known & copied], x[known & ~copied]
    if not len(pasted) or len(honest) < 2:
        return float("nan")
    difference, spread = float(pasted.mean() - honest.mean()), float(honest.std(ddof=1))
    if not spread:
        return float(np.sign(difference) * np.inf) if difference else 0.0
    return difference / spread


def _interval(values: NDArray[np.float64], draws: int) -> tuple[float, float]:
    """Percentile bootstrap of the mean; NaN with fewer than two values."""
    if len(values) < 2:
        return float("nan"), float("nan")
    rng = np.random.Generator(np.random.Philox(key=0))
    means = values[rng.integers(len(values), size=(draws, len(values)))].mean(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
