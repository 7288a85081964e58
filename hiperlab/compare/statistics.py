"""How sure a comparison is: intervals, paired tests, ranks and the Pareto front, of plain numbers with their keys.

A claim about a method is one about subjects that were not measured, so subjects are what is drawn anew. Pictures of a
subject resemble each other: their prompts and seeds are averaged first (mean over a prompt's pictures, then over
prompts). Where there is only one subject its prompts are drawn anew, with one prompt its pictures, and `unit` says so:
such a result speaks of other prompts, or of other seeds, of this subject.

Draws come from a generator of their own with a fixed key: the same numbers give the same result.

Axes: N pictures, U units (subjects, or prompts or pictures of one), M methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hiperlab.metric.bootstrap import DRAWS, LEVEL, interval, resamples

Floats = NDArray[np.float64]
Codes = NDArray[np.int64]

DIGITS = 12  # decimal places in which ranks compare means: what differs in the last bits is equal
EXACT_UNITS = 13  # up to these every pattern of signs is tried: 2^12, as a pattern and its opposite agree
SUBJECTS, PROMPTS, PICTURES = "subjects", "prompts", "pictures"  # what is drawn anew


class Values(NamedTuple):
    """Scores of one method under one metric with their keys, one line per picture; every column is (N,).

    Attributes:
        value: the score; NaN where nothing was found: such pictures are left out.
        subject: of the picture. Keys are whole numbers or texts.
        prompt: of the picture.
        seed: that it was sampled with.
        training: seed that its method was trained with.
    """

    value: Floats
    subject: NDArray[Any]
    prompt: NDArray[Any]
    seed: NDArray[Any]
    training: NDArray[Any]

    @classmethod
    def of(
        cls,
        value: ArrayLike,
        subject: ArrayLike,
        prompt: ArrayLike = 0,
        seed: ArrayLike = 0,
        training: ArrayLike = 0,
    ) -> Self:
        """Columns of any sequences; a single key stands for all lines."""
        found = np.asarray(value, dtype=np.float64)
        keys = (np.broadcast_to(np.asarray(key), found.shape) for key in (subject, prompt, seed, training))
        return cls(found, *keys)

    def found(self) -> Values:
        """The lines with a finite value."""
        there = np.isfinite(self.value)
        return Values(*(column[there] for column in self))


class Units(NamedTuple):
    """Averages of what is drawn anew.

    Attributes:
        unit: "subjects", "prompts" or "pictures".
        means: one per unit (U,).
        num_values: numbers that they were averaged from.
    """

    unit: str
    means: Floats
    num_values: int


class Estimate(NamedTuple):
    """A mean.

    Attributes:
        mean: over units.
        low, high: 95 % interval, None of a single unit.
        unit: "subjects", "prompts" or "pictures".
        num_units: how many were there.
        num_values: numbers that they were averaged from.
    """

    mean: float
    low: float | None
    high: float | None
    unit: str
    num_units: int
    num_values: int


class Paired(NamedTuple):
    """A method's scores minus another's on the same subjects, prompts and seeds.

    Attributes:
        difference: mean over units.
        low, high: 95 % interval, None of a single unit.
        p: of the two-sided sign-flip test, in (0, 1].
        smallest_p: the least that so many units (or draws) allow: above 0.05 no difference could be told from chance.
        exact: whether every pattern of signs was tried; else they were drawn.
        unit: "subjects", "prompts" or "pictures".
        num_units: how many had both.
        num_pairs: pairs of numbers they were averaged from.
    """

    difference: float
    low: float | None
    high: float | None
    p: float
    smallest_p: float
    exact: bool
    unit: str
    num_units: int
    num_pairs: int


class Rank(NamedTuple):
    """A method's place among others, 1 is the best.

    Attributes:
        rank: of its mean; equal means share the average of their places.
        low, high: 95 % of the resamples' ranks lie there; None of a single unit.
        best: share of resamples in which it is first, in [0, 1]; those that are first together share it. None of a
            single unit.
    """

    rank: float
    low: float | None
    high: float | None
    best: float | None


# ---- averages and intervals -----------------------------------------------------------------------------------------


def units(values: Values) -> Units:
    """Averages of what is drawn anew: of subjects, else of the one subject's prompts, else its pictures."""
    values = values.found()
    subject, prompt = _codes(values.subject), _codes(values.prompt)
    return _units(values.value, subject, prompt)


def mean(values: Values) -> Estimate | None:
    """The mean over subjects with its interval; None without a number."""
    found = units(values)
    if not len(found.means):
        return None
    low, high = interval(found.means) or (None, None)
    return Estimate(float(found.means.mean()), low, high, found.unit, len(found.means), found.num_values)


def _units(value: Floats, subject: Codes, prompt: Codes) -> Units:
    """Averages by keys that are numbers from 0."""
    (subjects, _), prompts = _averages((subject, prompt), value)
    (whole,), means = _averages((subjects,), prompts)
    if len(whole) > 1:
        return Units(SUBJECTS, means, len(value))
    return Units(PROMPTS, prompts, len(value)) if len(prompts) > 1 else Units(PICTURES, value, len(value))


def _averages(keys: Sequence[Codes], value: Floats) -> tuple[list[Codes], Floats]:
    """The different combinations of keys, a column each, and the mean of each one's values."""
    shape = _shape(keys)
    joined, place = np.unique(np.ravel_multi_index(tuple(keys), shape), return_inverse=True)
    sums, counts = np.bincount(place, weights=value, minlength=len(joined)), np.bincount(place, minlength=len(joined))
    return list(np.unravel_index(joined, shape)), sums / counts


def _codes(*columns: NDArray[Any]) -> Codes:
    """Keys as numbers from 0, the same key the same number in all columns, which are joined."""
    return np.unique(np.concatenate(columns), return_inverse=True)[1].astype(np.int64)


def _shape(keys: Sequence[Codes]) -> tuple[int, ...]:
    return tuple(int(key.max(initial=0)) + 1 for key in keys)


# ---- paired tests ---------------------------------------------------------------------------------------------------


def paired(a: Values, b: Values) -> Paired | None:
    """`a` minus `b` on the subjects, prompts and sampling seeds that both have.

    Where both have such a picture from the same training seed, these are paired, and other training seeds are left
    out; else the mean over training seeds of each is taken.

    Returns:
        The difference, or None where the two have no picture in common.
    """
    found = differences(a, b)
    if found is None:
        return None
    low, high = interval(found.means) or (None, None)
    p, smallest, exact = sign_flip(found.means)
    count = len(found.means)
    return Paired(float(found.means.mean()), low, high, p, smallest, exact, found.unit, count, found.num_values)


def differences(a: Values, b: Values) -> Units | None:
    """`a` minus `b`, averaged for each unit that both have; see `paired`."""
    a, b = a.found(), b.found()
    keys = [_codes(mine, other) for mine, other in zip(a[1:], b[1:], strict=True)]  # subject, prompt, seed, training
    shape = _shape(keys)
    cell = np.ravel_multi_index(tuple(keys[:3]), shape[:3])
    same, values = _subtracted(cell * shape[3] + keys[3], a.value, b.value)
    loose, others = _subtracted(cell, a.value, b.value)
    cells = same // shape[3]
    alone = ~np.isin(loose, cells)
    cells, values = np.concatenate([cells, loose[alone]]), np.concatenate([values, others[alone]])
    if not len(values):
        return None
    (means_of,), means = _averages((cells,), values)
    subject, prompt, _ = np.unravel_index(means_of, shape[:3])
    return _units(means, subject, prompt)._replace(num_values=len(values))


def _subtracted(key: Codes, a: Floats, b: Floats) -> tuple[Codes, Floats]:
    """Where `a`, the first lines of the keys, and `b`, the others, have the same key: it and the means' difference."""
    (mine,), mean_a = _averages((key[: len(a)],), a)
    (other,), mean_b = _averages((key[len(a) :],), b)
    shared, at_a, at_b = np.intersect1d(mine, other, return_indices=True)
    return shared, mean_a[at_a] - mean_b[at_b]


def sign_flip(differences: Floats) -> tuple[float, float, bool]:
    """Two-sided sign-flip permutation test of differences (U,) that have mean 0 and, without an effect, either sign.

    Fisher's randomisation test of paired differences (Fisher 1935; Good 2005, "Permutation, Parametric and Bootstrap
    Tests of Hypotheses"). Of more than `EXACT_UNITS` the signs are drawn, and p = (b + 1) / (m + 1) (Phipson & Smyth
    2010, "Permutation P-values Should Never Be Zero").

    Returns:
        p, the smallest p that is possible, and whether every pattern was tried.
    """
    signs, exact = _signs(len(differences))
    seen = abs(differences.sum())
    reached = np.abs(signs @ differences) >= seen - 1e-9 * np.abs(differences).sum()  # rounding is no difference
    if exact:
        return float(reached.mean()), 1 / len(signs), True
    return float((reached.sum() + 1) / (len(signs) + 1)), 1 / (len(signs) + 1), False


@lru_cache(maxsize=4)
def _signs(num_units: int) -> tuple[Floats, bool]:
    """Patterns of signs (P, U): all whose first is +, or drawn ones; whether these are all."""
    if num_units <= EXACT_UNITS:
        bits = np.arange(2 ** max(0, num_units - 1))[:, None] >> np.arange(num_units)[None, ::-1]
        return (1 - 2 * (bits & 1)).astype(np.float64), True
    rng = np.random.Generator(np.random.Philox(key=1))
    draws = max(999, min(DRAWS - 1, 10_000_000 // num_units))
    return rng.choice([-1.0, 1.0], size=(draws, num_units)), False


def holm(ps: Sequence[float]) -> list[float]:
    """A family's p values, adjusted so that a single false alarm in all of them is as rare as they say (Holm 1979)."""
    order = sorted(range(len(ps)), key=lambda place: ps[place])
    adjusted, worst = [0.0] * len(ps), 0.0
    for rank, place in enumerate(order):
        worst = max(worst, min(1.0, (len(ps) - rank) * ps[place]))
        adjusted[place] = worst
    return adjusted


# ---- several methods ------------------------------------------------------------------------------------------------


def common(methods: Sequence[Values]) -> tuple[str, Floats]:
    """The units that all methods have, averaged over the prompts that all have of them.

    Returns:
        What they are, and the averages (M, U); U is 0 where nothing is common to all.
    """
    values = [each.found() for each in methods]
    lengths = np.cumsum([0, *(len(each.value) for each in values)])
    if not lengths[-1]:
        return SUBJECTS, np.zeros((len(methods), 0))
    subject, prompt = _codes(*(each.subject for each in values)), _codes(*(each.prompt for each in values))
    method = np.repeat(np.arange(len(values)), np.diff(lengths))
    (subjects, prompts, who), cells = _averages((subject, prompt, method), np.concatenate([v.value for v in values]))
    # The cells come sorted, so that those of all methods lie one after the other, in the methods' order.
    _, place, count = np.unique(
        np.ravel_multi_index((subjects, prompts), _shape((subjects, prompts))), return_inverse=True, return_counts=True
    )
    kept = count[place] == len(methods)
    table = cells[kept].reshape(-1, len(methods)).T
    if not table.size:
        return SUBJECTS, table
    first = who[kept] == 0
    rows = [_units(row, subjects[kept][first], prompts[kept][first]) for row in table]
    return rows[0].unit, np.stack([row.means for row in rows])


def ranks(means: Floats, lower_is_better: bool = False) -> list[Rank]:
    """Places of methods by their means over the same units, with the resamples' spread.

    The units are drawn anew for all methods at once (Efron & Tibshirani 1993, chapter 8: what belongs together is
    resampled together), so that a hard subject is hard for all.

    Args:
        means: of methods and units (M, U), without NaN.
        lower_is_better: whether the least is first.
    """
    values = means if lower_is_better else -means
    observed = _places(values.mean(axis=1)[None])[0]
    if means.shape[1] < 2:
        return [Rank(float(rank), None, None, None) for rank in observed]
    drawn = _places(resamples(means.shape[1]) @ values.T)  # (draws, M)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0, method="inverted_cdf")
    least = drawn == drawn.min(axis=1, keepdims=True)
    best = (least / least.sum(axis=1, keepdims=True)).mean(axis=0)
    return [Rank(*map(float, each)) for each in zip(observed, low, high, best, strict=True)]


def _places(values: Floats) -> Floats:
    """Ranks along the last axis, the least is 1, equal ones share the average of their places."""
    values = np.round(values, DIGITS)
    places = np.empty_like(values)
    for column in range(values.shape[1]):
        one = values[:, column : column + 1]
        places[:, column] = (values < one).sum(axis=1) + ((values == one).sum(axis=1) + 1) / 2
    return places


def pareto(x: ArrayLike, y: ArrayLike) -> NDArray[np.bool_]:
    """Which points (M,) no other one is at least as good as in both and better in one; more is better."""
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    as_good = (a[None] >= a[:, None]) & (b[None] >= b[:, None])
    better = (a[None] > a[:, None]) | (b[None] > b[:, None])
    return ~(as_good & better).any(axis=1) & np.isfinite(a) & np.isfinite(b)
