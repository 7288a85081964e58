"""One trained concept drawn with several values of a number: one picture for each, the first is the plain one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from hiperlab.errors import UserError


def variants_of(name: str, values: Sequence[float]) -> tuple[str, ...]:
    """`Method.variants` of a number: "name=value" for each of several values, "" for a single one."""
    return tuple(f"{name}={value}" for value in values) if len(values) > 1 else ("",)


def value_of(variant: str, plain: float) -> float:
    """The value that one of `variants_of` names, the plain one for ""."""
    return float(variant.partition("=")[2]) if variant else plain


class DrawnAtStrengths:
    """Drawing what changes weights at one strength or several: a factor of the change, 1 as trained, 0 for none.

    A method inherits it beside `Method`, calls `set_strengths` and asks `strength_of`; it trains at strength 1.

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
        self.variants = variants_of("strength", strength)

    def strength_of(self, variant: str) -> float:
        """The factor of one of `variants`."""
        return value_of(variant, self.strength)
