"""Drawing what changes weights at one strength or several: a factor of the change, 1 as trained, 0 for none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from hiperlab.errors import UserError


class DrawnAtStrengths:
    """A method inherits it beside `Method`, calls `set_strengths` and asks `strength_of`; it trains at strength 1.

    Attributes:
        strength: the plain factor; it may be negative, which runs the change backwards.
        variants: one for each strength, see `Method`.
    """

    sampling_settings: ClassVar[tuple[str, ...]] = ("strength",)

    def set_strengths(self, strength: Sequence[float]) -> None:
        """Take the setting; several strengths draw one picture for each, the first is the plain one.

        Raises:
            UserError: none is given.
        """
        if not strength:
            raise UserError("method.strength=[] draws nothing. Give one factor or several, e.g. [1.0].")
        self.strength = float(strength[0])
        self.variants = tuple(f"strength={value}" for value in strength) if len(strength) > 1 else ("",)

    def strength_of(self, variant: str) -> float:
        """The factor of one of `variants`."""
        return float(variant.removeprefix("strength=")) if variant else self.strength
