"""The places under a roof: wooden floor, living room, studio. See `places.py` for those outside."""

from __future__ import annotations

import numpy as np

from hiperlab.world.backdrop import Backdrop
from hiperlab.world.identity import RGB
from hiperlab.world.pen import INK, WHITE, box, mix, oval, polygon
from hiperlab.world.vocabulary import COLOURS


def floor(art: Backdrop) -> None:
    """A plain wall above a wooden floor seen from above at an angle."""
    wall = mix(art.chance.pick(list(COLOURS.values())), (0.93, 0.9, 0.84), 0.8)
    edge = art.horizon - 0.06
    art.gradient(0, edge, [mix(wall, WHITE, 0.2), wall])
    art.pen.fill(box(0.5, edge - 0.02, 0.6, 0.022), WHITE, volume=0.3)
    _planks(art, edge)


def _planks(art: Backdrop, top: float) -> None:
    tone: RGB = mix((0.72, 0.5, 0.3), (0.55, 0.34, 0.2), art.chance.between(0, 1))
    art.gradient(top, 1, [mix(tone, INK, 0.15), mix(tone, WHITE, 0.08)])
    vanish, count = 0.5, 11
    for i, (shade, cut) in enumerate(art.chance.array(count, 2).tolist()):
        a, b = (i - count / 2) / count * 1.5, (i + 1 - count / 2) / count * 1.5
        quad = polygon(
            (vanish + a * 0.9, top), (vanish + b * 0.9, top), (vanish + b * 1.9, 1.0), (vanish + a * 1.9, 1.0)
        )
        art.pen.fill(quad, INK if shade < 0.5 else WHITE, alpha=abs(shade - 0.5) * 0.3, volume=0)
        y = top + (1 - top) * (0.15 + 0.8 * cut)
        k = 0.9 + (y - top) / (1 - top)
        art.strokes(
            np.array([[vanish + a * 0.9, top, vanish + a * 1.9, 1.0], [vanish + a * k, y, vanish + b * k, y]]),
            (0.25, 0.14, 0.08),
            0.005,
            0.7,
        )
    art.texture(top, 1, (4, 70), (0.3, 0.16, 0.08), (0.95, 0.75, 0.5), 0.28)


def room(art: Backdrop) -> None:
    """A living room: wallpaper, window, picture, sofa and a rug."""
    wall = mix(art.chance.pick(list(COLOURS.values())), (0.95, 0.88, 0.76), 0.62)
    art.gradient(0, 0.66, [mix(wall, WHITE, 0.15), wall])
    stripes = np.array([[x, 0.0, x, 0.62] for x in np.arange(0.03, 1.0, 0.07)])
    art.strokes(stripes, mix(wall, WHITE, 0.5), 0.022, 0.45)
    left = art.chance.happens(0.5)
    _window(art, 0.24 if left else 0.76, 0.24)
    x = 0.76 if left else 0.24
    art.pen.fill(box(x, 0.2, 0.1, 0.085), (0.45, 0.3, 0.18), volume=0.5)
    art.pen.fill(box(x, 0.2, 0.082, 0.067), art.chance.pick(list(COLOURS.values())), volume=0.5)
    art.pen.fill(oval(x, 0.2, 0.035, 0.035), WHITE, volume=0.4)
    art.gradient(0.64, 1, [(0.58, 0.4, 0.26), (0.68, 0.48, 0.32)])
    art.pen.fill(box(0.5, 0.635, 0.6, 0.02), WHITE, volume=0.3)
    sofa = art.chance.pick([COLOURS[c] for c in ("teal", "blue", "red", "green", "purple")])
    with art.pen.at(x, 0.66):
        art.pen.fill(box(0, -0.13, 0.22, 0.13, 0.05), mix(sofa, INK, 0.15))
        art.pen.fill(box(0, 0.0, 0.22, 0.075, 0.04), sofa)
        for side in (-1, 1):
            art.pen.fill(box(side * 0.22, -0.05, 0.045, 0.12, 0.04), sofa)
    rug = art.chance.pick(list(COLOURS.values()))
    for k, colour in ((1.0, rug), (0.82, mix(rug, WHITE, 0.6)), (0.66, rug)):
        art.pen.fill(oval(0.5, 0.86, 0.46 * k, 0.115 * k), colour, volume=0)


def _window(art: Backdrop, x: float, y: float) -> None:
    view = {"day": (0.66, 0.86, 0.98), "sunset": (1.0, 0.65, 0.4), "night": (0.12, 0.14, 0.4)}[art.light]
    art.pen.fill(box(x, y, 0.145, 0.165, 0.01), WHITE, volume=0.3)
    art.pen.fill(box(x, y, 0.125, 0.145), view, volume=0.3)
    art.pen.fill(box(x, y, 0.007, 0.145), WHITE, volume=0)
    art.pen.fill(box(x, y, 0.125, 0.007), WHITE, volume=0)


def studio(art: Backdrop) -> None:
    """A seamless coloured paper with a spot of light."""
    paper = mix(art.chance.pick(list(COLOURS.values())), (0.9, 0.9, 0.9), 0.5)
    art.gradient(0, 0.78, [mix(paper, INK, 0.25), paper])
    art.gradient(0.78, 1, [paper, mix(paper, WHITE, 0.25)])
    art.glow(0.5, 0.45, 0.62, WHITE, 0.45)
