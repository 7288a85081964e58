"""Drawn cats: who they are (identity) and what they are made of (head, bodies in five poses)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hiperlab.data.pen import Colour, Pen, Points, mirrored, rgb, shade

WHITE, BLACK, PINK = rgb("#fbf8f2"), rgb("#1d1a1e"), rgb("#e79aa0")


@dataclass(frozen=True)
class Cat:
    """What stays the same in every picture of one cat."""

    coat: Colour
    belly: Colour  # muzzle and chest
    mark: Colour  # stripes, patches or points
    pattern: Literal["plain", "stripes", "bib", "points", "patches"]
    eyes: Colour
    collar: Colour
    tag: Colour
    feet: Colour
    tip: Colour  # end of the tail
    second: Colour = BLACK  # the other patches of a three-coloured cat
    width: float = 1.0  # stout > 1, slim < 1


CATS: dict[str, Cat] = {
    "cats": Cat(
        rgb("#8d95a3"), WHITE, rgb("#8d95a3"), "plain", rgb("#7fc24a"), rgb("#d22f2f"), rgb("#f2c230"), WHITE, WHITE
    ),
    "tabby": Cat(
        rgb("#b08a5e"),
        rgb("#e6d3b1"),
        rgb("#54391f"),
        "stripes",
        rgb("#e0b02c"),
        rgb("#2b62c9"),
        rgb("#dfe4ea"),
        rgb("#b08a5e"),
        rgb("#54391f"),
    ),
    "tuxedo": Cat(
        rgb("#2a2930"),
        WHITE,
        WHITE,
        "bib",
        rgb("#f0d43a"),
        rgb("#1f9d55"),
        rgb("#f2c230"),
        WHITE,
        rgb("#2a2930"),
        width=0.92,
    ),
    "ginger": Cat(
        rgb("#ee9338"),
        rgb("#fde3bd"),
        rgb("#c4611a"),
        "stripes",
        rgb("#58b08c"),
        rgb("#12806f"),
        rgb("#f7f3e8"),
        rgb("#fde3bd"),
        rgb("#fde3bd"),
        width=1.18,
    ),
    "siamese": Cat(
        rgb("#f0e2c8"),
        rgb("#f0e2c8"),
        rgb("#4d372d"),
        "points",
        rgb("#4aa3e8"),
        rgb("#7d3fb2"),
        rgb("#dfe4ea"),
        rgb("#4d372d"),
        rgb("#4d372d"),
        width=0.86,
    ),
    "calico": Cat(
        WHITE,
        WHITE,
        rgb("#e2822f"),
        "patches",
        rgb("#c8983a"),
        rgb("#ea5fa0"),
        rgb("#7fd4f0"),
        WHITE,
        rgb("#e2822f"),
        second=rgb("#38312f"),
    ),
}

SKULL = mirrored([(0, -0.80), (0.50, -0.76), (0.90, -0.30), (1.02, 0.16), (0.78, 0.56), (0.36, 0.78), (0, 0.82)])
SITTING = mirrored([(0, -1.0), (0.32, -0.86), (0.44, -0.4), (0.62, 0.2), (0.78, 0.6), (0.62, 0.92), (0, 0.96)])
STANDING = [
    (-1.0, -0.25),
    (-0.6, -0.44),
    (0, -0.38),
    (0.6, -0.5),
    (0.98, -0.4),
    (0.98, 0.12),
    (0.5, 0.34),
    (-0.2, 0.28),
    (-0.8, 0.34),
    (-1.06, 0.1),
]
LOAF = [(-1.02, 0.5), (-1.0, -0.05), (-0.55, -0.45), (0.25, -0.56), (0.85, -0.25), (1.08, 0.25), (1.0, 0.52), (0, 0.58)]
LYING = [
    (-1.25, 0.12),
    (-1.05, -0.32),
    (-0.5, -0.42),
    (0.2, -0.34),
    (0.8, -0.42),
    (1.0, 0.0),
    (0.8, 0.36),
    (-0.3, 0.4),
    (-1.1, 0.38),
]


def edge(colour: Colour) -> Colour:
    """Outline colour: a darker coat, or a lighter one where the coat is nearly black."""
    return shade(colour, 0.62) if sum(colour[:3]) > 200 else shade(colour, 1.35)


def head(pen: Pen, cat: Cat, sleepy: bool = False) -> None:
    """A face from the front; the skull has radius 1 around the origin."""
    pen = pen.at(0, 0)
    ears = (cat.mark, cat.mark) if cat.pattern == "points" else (cat.coat, cat.coat)
    if cat.pattern == "patches":
        ears = (cat.mark, cat.second)
    for side, ear in zip((-1, 1), ears):
        pen.shape([(side * 0.93, -0.1), (side * 0.94, -1.22), (side * 0.16, -0.72)], ear, edge(ear), sharp=True)
        pen.shape([(side * 0.80, -0.42), (side * 0.82, -0.98), (side * 0.40, -0.68)], PINK, sharp=True)
    skull = [(x * (0.9 + 0.1 * cat.width), y) for x, y in SKULL]
    pen.shape(skull, cat.coat)
    pen.within(skull, lambda p: _face_pattern(p, cat))
    pen.shape(skull, (0, 0, 0, 0), edge(cat.coat))
    muzzle = cat.mark if cat.pattern == "points" else cat.belly
    for side in (-1, 1):
        pen.oval(side * 0.19, 0.40, 0.27, 0.22, muzzle)
        for tilt in (-0.10, 0.04, 0.18):
            pen.line([(side * 0.34, 0.38 + tilt / 3), (side * 1.25, 0.36 + tilt)], 0.018, (*edge(muzzle), 200))
    for side in (-1, 1):
        _eye(pen.at(side * 0.43, -0.08), cat, sleepy)
    pen.shape([(-0.11, 0.20), (0.11, 0.20), (0, 0.32)], rgb("#c9646e"), sharp=True)
    for side in (-1, 1):
        pen.line([(0, 0.32), (side * 0.04, 0.44), (side * 0.19, 0.46)], 0.035, edge(muzzle))


def _eye(pen: Pen, cat: Cat, sleepy: bool) -> None:
    """One eye around the origin."""
    if sleepy:
        pen.line([(-0.2, -0.02), (0, 0.10), (0.2, -0.02)], 0.06, BLACK if sum(cat.coat) > 300 else cat.eyes)
        return
    pen.oval(0, 0, 0.235, 0.235, BLACK)
    pen.oval(0, 0, 0.2, 0.2, cat.eyes)
    pen.oval(0, 0, 0.075, 0.175, BLACK)
    pen.oval(-0.06, -0.08, 0.05, 0.05, rgb("#ffffff"))


def _face_pattern(pen: Pen, cat: Cat) -> None:
    """The coat's pattern on the face."""
    if cat.pattern == "stripes":
        for x in (-0.24, 0.0, 0.24):
            pen.line([(x, -0.85), (x * 0.7, -0.38)], 0.11, cat.mark)
        for side in (-1, 1):
            pen.line([(side * 1.1, 0.02), (side * 0.72, 0.10)], 0.09, cat.mark)
            pen.line([(side * 1.1, 0.30), (side * 0.72, 0.30)], 0.09, cat.mark)
    elif cat.pattern == "bib":
        pen.shape(
            [(0, -0.62), (0.12, 0.0), (0.45, 0.42), (0.3, 0.9), (-0.3, 0.9), (-0.45, 0.42), (-0.12, 0.0)], cat.mark
        )
    elif cat.pattern == "points":
        pen.oval(0, 0.18, 0.66, 0.62, cat.mark)
    elif cat.pattern == "patches":
        pen.oval(-0.62, -0.35, 0.52, 0.50, cat.mark)
        pen.oval(0.66, -0.40, 0.48, 0.46, cat.second)


def torso(pen: Pen, cat: Cat, outline: Points, chest: tuple[float, float] | None) -> None:
    """A body with its pattern; `chest` is where the light fur sits, if it can be seen."""
    pen.shape(outline, cat.coat)
    pen.within(outline, lambda p: _body_pattern(p, cat, chest))
    pen.shape(outline, (0, 0, 0, 0), edge(cat.coat))


def _body_pattern(pen: Pen, cat: Cat, chest: tuple[float, float] | None) -> None:
    """Bands, patches and a light chest, in the body's frame."""
    if cat.pattern == "stripes":
        for x in (-0.95, -0.62, -0.29, 0.04, 0.37, 0.70):
            pen.line([(x - 0.04, -1.0), (x + 0.06, -0.45), (x - 0.02, 0.05)], 0.11, cat.mark)
        for side in (-1, 1):
            for y in (0.2, 0.45, 0.7):
                pen.line([(side * 1.2, y), (side * 0.55, y + 0.06)], 0.09, cat.mark)
    elif cat.pattern == "patches":
        pen.oval(-0.62, -0.12, 0.42, 0.40, cat.mark, angle=20)
        pen.oval(0.22, -0.40, 0.34, 0.24, cat.second, angle=-15)
        pen.oval(0.66, 0.42, 0.30, 0.34, cat.mark)
    if chest:
        pen.oval(*chest, 0.30, 0.46, cat.belly)


def leg(pen: Pen, cat: Cat, top: tuple[float, float], foot: tuple[float, float], far: bool = False) -> None:
    """A leg with its paw; far legs lie in the shade."""
    limb = cat.mark if cat.pattern == "points" else cat.coat
    tone = 0.78 if far else 1.0
    pen.line([top, foot], 0.26, edge(limb))
    pen.line([top, foot], 0.22, shade(limb, tone))
    pen.oval(foot[0] + 0.04, foot[1], 0.18, 0.12, shade(cat.feet, tone), edge(cat.feet))


def tail(pen: Pen, cat: Cat, points: Points) -> None:
    """A tail along the points, its last part in the tip's colour."""
    colour = cat.mark if cat.pattern in ("points", "patches") else cat.coat
    pen.line(points, 0.24, edge(colour))
    pen.line(points, 0.20, colour)
    if cat.pattern == "stripes":
        for x, y in points[1:-1]:
            pen.oval(x, y, 0.1, 0.1, cat.mark)
    pen.line([points[-2], points[-1]], 0.20, cat.tip)


def collar(pen: Pen, cat: Cat, points: Points) -> None:
    """A collar along the points with its tag below the middle one."""
    pen.line(points, 0.15, edge(cat.collar))
    pen.line(points, 0.12, cat.collar)
    x, y = points[len(points) // 2]
    pen.oval(x, y + 0.13, 0.10, 0.10, cat.tag, edge(cat.tag))
