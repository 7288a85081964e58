"""Faces and what is worn on them, in head units: origin at the head's middle, 1 = its radius, y down."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi, sin

import skia

from hiperlab.world.identity import RGB, Identity
from hiperlab.world.pen import INK, PINK, WHITE, Coat, Pen, blob, box, limb, mix, oval, polygon
from hiperlab.world.scene import Scene
from hiperlab.world.vocabulary import COLOURS

GOLD: RGB = (0.98, 0.78, 0.2)


@dataclass(frozen=True)
class Head:
    """Where a head is (subject units, degrees) and where things sit on it (head units)."""

    x: float
    y: float
    r: float
    angle: float = 0.0
    top: float = -0.72  # where a hat rests
    width: float = 0.8  # half width of the head there
    gap: float = 0.4  # half distance of the eyes
    eye_y: float = -0.05
    eye_r: float = 0.23
    neck_y: float = 0.86
    neck: float = 0.62  # half width of the neck


def eyes(pen: Pen, who: Identity, head: Head, closed: bool) -> None:
    """Two eyes, open with a highlight or peacefully closed."""
    for side in (-1, 1):
        x, y, r = side * head.gap, head.eye_y, head.eye_r
        if closed:
            pen.curve([(x - r, y), (x, y + 1.3 * r), (x + r, y)], INK, 0.026)
            continue
        pen.fill(oval(x, y, r, r * 1.12), WHITE, volume=0.3)
        pen.fill(oval(x + 0.02, y + 0.02, r * 0.8, r * 0.9), who.eye, volume=0)
        pen.fill(oval(x + 0.02, y + 0.03, r * 0.48, r * 0.55), INK, volume=0)
        pen.fill(oval(x - r * 0.2, y - r * 0.35, r * 0.26, r * 0.26), WHITE, volume=0)


def smile(pen: Pen, x: float, y: float, width: float, depth: float = 0.16) -> None:
    """A simple mouth."""
    pen.curve([(x - width, y), (x, y + 2 * depth), (x + width, y)], INK, 0.02)


def cheeks(pen: Pen, who: Identity, x: float, y: float, r: float = 0.2) -> None:
    """Rosy cheeks, where the identity has them."""
    if who.cheeks:
        for side in (-1, 1):
            pen.fill(oval(side * x, y, r, r * 0.7), PINK, alpha=0.7, volume=0)


def mark(pen: Pen, who: Identity) -> None:
    """The identity's facial mark."""
    if who.mark == "blaze":
        pen.fill(blob((-0.1, -0.95), (0.1, -0.95), (0.24, 0.3), (-0.24, 0.3)), who.belly, volume=0)
    elif who.mark == "patch":
        pen.fill(oval(0.42, -0.08, 0.36, 0.4), who.second, volume=0)
    elif who.mark == "star":
        pen.fill(star(0, -0.52, 0.25), who.second, volume=0)


def star(x: float, y: float, r: float) -> skia.Path:
    """A five-pointed star as a path."""
    angles = [(pi * i / 5, r if i % 2 == 0 else 0.45 * r) for i in range(10)]
    return polygon(*[(x + s * sin(a), y - s * cos(a)) for a, s in angles])


def wear(pen: Pen, now: Scene, head: Head) -> None:
    """Draw the scene's accessory on a head (a call in the subject's frame)."""
    colour = COLOURS[now.accessory_colour]
    with pen.at(head.x, head.y, head.angle, head.r):
        if now.accessory in HATS:
            HATS[now.accessory](pen, head, colour)
        elif now.accessory in NECKS:
            with pen.at(0, head.neck_y, 0, head.neck):
                NECKS[now.accessory](pen, colour)
        elif now.accessory == "glasses":
            _glasses(pen, head)


def _hat(pen: Pen, head: Head, colour: RGB) -> None:
    with pen.at(0, head.top, -6, head.width):
        pen.fill(blob((-0.8, 0.08), (-0.72, -1.25), (0.72, -1.25), (0.8, 0.08)), colour)
        pen.fill(polygon((-0.67, -0.32), (0.67, -0.32), (0.7, -0.03), (-0.7, -0.03)), mix(colour, INK, 0.6), volume=0.4)
        pen.fill(oval(0, 0.03, 1.32, 0.2), colour)


def _santa(pen: Pen, head: Head, colour: RGB) -> None:
    red: RGB = (0.86, 0.12, 0.13)
    with pen.at(0, head.top, 0, head.width):
        pen.fill(
            blob((-0.95, 0.15), (-0.85, -0.75), (0.1, -1.6), (1.25, -0.85), (1.1, -0.45), (0.75, -0.55), (0.95, 0.15)),
            red,
        )
        pen.fill(limb((-0.88, 0.05), (0, -0.12), (0.88, 0.05), 0.22, 0.22), WHITE)
        pen.fill(oval(1.22, -0.42, 0.28, 0.28), WHITE)


def _crown(pen: Pen, head: Head, colour: RGB) -> None:
    with pen.at(0, head.top, 0, head.width):
        points = [(-0.8, 0.1), (-0.95, -0.75), (-0.45, -0.3), (0, -0.95), (0.45, -0.3), (0.95, -0.75), (0.8, 0.1)]
        pen.fill(polygon(*points), GOLD)
        for x, y, gem in ((-0.95, -0.78, "red"), (0, -1.0, "blue"), (0.95, -0.78, "red")):
            pen.fill(oval(x, y, 0.13, 0.13), COLOURS[gem], volume=0.5)
        pen.fill(oval(0, -0.12, 0.15, 0.15), COLOURS["purple"], volume=0.5)


def _glasses(pen: Pen, head: Head) -> None:
    r = max(head.eye_r * 1.5, 0.31)
    gap = max(head.gap, r * 1.12)
    pen.curve([(-gap, head.eye_y - 0.1), (0, head.eye_y - 0.26), (gap, head.eye_y - 0.1)], INK, 0.03)
    for side in (-1, 1):
        lens = oval(side * gap, head.eye_y, r, r)
        pen.fill(lens, (0.1, 0.12, 0.2), alpha=0.28, volume=0)
        pen.outline(lens, WHITE if pen.manner == "neon" else INK, 0.034)
        pen.fill(oval(side * gap - r * 0.35, head.eye_y - r * 0.4, r * 0.25, r * 0.14), WHITE, alpha=0.8, volume=0)


def _scarf(pen: Pen, colour: RGB) -> None:
    pen.fill(limb((0.55, 0.1), (0.75, 0.6), (0.6, 1.25), 0.26, 0.3), colour, dim=0.12)
    pen.fill(limb((-1.0, -0.14), (0, 0.55), (1.0, -0.14), 0.28, 0.28), colour)
    for x in (-0.55, 0.0, 0.55):
        pen.curve([(x - 0.08, -0.05), (x, 0.14), (x + 0.02, 0.36)], mix(colour, WHITE, 0.55), 0.022)
    pen.fill(oval(0.58, 0.12, 0.3, 0.28), colour)


def _bow(pen: Pen, colour: RGB) -> None:
    for side in (-1, 1):
        pen.fill(
            blob((0, 0.12), (side * 0.35, -0.35), (side * 1.0, -0.5), (side * 1.0, 0.75), (side * 0.35, 0.6)), colour
        )
    pen.fill(box(0, 0.12, 0.2, 0.25, 0.1), mix(colour, INK, 0.25))


HATS = {"hat": _hat, "santa hat": _santa, "crown": _crown}
NECKS = {"scarf": _scarf, "bow tie": _bow}


def collar(pen: Pen, who: Identity, head: Head) -> None:
    """The identity's own collar, drawn before the head covers its upper edge."""
    if who.collar == "none":
        return
    with pen.at(head.x, head.y, head.angle, head.r):
        y, w = head.neck_y, head.neck
        pen.fill(limb((-w, y - 0.2), (0, y + 0.3), (w, y - 0.2), 0.13, 0.13), who.band)
        if who.collar == "tag":
            pen.fill(oval(0, y + 0.3, 0.17, 0.17), GOLD)


def skin(coat: Coat) -> RGB:
    """Inside of an ear: rosy, tinted by the coat."""
    return mix(PINK, coat.rgb, 0.25)
