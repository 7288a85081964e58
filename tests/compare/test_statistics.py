"""Statistics of comparisons: values by hand, intervals that cover what they say, p uniform by chance."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from hiperlab.compare.statistics import (
    PICTURES,
    PROMPTS,
    SUBJECTS,
    Values,
    common,
    differences,
    holm,
    mean,
    paired,
    pareto,
    ranks,
    sign_flip,
    units,
)
from hiperlab.metric.bootstrap import interval, most_coverage, student_quantile


def test_prompts_count_the_same_in_a_subject_and_subjects_in_the_mean() -> None:
    values = Values.of([1, 3, 8, 10, math.nan], ["a", "a", "a", "b", "b"], ["p", "p", "q", "p", "q"], [0, 1, 0, 0, 0])
    found = units(values)
    assert found.unit == SUBJECTS and found.num_values == 4
    assert found.means.tolist() == [5.0, 10.0]  # a: ((1 + 3) / 2 + 8) / 2
    estimate = mean(values)
    assert estimate and estimate.mean == 7.5 and (estimate.low, estimate.high) == (5.0, 10.0)  # of two, their range


def test_one_subject_is_resampled_over_prompts_and_one_prompt_over_pictures() -> None:
    assert units(Values.of([1, 3, 8], "a", ["p", "p", "q"])).means.tolist() == [2.0, 8.0]
    assert units(Values.of([1, 3, 8], "a", ["p", "p", "q"])).unit == PROMPTS
    assert units(Values.of([1, 3, 8], "a", "p", [0, 1, 2])).unit == PICTURES
    one = mean(Values.of([1.0], "a"))
    assert one and one.low is None and mean(Values.of([math.nan], "a")) is None


def test_students_quantile() -> None:
    """Tables of the distribution."""
    for degrees, expected in ((1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622), (30, 2.0423), (1000, 1.9623)):
        assert student_quantile(0.975, degrees) == pytest.approx(expected, abs=2e-3)
    assert student_quantile(0.5, 3) == pytest.approx(0, abs=1e-6)


def test_interval_of_a_constant_is_that_and_order_does_not_matter() -> None:
    assert interval(np.full(6, 0.25)) == (0.25, 0.25)
    few = np.array([0.1, 0.4, 0.2, 0.9, 0.5, 0.3, 0.6])
    low, high = interval(few)  # type: ignore[misc]
    assert few.min() < low < few.mean() < high < few.max()
    assert interval(few) == (low, high)
    assert interval(3 * few + 1) == pytest.approx((3 * low + 1, 3 * high + 1))
    assert interval(few[:1]) is None


@pytest.mark.parametrize("num_units", [6, 10, 25])
@pytest.mark.parametrize("skewed", [False, True])
def test_a_95_percent_interval_covers_about_95_percent(num_units: int, skewed: bool) -> None:
    """Drawn subjects; of skewed ones (a mean of exponentials) a little less, as for every interval of a small mean."""
    rng = np.random.default_rng(0)
    draws = 1500
    samples = rng.exponential(size=(draws, num_units)) if skewed else 1 + rng.normal(size=(draws, num_units))
    found = [interval(row) for row in samples]
    covered = np.mean([low <= 1 <= high for low, high in found])  # type: ignore[misc]
    assert (0.85 if skewed else 0.93) < covered < 0.97, covered


def test_few_subjects_cannot_be_covered() -> None:
    """No resample lies outside the units' range; of 3 units that holds the middle in three of four cases."""
    rng = np.random.default_rng(1)
    for num_units in (2, 3, 4):
        found = [interval(row) for row in rng.normal(size=(2000, num_units))]
        covered = np.mean([low <= 0 <= high for low, high in found])  # type: ignore[misc]
        assert covered == pytest.approx(most_coverage(num_units), abs=0.035)
    assert most_coverage(3) == 0.75 and most_coverage(6) > 0.95 > most_coverage(5)


def test_sign_flip_by_hand() -> None:
    """Of 1, 2, 3 only all + and all - reach a sum of 6: 2 of 8. Of 1, -2, 3 the sum is 2: 6 of 8 reach it."""
    assert sign_flip(np.array([1.0, 2.0, 3.0])) == (0.25, 0.25, True)
    assert sign_flip(np.array([1.0, -2.0, 3.0])) == (0.75, 0.25, True)
    assert sign_flip(np.zeros(4))[0] == 1.0
    some = np.array([0.3, -0.1, 0.25, 0.4, 0.05, -0.2, 0.6])
    every = [abs(np.dot(signs, some)) >= abs(some.sum()) - 1e-12 for signs in itertools.product((1, -1), repeat=7)]
    assert sign_flip(some)[0] == pytest.approx(np.mean(every))


def test_drawn_signs_agree_with_all_of_them() -> None:
    """20 units: the drawn p against all 2^20 patterns, whose sums are counted by doubling."""
    some = np.random.default_rng(5).normal(0.25, 1, size=20)
    sums = np.zeros(1)
    for value in some:
        sums = np.concatenate([sums + value, sums - value])
    p, smallest, exact = sign_flip(some)
    assert not exact and smallest == 1e-4
    assert p == pytest.approx((np.abs(sums) >= abs(some.sum()) - 1e-9).mean(), abs=0.02)


@pytest.mark.parametrize("num_units", [8, 30])
def test_p_is_uniform_by_chance(num_units: int) -> None:
    """Differences of no effect: of every level that share of p lies below it (never more, as p comes in steps)."""
    rng = np.random.default_rng(2)
    ps = np.array([sign_flip(row)[0] for row in rng.normal(size=(1500, num_units))])
    for level in (0.05, 0.25, 0.5, 0.75):
        assert (ps <= level).mean() == pytest.approx(level, abs=0.035)


def test_pairs_share_subject_prompt_and_seed() -> None:
    a = Values.of([1.0, 2.0, 5.0, 9.0], ["s", "s", "t", "u"], ["p", "q", "p", "p"], [0, 0, 0, 0])
    b = Values.of([0.5, 4.0, 3.0, 7.0], ["s", "t", "t", "u"], ["p", "p", "p", "p"], [0, 0, 1, 1])
    found = paired(a, b)
    assert found is not None
    assert found.num_units == 2 and found.num_pairs == 2  # u has no common seed, t only seed 0, s only prompt p
    assert found.difference == pytest.approx((0.5 + 1.0) / 2)
    assert found.p == 0.5 == found.smallest_p and found.exact and found.unit == SUBJECTS
    mirrored = paired(b, a)
    assert mirrored and mirrored.difference == -found.difference and mirrored.p == found.p
    assert paired(a, Values.of([1.0], "v")) is None
    assert paired(a, Values.of([math.nan], "s", "p")) is None


def test_training_seeds_are_paired_where_both_have_them() -> None:
    a = Values.of([1.0, 2.0, 6.0], ["s", "s", "t"], "p", 0, [0, 1, 5])
    b = Values.of([4.0, 10.0, 2.0], ["s", "s", "t"], "p", 0, [1, 2, 6])
    found = differences(a, b)
    assert found is not None and found.num_values == 2
    assert found.means.tolist() == [2.0 - 4.0, 6.0 - 2.0]  # s: seed 1 with seed 1; t: none in common, so the means


def test_pairing_sees_what_the_subjects_spread_hides() -> None:
    """Ten subjects that differ by far more than the methods do."""
    level = np.linspace(0, 10, 10)
    gain = np.array([0.1, 0.12, 0.08, 0.11, 0.1, 0.09, 0.1, 0.13, 0.07, 0.1])
    a, b = Values.of(level + gain, np.arange(10)), Values.of(level, np.arange(10))
    found = paired(a, b)
    assert found and found.low and 0.08 < found.low < 0.1 < found.high < 0.12  # type: ignore[operator]
    assert found.p == pytest.approx(2 / 2**10)


def test_holm_by_hand() -> None:
    """Sorted 0.01, 0.02, 0.04 times 3, 2, 1; never falling, never above 1."""
    assert holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.03, 0.025]) == pytest.approx([0.05, 0.05])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_ranks_by_hand() -> None:
    means = np.array([[1.0, 1.0, 1.0], [3.0, 3.0, 3.0], [2.0, 2.0, 2.0]])
    assert [(each.rank, each.low, each.high, each.best) for each in ranks(means)] == [
        (3, 3, 3, 0), (1, 1, 1, 1), (2, 2, 2, 0),
    ]  # fmt: skip
    assert [each.rank for each in ranks(means, lower_is_better=True)] == [1, 3, 2]
    tied = ranks(np.array([[1.0, 0.0], [0.0, 1.0]]))
    # Resamples: both units once (a half, a tie), one twice (a quarter each).
    assert [each.rank for each in tied] == [1.5, 1.5]
    assert [each.best for each in tied] == pytest.approx([0.5, 0.5], abs=0.02)
    assert ranks(np.array([[1.0], [2.0]]))[0].best is None


def test_only_what_all_have_is_ranked() -> None:
    a = Values.of([1.0, 9.0, 3.0], ["s", "s", "t"], ["p", "q", "p"])
    b = Values.of([2.0, 4.0, 7.0], ["s", "t", "u"], ["p", "p", "p"])
    unit, table = common([a, b])
    assert unit == SUBJECTS and table.tolist() == [[1.0, 3.0], [2.0, 4.0]]
    assert common([a, Values.of([1.0], "x")])[1].shape[1] == 0
    assert common([Values.of([], [])])[1].shape == (1, 0)


def test_pareto_front_by_hand() -> None:
    front = pareto([1.0, 2.0, 3.0, 2.0, 2.0, math.nan], [3.0, 2.0, 1.0, 1.0, 2.0, 9.0])
    assert front.tolist() == [True, True, True, False, True, False]  # equal points are both on it


def test_the_same_rows_give_the_same_numbers() -> None:
    rng = np.random.default_rng(3)
    a, b = (Values.of(rng.normal(size=40), np.arange(40) // 2) for _ in range(2))
    assert paired(a, b) == paired(a, b) and mean(a) == mean(a)
