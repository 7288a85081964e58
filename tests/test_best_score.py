"""Which of a training's scores is the best, and when patience with them is over."""

from __future__ import annotations

import math

import pytest

from hiperlab.base.best_score import BestScore, first_best, waited

NAN = math.nan


@pytest.mark.parametrize(
    ("scores", "lower", "number"),
    [
        ([], False, None),
        ([NAN, NAN], False, None),
        ([NAN, 0.2, 0.4, 0.4, 0.1], False, 2),
        ([NAN, 0.2, 0.1, 0.4, 0.1], True, 2),
    ],
)
def test_the_first_of_the_best(scores, lower, number) -> None:
    assert first_best(scores, lower) == number


@pytest.mark.parametrize(
    ("scores", "min_delta", "lower", "standard", "count"),
    [
        ([0.5, 0.5], 0.0, False, 0.5, 1),
        ([0.5, 0.6, 0.55], 0.0, False, 0.6, 1),
        ([0.5, 0.55, 0.58], 0.1, False, 0.5, 2),
        ([0.5, 0.6, 0.71], 0.1, False, 0.71, 0),
        ([0.5, 0.6, 0.3], 0.1, True, 0.3, 0),
        ([NAN, NAN, 0.5, NAN], 0.0, False, 0.5, 1),
    ],
)
def test_waiting(scores, min_delta, lower, standard, count) -> None:
    assert waited(scores, min_delta, lower) == (standard, count)


def test_before_any_number_nobody_waits() -> None:
    standard, count = waited([NAN] * 9, 0.0, False)
    assert math.isnan(standard) and count == 0


def test_the_best_may_be_less_than_a_least_difference_better() -> None:
    """The artifact is the best score's, patience counts from the last that was better by enough."""
    training = BestScore("clip", False, 1, 0.1, 9, "it")
    assert [training.see(step, score) for step, score in ((1, 0.5), (2, 0.58), (3, 0.57))] == [True, True, False]
    assert training.best == (2, 0.58) and training.best_by(1) == (1, 0.5) and training.ended


def test_kept_and_gone_on_with() -> None:
    first, second = (BestScore("clip", True, 0, 0.0, 9, "it") for _ in range(2))
    first.see(2, 0.5)
    first.see(4, 0.5)
    second.load(first.state(), 4)
    assert second.seen == first.seen and second.ended and second.has(4) and not second.has(3)
    second.load(None, 4)
    assert not second.seen and second.best is None and not second.ended
