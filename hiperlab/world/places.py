"""The places: each draws the whole picture behind the subject. The ground where subjects stand lies near y = 0.85."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import skia

from hiperlab.world.backdrop import Backdrop
from hiperlab.world.identity import RGB
from hiperlab.world.indoors import floor, room, studio
from hiperlab.world.pen import INK, WHITE, argb, blob, box, limb, mix, oval, polygon
from hiperlab.world.vocabulary import COLOURS


def meadow(art: Backdrop) -> None:
    """Hills, grass and flowers."""
    art.sky()
    art.ridge(art.horizon - 0.02, 0.12, art.tint((0.4, 0.62, 0.5), 0.4), 4)
    art.ridge(art.horizon + 0.04, 0.07, (0.42, 0.68, 0.33), 3)
    art.gradient(art.horizon + 0.06, 1, [(0.45, 0.72, 0.3), (0.28, 0.58, 0.22)])
    art.texture(art.horizon + 0.06, 1, (6, 7), (0.12, 0.4, 0.14), (0.75, 0.88, 0.35), 0.3)
    _blades(art, 110, art.horizon + 0.06, (0.2, 0.5, 0.16), 0.05)
    for x, y, depth, c in art.scatter(14, art.horizon + 0.1, 0.99):
        colour = ((0.98, 0.45, 0.5), (1.0, 0.85, 0.25), WHITE, (0.72, 0.5, 0.9))[int(c * 4)]
        r = 0.011 + 0.011 * depth
        for dx, dy in ((-r, 0), (r, 0), (0, -r), (0, r)):
            art.pen.fill(oval(x + dx, y + dy, r * 0.9, r * 0.9), colour, volume=0)
        art.pen.fill(oval(x, y, r * 0.6, r * 0.6), (0.95, 0.7, 0.15), volume=0)


def _blades(art: Backdrop, count: int, top: float, colour: RGB, length: float) -> None:
    spots = art.scatter(count, top, 1.02)
    tall = length * (0.35 + 0.65 * spots[:, 2])
    lean = (spots[:, 3] - 0.5) * tall
    segments = np.stack([spots[:, 0], spots[:, 1], spots[:, 0] + lean, spots[:, 1] - tall], 1)
    half = count // 2
    art.strokes(segments[::2], colour, 0.006, 0.75)
    art.strokes(segments[1::2][:half], mix(colour, (0.85, 0.95, 0.4), 0.45), 0.005, 0.8)


def beach(art: Backdrop) -> None:
    """Sea, foam, sand, a parasol or a palm."""
    art.sky()
    shore = art.horizon + 0.14
    art.gradient(art.horizon, shore + 0.05, [art.tint((0.1, 0.45, 0.72), 0.15), art.tint((0.25, 0.72, 0.8), 0.1)])
    waves = art.scatter(22, art.horizon + 0.01, shore)
    wide = 0.03 + 0.06 * waves[:, 3]
    art.strokes(np.stack([waves[:, 0] - wide, waves[:, 1], waves[:, 0] + wide, waves[:, 1]], 1), WHITE, 0.005, 0.6)
    art.ridge(shore + 0.01, 0.035, WHITE, 5)
    art.canvas.save()
    art.canvas.translate(0, 0.022)
    art.ridge(shore + 0.015, 0.03, (0.95, 0.85, 0.62), 5)
    art.canvas.restore()
    art.gradient(shore + 0.06, 1, [(0.95, 0.85, 0.62), (0.9, 0.76, 0.5)])
    art.texture(shore + 0.07, 1, (5, 6), (0.75, 0.58, 0.36), (1.0, 0.95, 0.8), 0.3)
    art.texture(shore + 0.07, 1, (48, 64), (0.6, 0.45, 0.3), (1.0, 0.95, 0.85), 0.22)
    side = 0.12 if art.chance.happens(0.5) else 0.88
    (_palm if art.chance.happens(0.5) else _parasol)(art, side, shore + 0.12)
    for x, y, depth, c in art.scatter(5, shore + 0.14, 0.98):
        art.pen.fill(
            oval(x, y, 0.012 + 0.012 * depth, 0.009 + 0.008 * depth), mix((0.98, 0.75, 0.7), WHITE, c), volume=0.8
        )


def _parasol(art: Backdrop, x: float, y: float) -> None:
    art.pen.fill(limb((x, y), (x, y - 0.1), (x + 0.01, y - 0.3), 0.008, 0.008), WHITE, volume=0.4)
    colours = ((0.92, 0.25, 0.25), WHITE)
    for i in range(5):
        a, b = -0.15 + 0.06 * i, -0.09 + 0.06 * i
        top = (x + 0.01, y - 0.4)
        art.pen.fill(polygon(top, (x + a, y - 0.26 - 0.02 * (i % 2)), (x + b, y - 0.26)), colours[i % 2], volume=0.3)


def _palm(art: Backdrop, x: float, y: float) -> None:
    lean = 0.1 if x < 0.5 else -0.1
    top = (x + lean, y - 0.46)
    art.pen.fill(limb((x, y), (x, y - 0.25), top, 0.024, 0.014), (0.55, 0.38, 0.22))
    for dx, dy in ((-0.2, 0.04), (-0.15, -0.1), (0.02, -0.14), (0.17, -0.08), (0.2, 0.06), (0.0, 0.1)):
        leaf = limb(top, (top[0] + dx * 0.7, top[1] + dy - 0.08), (top[0] + dx, top[1] + dy + 0.05), 0.03, 0.004)
        art.pen.fill(leaf, (0.2, 0.55, 0.25))


def snow(art: Backdrop) -> None:
    """Firs under a pale sky; flakes fall in front (see `draw.py`)."""
    art.sky()
    art.gradient(
        0, art.horizon + 0.02, [art.tint((0.6, 0.7, 0.85), 0.2), art.tint((0.85, 0.9, 0.96), 0.3)]
    ) if art.light == "day" else None
    art.ridge(art.horizon - 0.02, 0.16, art.tint((0.68, 0.78, 0.9), 0.3), 5)
    for x, _, _, c in art.scatter(6, 0, 1):
        _fir(art, x, art.horizon + 0.06 + 0.03 * c, 0.16 + 0.14 * c)
    art.ridge(art.horizon + 0.08, 0.05, (0.9, 0.94, 0.99), 4)
    art.gradient(art.horizon + 0.09, 1, [(0.92, 0.95, 1.0), (0.97, 0.98, 1.0)])
    art.texture(art.horizon + 0.09, 1, (5, 5), (0.62, 0.74, 0.92), WHITE, 0.35)


def _fir(art: Backdrop, x: float, y: float, tall: float) -> None:
    for i in range(3):
        w, top = tall * (0.34 - 0.08 * i), y - tall * (0.5 + 0.25 * i)
        base = y - tall * 0.24 * i
        art.pen.fill(polygon((x - w, base), (x, top), (x + w, base)), (0.2, 0.42, 0.36), volume=0.6)
        art.pen.fill(
            polygon((x - w * 0.45, top + (base - top) * 0.45), (x, top), (x + w * 0.45, top + (base - top) * 0.45)),
            WHITE,
            volume=0,
        )


def jungle(art: Backdrop) -> None:
    """Trunks, vines and big leaves."""
    art.gradient(0, 1, [art.tint((0.45, 0.72, 0.42), 0.25), (0.16, 0.42, 0.2), (0.2, 0.34, 0.14)])
    art.texture(0, 0.75, (6, 6), (0.04, 0.22, 0.1), (0.7, 0.9, 0.5), 0.5)
    for x, _, _, c in art.scatter(4, 0, 1):
        art.pen.fill(
            limb((x, -0.05), (x + 0.08 * (c - 0.5), 0.4), (x, 0.76), 0.03 + 0.02 * c, 0.045 + 0.03 * c),
            (0.36, 0.26, 0.16),
        )
    for x, _, _, c in art.scatter(4, 0, 1):
        art.pen.curve([(x, 0), (x + 0.1, 0.25 + 0.2 * c), (x + 0.25 * (c - 0.3), 0)], (0.24, 0.42, 0.16), 0.012)
    art.ridge(0.76, 0.05, (0.22, 0.4, 0.15), 5)
    art.texture(0.74, 1, (6, 10), (0.14, 0.26, 0.08), (0.5, 0.62, 0.22), 0.5)
    for i in range(9):
        left = i % 2 == 0
        x = art.chance.between(-0.08, 0.14) if left else art.chance.between(0.86, 1.08)
        _leaf(
            art,
            x,
            art.chance.between(0.12, 0.95),
            art.chance.between(20, 70) * (1 if left else -1),
            art.chance.between(0.2, 0.34),
        )
    for x in (0.1, 0.4, 0.7, 0.95):
        _leaf(
            art, x + art.chance.between(-0.1, 0.1), -0.04, art.chance.between(150, 210), art.chance.between(0.16, 0.26)
        )


def _leaf(art: Backdrop, x: float, y: float, angle: float, size: float) -> None:
    green = mix((0.12, 0.42, 0.18), (0.45, 0.72, 0.25), art.chance.between(0, 1))
    with art.pen.at(x, y, angle, size):
        art.pen.fill(blob((0, 0.05), (0.45, -0.25), (0.3, -0.9), (0, -1.1), (-0.3, -0.9), (-0.45, -0.25)), green)
        art.pen.curve([(0, 0), (0.02, -0.5), (0, -0.9)], mix(green, WHITE, 0.3), 0.006)


def city(art: Backdrop) -> None:
    """Houses with windows, a pavement and a street."""
    art.sky()
    ground = 0.72
    for tone, count in ((0.45, 6), (0.0, 5)):
        for i, (c, h, w) in enumerate(art.chance.array(count, 3).tolist()):
            colour = ((0.78, 0.5, 0.42), (0.86, 0.74, 0.55), (0.55, 0.62, 0.72), (0.66, 0.58, 0.6))[int(c * 4)]
            _house(
                art,
                (i + 0.5) / count,
                0.11 + 0.05 * w,
                0.24 + 0.3 * h + 0.18 * tone,
                ground,
                art.tint(colour, tone),
                tone == 0,
            )
    art.gradient(ground, 1, [(0.62, 0.62, 0.64), (0.62, 0.62, 0.64)])
    art.gradient(ground + 0.06, 1, [(0.36, 0.37, 0.41), (0.44, 0.45, 0.49)])
    art.texture(ground + 0.06, 1, (40, 60), INK, (0.8, 0.8, 0.85), 0.16)
    dashes = np.array([[x, 0.955, x + 0.14, 0.955] for x in (-0.05, 0.25, 0.55, 0.85)])
    art.strokes(dashes + art.chance.between(-0.05, 0.05), (0.95, 0.9, 0.7), 0.014, 0.9)
    x = 0.1 if art.chance.happens(0.5) else 0.9
    art.pen.fill(limb((x, ground + 0.06), (x, 0.5), (x, 0.36), 0.01, 0.008), (0.25, 0.27, 0.3), volume=0.4)
    if art.light != "day":
        art.glow(x, 0.35, 0.13, (1.0, 0.9, 0.5), 0.9)
    art.pen.fill(oval(x, 0.35, 0.028, 0.032), (1.0, 0.93, 0.7))


def _house(art: Backdrop, x: float, half: float, tall: float, ground: float, colour: RGB, front: bool) -> None:
    art.pen.fill(box(x, ground - tall / 2, half, tall / 2), colour, volume=0.5)
    if not front:
        return
    lit = art.light != "day"
    for row in range(int(tall / 0.1)):
        for col in (-0.55, 0.0, 0.55):
            bright = art.chance.happens(0.6)
            glass: RGB = ((1.0, 0.9, 0.5) if bright else (0.25, 0.28, 0.4)) if lit else (0.62, 0.8, 0.92)
            art.pen.fill(box(x + col * half, ground - tall + 0.06 + 0.1 * row, half * 0.17, 0.028), glass, volume=0)


def desert(art: Backdrop) -> None:
    """Dunes, cacti and stones."""
    art.sky()
    for height, rough, colour in ((0.0, 0.08, (0.9, 0.66, 0.42)), (0.07, 0.07, (0.93, 0.7, 0.4))):
        art.ridge(art.horizon + height, rough, art.tint(colour, 0.25 - 2 * height), 3)
    art.gradient(art.horizon + 0.07, 1, [(0.94, 0.7, 0.4), (0.85, 0.56, 0.28)])
    art.texture(art.horizon + 0.08, 1, (9, 3), (0.7, 0.42, 0.2), (1.0, 0.85, 0.55), 0.4)
    left = art.chance.happens(0.5)
    for x, y, tall in ((0.13, 0.74, 0.4), (0.9, 0.68, 0.24)):
        _cactus(art, x if left else 1 - x, y, tall * art.chance.between(0.85, 1.15))
    for x, y, depth, c in art.scatter(5, art.horizon + 0.12, 0.98):
        art.pen.fill(oval(x, y, 0.02 + 0.02 * c, 0.012 + 0.008 * depth), (0.62, 0.42, 0.3))


def _cactus(art: Backdrop, x: float, y: float, tall: float) -> None:
    green: RGB = (0.28, 0.56, 0.32)
    with art.pen.at(x, y, 0, tall):
        for side, height in ((-1, -0.35), (1, -0.5)):
            art.pen.fill(
                limb((0, height), (side * 0.3, height + 0.02), (side * 0.27, height - 0.3), 0.075, 0.075), green
            )
        art.pen.fill(limb((0, 0), (0, -0.5), (0, -0.92), 0.12, 0.11), green)


def underwater(art: Backdrop) -> None:
    """Blue depth with rays, seaweed, coral and bubbles."""
    art.gradient(0, 1, [art.tint((0.4, 0.82, 0.9), 0.15), (0.12, 0.5, 0.75), (0.06, 0.3, 0.55)])
    for x, _, _, c in art.scatter(5, 0, 1):
        ray = polygon((x, -0.02), (x + 0.06 + 0.05 * c, -0.02), (x + 0.2 * c - 0.15, 0.8), (x - 0.3 + 0.1 * c, 0.8))
        art.pen.fill(ray, WHITE, alpha=0.14, volume=0)
    art.ridge(0.78, 0.06, (0.8, 0.74, 0.56), 4)
    art.gradient(0.79, 1, [(0.8, 0.74, 0.56), (0.7, 0.62, 0.46)])
    art.texture(0.76, 1, (8, 10), (0.35, 0.5, 0.55), (0.98, 0.95, 0.75), 0.35)
    for i in range(7):
        x = (0.02, 0.09, 0.16, 0.84, 0.9, 0.97, 0.23)[i] + art.chance.between(-0.03, 0.03)
        tall = art.chance.between(0.18, 0.5)
        sway = art.chance.between(-0.1, 0.1)
        art.pen.fill(
            limb((x, 0.84), (x + sway, 0.84 - tall / 2), (x - sway * 0.5, 0.84 - tall), 0.02, 0.006),
            ((0.12, 0.5, 0.3), (0.3, 0.6, 0.25), (0.75, 0.3, 0.4))[i % 3],
        )
    for x, _, depth, c in art.scatter(12, 0, 1):
        bubble = oval(x, 0.7 * c, 0.009 + 0.016 * depth, 0.009 + 0.016 * depth)
        art.pen.fill(bubble, (0.85, 0.97, 1.0), alpha=0.3, volume=0)
        art.pen.outline(bubble, (0.9, 0.98, 1.0), 0.004)


def space(art: Backdrop) -> None:
    """Stars, a nebula, a planet, and the cratered ground of a moon."""
    hue = mix((0.45, 0.15, 0.5), (0.1, 0.35, 0.55), art.chance.between(0, 1))
    art.gradient(0, 1, [(0.04, 0.04, 0.12), (0.1, 0.07, 0.22)])
    for x, y, r in art.chance.array(3, 3).tolist():
        art.glow(x, y * 0.7, 0.25 + 0.2 * r, hue, 0.4)
    art.stars(44, 0.8)
    x, y, r = art.chance.between(0.15, 0.85), art.chance.between(0.13, 0.25), art.chance.between(0.08, 0.12)
    planet = art.chance.pick([COLOURS[c] for c in ("orange", "teal", "pink", "blue", "red")])
    art.pen.fill(oval(x, y, r, r), planet, volume=1.4)
    with art.pen.at(x, y, -18, r):
        art.pen.curve(
            [(-1.75, -0.05), (-1.2, 0.42), (0, 0.4), (1.2, 0.38), (1.75, -0.05)], mix(planet, WHITE, 0.6), 0.014
        )
    art.ridge(0.78, 0.06, (0.62, 0.62, 0.68), 3)
    art.gradient(0.79, 1, [(0.62, 0.62, 0.68), (0.46, 0.46, 0.54)])
    art.texture(0.77, 1, (6, 9), (0.3, 0.3, 0.36), (0.85, 0.85, 0.9), 0.3)
    for x, y, depth, _ in art.scatter(6, 0.79, 0.99):
        w = 0.03 + 0.05 * depth
        art.pen.fill(oval(x, y, w, w * 0.3), (0.36, 0.36, 0.43), volume=0)
        art.pen.fill(oval(x, y + w * 0.07, w * 0.86, w * 0.22), (0.5, 0.5, 0.57), volume=0)


PLACES: dict[str, Callable[[Backdrop], None]] = {
    f.__name__: f for f in (meadow, beach, snow, jungle, city, floor, room, desert, underwater, space, studio)
}
INDOORS = ("floor", "room", "studio")


def flakes(art: Backdrop) -> None:
    """Falling snow, drawn in front of the subject."""
    paint = skia.Paint(AntiAlias=True)
    for x, y, r in art.chance.array(34, 3).tolist():
        paint.setColor(argb(WHITE, 0.55 + 0.4 * r))
        art.canvas.drawCircle(x, y, 0.004 + 0.008 * r * r, paint)
