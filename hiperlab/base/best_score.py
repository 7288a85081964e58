"""Scores of a training by step: which was the best, and how long none has been better.

The patience is that of the CLIP stop which DVAR is compared with (Voronov et al. 2023; yandex-research/DVAR,
early_stopping.py). Letters: s_k (score of evaluation k), d (least difference), p (patience).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

log = logging.getLogger(__name__)
KEY = "best_score"  # of a checkpoint


class Evaluation(NamedTuple):
    """A score of a training.

    Attributes:
        step: optimizer steps behind what was scored.
        score: NaN where nothing was found.
    """

    step: int
    score: float


def first_best(scores: Sequence[float], lower: bool) -> int | None:
    """Number of the best score, the first of equal ones; None where each is NaN.

    Args:
        scores: s_1 .. s_k.
        lower: whether less is better.
    """
    known = [number for number, score in enumerate(scores) if not math.isnan(score)]
    return max(known, key=lambda number: -scores[number] if lower else scores[number], default=None)


def waited(scores: Sequence[float], min_delta: float, lower: bool) -> tuple[float, int]:
    """What the next score has to be better than, and how many have not been since.

    The first number is what later ones are compared with; it moves to a score that is better by more than d only, so
    it need not be the best. NaN is better than nothing; before the first number it does not count.

    Args:
        scores: s_1 .. s_k.
        min_delta: d, 0 or more.
        lower: whether less is better.

    Returns:
        The score that was last better (NaN before any), and the number of evaluations since.
    """
    sign, standard, count = (-1 if lower else 1), math.nan, 0
    for score in scores:
        if math.isnan(standard):
            standard = score
        elif sign * score > sign * standard + min_delta:
            standard, count = score, 0
        else:
            count += 1
    return standard, count


class BestScore:
    """The scores of one concept's training: its best, and whether patience has ended it.

    Args:
        score: its name, for messages.
        lower: whether less is better.
        patience: p: so many evaluations in a row may be no better, the next one ends the training; None for any.
        min_delta: d.
        most: steps that the training makes without it, for messages.
        name: of the concept, for messages.

    Attributes:
        seen: all evaluations, ascending.
    """

    def __init__(self, score: str, lower: bool, patience: int | None, min_delta: float, most: int, name: str) -> None:
        self.score, self.lower, self.patience, self.min_delta = score, lower, patience, min_delta
        self.most, self.name = most, name
        self.seen: list[Evaluation] = []

    @property
    def best(self) -> Evaluation | None:
        """The best evaluation so far; None where nothing was found."""
        return self.best_by(self.most)

    def best_by(self, step: int) -> Evaluation | None:
        """The best evaluation of the first `step` optimizer steps."""
        there = [each for each in self.seen if each.step <= step]
        number = first_best([each.score for each in there], self.lower)
        return None if number is None else there[number]

    @property
    def ended(self) -> bool:
        """Whether the training makes no further step."""
        return self.patience is not None and self._waited > self.patience

    @property
    def _waited(self) -> int:
        return waited([each.score for each in self.seen], self.min_delta, self.lower)[1]

    def has(self, step: int) -> bool:
        """Whether what stood after `step` optimizer steps has been scored."""
        return any(each.step == step for each in self.seen)

    def see(self, step: int, score: float) -> bool:
        """Take a score; whether it is the best so far."""
        self.seen.append(Evaluation(step, score))
        best = self.best
        if best is None:
            log.warning("%s: %s found nothing in the pictures after step %d.", self.name, self.score, step)
            return False
        log.info("%s: %s %.4g after step %d, best %.4g after step %d",
                 self.name, self.score, score, step, best.score, best.step)  # fmt: skip
        if self.ended:
            log.info(
                "%s: %s was no better in %d evaluations (fit.monitor.patience=%s): training ends after step %d, "
                "%d steps are saved.",
                self.name, self.score, self._waited, self.patience, step, self.most - step,
            )  # fmt: skip
        return best.step == step

    # ---- keeping -----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"steps": [each.step for each in self.seen], "scores": [each.score for each in self.seen]}

    def load(self, state: Mapping[str, Any] | None, steps: int) -> None:
        """Go on from a checkpoint's values; without any, nothing before it counts.

        Args:
            state: of `state`, None where the checkpoint's training was not scored.
            steps: the checkpoint's optimizer steps.
        """
        if state is None:
            log.warning("%s: no scores in the checkpoint: they begin at step %d.", self.name, steps)
            state = {"steps": [], "scores": []}
        pairs = zip(state["steps"], state["scores"], strict=True)
        self.seen = [Evaluation(int(step), float(score)) for step, score in pairs]
