"""Identity: what stays the same from picture to picture. Captions only ever name a part of it."""

from __future__ import annotations

from dataclasses import dataclass

from hiperlab.errors import UserError, near
from hiperlab.world.chance import Chance
from hiperlab.world.vocabulary import COLOURS, KINDS, PATTERNS

RGB = tuple[float, float, float]


@dataclass(frozen=True)
class Identity:
    """One subject. Colours are RGB in [0, 1]; proportions are factors around 1.

    Attributes:
        kind: one of `words.KINDS`.
        colour: rough name of the main colour (a caption may say it); `second_colour` likewise.
        coat: main RGB, `second`: of the pattern, `belly`: of the light parts, `eye`, `band`: of collar or trim.
        pattern: one of `words.PATTERNS`, with `frequency` (per unit of height), `phase` and `slant` (radians),
            `amount` in [0, 1].
        head, ear, tail, leg, body: proportions; what each means depends on the kind (a teapot's tail is its spout).
        collar: "none", "band" or "tag".
        mark: "none", "blaze", "patch" or "star" on the face.
        socks: light feet; cheeks: rosy ones.
    """

    kind: str
    colour: str
    second_colour: str
    coat: RGB
    second: RGB
    belly: RGB
    eye: RGB
    band: RGB
    pattern: str
    frequency: float
    phase: float
    slant: float
    amount: float
    head: float
    ear: float
    tail: float
    leg: float
    body: float
    collar: str
    mark: str
    socks: bool
    cheeks: bool


def near_colour(name: str, chance: Chance, spread: float = 0.07) -> RGB:
    """An RGB near a named colour, each channel within `spread`."""
    r, g, b = (min(max(c + chance.between(-spread, spread), 0.04), 0.97) for c in COLOURS[name])
    return r, g, b


def identity(seed: int, kind: str | None = None) -> Identity:
    """The subject with this seed: a pure function, the same on every machine.

    Args:
        seed: any integer; `subjects.py` says which seeds train, which are held out.
        kind: one of `words.KINDS`, or None to let the seed choose. The rest of the identity does not depend on it.

    Raises:
        UserError: the kind does not exist.
    """
    if kind is not None and kind not in KINDS:
        raise UserError(f"kind={kind!r} is not a kind of the world.{near(kind, KINDS)}")
    chance = Chance(seed, "identity")
    drawn = chance.pick(KINDS)
    names = list(COLOURS)
    colour = chance.pick(names)
    second = chance.pick([n for n in names if n != colour])
    coat = near_colour(colour, chance)
    light = chance.between(0.55, 0.8)
    return Identity(
        kind=kind or drawn,
        colour=colour,
        second_colour=second,
        coat=coat,
        second=near_colour(second, chance),
        belly=(1 - light * (1 - coat[0]) * 0.6, 1 - light * (1 - coat[1]) * 0.65, 1 - light * (1 - coat[2]) * 0.75),
        eye=near_colour(chance.pick(("brown", "blue", "green", "teal", "purple", "orange", "black")), chance),
        band=near_colour(chance.pick([n for n in names if n not in (colour, second)]), chance),
        pattern=chance.pick(PATTERNS, (0.24, 0.2, 0.2, 0.18, 0.18)),
        frequency=chance.between(3.2, 6.0),
        phase=chance.between(0, 6.28),
        slant=chance.between(-0.8, 0.8),
        amount=chance.between(0, 1),
        head=chance.between(0.9, 1.12),
        ear=chance.between(0.75, 1.3),
        tail=chance.between(0.75, 1.3),
        leg=chance.between(0.85, 1.2),
        body=chance.between(0.88, 1.14),
        collar=chance.pick(("none", "band", "tag"), (0.45, 0.25, 0.3)),
        mark=chance.pick(("none", "blaze", "patch", "star"), (0.4, 0.2, 0.25, 0.15)),
        socks=chance.happens(0.4),
        cheeks=chance.happens(0.5),
    )
