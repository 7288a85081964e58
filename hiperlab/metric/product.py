"""Likeness and text in one number: a picture must have both. A copy of a training picture has the first alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from hiperlab.errors import UserError
from hiperlab.metric.contract import MemberScore


@dataclass(frozen=True)
class ProductScore(MemberScore):
    """Product of likeness and prompt following, picture by picture, as DreamBench++ ranks methods (CP x PF).

    Peng et al. 2024 (arXiv 2406.16855): theirs are a language model's marks for both. Numbers below 0 count as 0: two
    negative ones must not make a good picture.

    Attributes:
        factors: lists of members, e.g. [[identity], [pose, place]]; a factor is the mean of those that a picture has.
        without: members in [0, 1] that a picture should not have, e.g. [copied]: it counts 1 - value of each.
    """

    factors: tuple[tuple[str, ...], ...]
    without: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", tuple(tuple(each) for each in self.factors))  # yaml gives lists
        object.__setattr__(self, "without", tuple(self.without))

    def check(self, key: str) -> None:
        """Refuse factors without members."""
        super().check(key)
        if len(self.factors) < 2 or not all(self.factors):
            raise UserError(
                f"{key}.factors={self.factors}: give two lists of members or more, e.g. [[identity],[pose]]."
            )

    @property
    def members(self) -> list[str]:
        """All that are in the factors, and those that should not be there."""
        return [*(name for factor in self.factors for name in factor), *self.without]

    def combine(self, found: Mapping[str, float]) -> float:
        """In [0, inf); NaN where a factor has no number."""
        values = [[max(0.0, found[name]) for name in factor if name in found] for factor in self.factors]
        if not all(values) or not all(name in found for name in self.without):
            return math.nan
        return math.prod(map(fmean, values)) * math.prod(1 - found[name] for name in self.without)
