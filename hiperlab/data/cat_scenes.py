"""Five pictures of a drawn cat: poses and places. The places do not depend on the cat, so only identity differs."""

from __future__ import annotations

from PIL import Image

from hiperlab.data.cat_parts import LOAF, LYING, SITTING, STANDING, Cat, collar, edge, head, leg, tail, torso
from hiperlab.data.pen import Pen, rgb, shade

SHADOW = (0, 0, 0, 60)


def draw(cat: Cat, view: int, side: int) -> Image.Image:
    """View 0..4 of a cat, RGB, side x side; the same pixels every time."""
    big = max(2 * side, 512)  # drawn larger, then reduced: smooth edges at every size
    image = Image.new("RGB", (big, big))
    SCENES[view](Pen(image, scale=big), cat)
    return image.resize((side, side), Image.Resampling.LANCZOS)


def _box(pen: Pen, x0: float, y0: float, x1: float, y1: float, code: str) -> None:
    """A plain rectangle of a place."""
    pen.shape([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], rgb(code), sharp=True)


def _sitting_in_a_room(pen: Pen, cat: Cat) -> None:
    _box(pen, 0, 0, 1, 0.66, "#ead9b8")
    _box(pen, 0, 0.66, 1, 1, "#a8744a")
    for y in (0.74, 0.83, 0.93):
        pen.line([(0, y), (1, y)], 0.004, rgb("#8a5c38"))
    _box(pen, 0.08, 0.10, 0.30, 0.38, "#7a5230")
    _box(pen, 0.10, 0.12, 0.28, 0.36, "#7fb7c9")
    pen.shape([(0.10, 0.36), (0.18, 0.22), (0.28, 0.36)], rgb("#4e8a5b"), sharp=True)
    pen.oval(0.52, 0.88, 0.44, 0.10, rgb("#b8453f"))
    pen.oval(0.52, 0.88, 0.36, 0.075, rgb("#e2b65b"))
    body = pen.at(0.54, 0.66, 0.26)
    body.oval(0.1, 0.98, 1.05, 0.14, SHADOW)
    tail(body, cat, [(0.5, 0.82), (1.05, 0.86), (1.3, 0.45), (1.12, 0.05)])
    torso(body, cat, [(x * cat.width, y) for x, y in SITTING], (0, -0.35))
    for x in (-0.2, 0.2):
        leg(body, cat, (x, 0.15), (x, 0.88))
    collar(body, cat, [(-0.38, -0.80), (0, -0.64), (0.38, -0.80)])
    head(body.at(0, -1.36, 0.72), cat)


def _standing_in_a_garden(pen: Pen, cat: Cat) -> None:
    _box(pen, 0, 0, 1, 0.6, "#9fd3f2")
    pen.oval(0.85, 0.13, 0.08, 0.08, rgb("#fff0a0"))
    for x, y in ((0.2, 0.15), (0.28, 0.12), (0.35, 0.16)):
        pen.oval(x, y, 0.09, 0.045, rgb("#ffffff"))
    pen.oval(0.2, 0.72, 0.55, 0.24, rgb("#7dbb66"))
    pen.oval(0.9, 0.74, 0.5, 0.22, rgb("#6aab58"))
    _box(pen, 0, 0.68, 1, 1, "#5a9c47")
    for i in range(14):
        x, y = (0.07 + 0.618 * i) % 1, 0.74 + 0.24 * ((0.31 + 0.414 * i) % 1)
        pen.oval(x, y, 0.012, 0.012, rgb(("#f4e04d", "#ffffff", "#e86aa6")[i % 3]))
    body = pen.at(0.43, 0.62, 0.25, -2)
    body.oval(0, 1.0, 1.2, 0.12, SHADOW)
    tail(body, cat, [(-0.9, -0.1), (-1.3, -0.35), (-1.35, -0.95), (-1.1, -1.35)])
    for x in (-0.55, 0.62):
        leg(body, cat, (x, 0.1), (x, 0.92), far=True)
    torso(body, cat, [(x, y * cat.width) for x, y in STANDING], None)
    for x in (-0.82, 0.82):
        leg(body, cat, (x, 0.1), (x, 0.98))
    body.oval(0.88, -0.22, 0.30, 0.36, cat.belly if cat.pattern != "stripes" else cat.coat)
    collar(body, cat, [(0.62, -0.40), (0.92, -0.22), (1.20, -0.36)])
    head(body.at(0.98, -0.92, 0.66, 6), cat)


def _loaf_on_a_sofa(pen: Pen, cat: Cat) -> None:
    _box(pen, 0, 0, 1, 1, "#d5e3df")
    for x in (0.1, 0.3, 0.5, 0.7, 0.9):
        pen.line([(x, 0), (x, 0.5)], 0.01, rgb("#c0d3ce"))
    _box(pen, 0.03, 0.28, 0.97, 0.75, "#4c5fa3")
    pen.line([(0.5, 0.30), (0.5, 0.7)], 0.008, rgb("#3c4c88"))
    _box(pen, 0, 0.68, 1, 0.92, "#5b70bb")
    pen.line([(0, 0.70), (1, 0.70)], 0.012, rgb("#6f84cd"))
    _box(pen, 0, 0.92, 1, 1, "#8b6b4d")
    pen.shape([(0.70, 0.38), (0.93, 0.34), (0.96, 0.60), (0.74, 0.64)], rgb("#f0c75e"), rgb("#c89c3a"))
    body = pen.at(0.46, 0.62, 0.31)
    body.oval(0, 0.56, 1.15, 0.13, SHADOW)
    torso(body, cat, [(x, y * cat.width) for x, y in LOAF], None)
    tail(body, cat, [(1.0, 0.36), (0.85, 0.56), (0.45, 0.58), (0.1, 0.52)])
    body.oval(-0.48, 0.22, 0.34, 0.34, cat.belly)
    for x in (-0.66, -0.32):
        body.oval(x, 0.50, 0.19, 0.11, cat.feet, edge(cat.feet))
    collar(body, cat, [(-0.86, 0.0), (-0.50, 0.16), (-0.12, 0.0)])
    head(body.at(-0.5, -0.44, 0.62, -8), cat, sleepy=True)


def _portrait_at_a_window(pen: Pen, cat: Cat) -> None:
    _box(pen, 0, 0, 1, 1, "#f3ede2")
    _box(pen, 0.14, 0, 0.86, 0.78, "#f7c9a0")
    _box(pen, 0.14, 0.35, 0.86, 0.78, "#f2a97e")
    for x, y in ((0.14, 0.48), (0.28, 0.40), (0.42, 0.53), (0.58, 0.44), (0.72, 0.36)):
        _box(pen, x, y, x + 0.14, 0.78, "#8a6f86")
    _box(pen, 0.485, 0, 0.515, 0.78, "#ffffff")
    for x0, x1 in ((0, 0.16), (0.84, 1)):
        _box(pen, x0, 0, x1, 0.86, "#6aa389")
        pen.line([((x0 + x1) / 2, 0), ((x0 + x1) / 2, 0.86)], 0.01, rgb("#4f8870"))
    _box(pen, 0, 0.84, 1, 1, "#d9c3a3")
    body = pen.at(0.5, 1.05, 0.44)
    torso(body, cat, [(x * 1.35 * cat.width, y * 1.0) for x, y in SITTING], (0, -0.1))
    collar(body, cat, [(-0.52, -0.64), (0, -0.40), (0.52, -0.64)])
    head(body.at(0, -1.18, 0.80, 5), cat)


def _lying_at_night(pen: Pen, cat: Cat) -> None:
    _box(pen, 0, 0, 1, 1, "#3a3560")
    _box(pen, 0.10, 0.08, 0.44, 0.48, "#e8dfd0")
    _box(pen, 0.12, 0.10, 0.42, 0.46, "#1b2450")
    pen.oval(0.31, 0.22, 0.06, 0.06, rgb("#fdf4c8"))
    for x, y in ((0.17, 0.17), (0.21, 0.36), (0.37, 0.38), (0.16, 0.28)):
        pen.oval(x, y, 0.006, 0.006, rgb("#ffffff"))
    pen.shape([(0.74, 0.10), (0.90, 0.10), (0.95, 0.30), (0.69, 0.30)], rgb("#f4d488"), sharp=True)
    pen.oval(0.82, 0.34, 0.26, 0.20, (255, 226, 150, 40))
    pen.line([(0.82, 0.30), (0.82, 0.70)], 0.014, shade(rgb("#8b6b4d"), 0.7))
    pen.shape([(-0.1, 0.74), (0.2, 0.66), (0.6, 0.68), (1.1, 0.65), (1.1, 1.1), (-0.1, 1.1)], rgb("#79a8a0"))
    for y in (0.80, 0.90):
        pen.line([(0, y), (0.5, y + 0.02), (1, y - 0.01)], 0.03, rgb("#a9cfc4"))
    body = pen.at(0.46, 0.66, 0.27, 4)
    body.oval(0.05, 0.42, 1.45, 0.14, SHADOW)
    tail(body, cat, [(-1.1, 0.2), (-1.5, 0.28), (-1.62, -0.1), (-1.4, -0.4)])
    leg(body, cat, (0.7, 0.2), (1.45, 0.28), far=True)
    torso(body, cat, [(x, y * cat.width) for x, y in LYING], None)
    leg(body, cat, (-0.75, 0.25), (-0.2, 0.42))
    leg(body, cat, (0.6, 0.28), (1.3, 0.44))
    body.oval(0.82, -0.02, 0.28, 0.34, cat.belly if cat.pattern != "stripes" else cat.coat)
    collar(body, cat, [(0.58, -0.24), (0.86, -0.08), (1.14, -0.22)])
    head(body.at(0.9, -0.66, 0.60, 12), cat)


SCENES = (_sitting_in_a_room, _standing_in_a_garden, _loaf_on_a_sofa, _portrait_at_a_window, _lying_at_night)
NAMES = ("sitting in a room", "standing in a garden", "loaf on a sofa", "portrait at a window", "lying at night")
