"""A small pen for drawing smooth shapes in local coordinates on a PIL picture. y points down, as in pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

Points = Sequence[tuple[float, float]]
Colour = tuple[int, ...]  # RGB or RGBA, 0..255


def rgb(code: str) -> Colour:
    """Turn "#rrggbb" or "#rrggbbaa" into numbers."""
    return tuple(bytes.fromhex(code.removeprefix("#")))


def shade(colour: Colour, factor: float) -> Colour:
    """Darker (factor < 1) or lighter (factor > 1, towards white)."""
    if factor <= 1:
        return tuple(round(c * factor) for c in colour[:3])
    return tuple(round(255 - (255 - c) / factor) for c in colour[:3])


def smooth(points: Points, closed: bool) -> list[tuple[float, float]]:
    """A Catmull-Rom curve through the points, 12 pieces between neighbours."""
    p = np.array(points, dtype=np.float64)
    p = np.concatenate([p[-1:], p, p[:2]]) if closed else np.concatenate([p[:1], p, p[-1:]])
    t = np.linspace(0, 1, 12, endpoint=False)[:, None]
    curve = [
        0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
        for a, b, c, d in zip(p[:-3], p[1:-2], p[2:-1], p[3:])
    ]
    return [(float(x), float(y)) for x, y in np.concatenate([*curve, p[-2:-1]])]


def mirrored(half: Points) -> list[tuple[float, float]]:
    """The whole outline from its right half, listed from top to bottom; points on the axis are not doubled."""
    return [*half, *((-x, y) for x, y in reversed(half) if x != 0)]


@dataclass(frozen=True)
class Pen:
    """Draws in a frame (x, y, scale, angle) laid over `image`; `at` gives a pen for a frame within this one."""

    image: Image.Image
    x: float = 0.0
    y: float = 0.0
    scale: float = 1.0
    angle: float = 0.0

    def at(self, x: float, y: float, scale: float = 1.0, angle: float = 0.0) -> Pen:
        """A pen whose origin lies at (x, y) of this frame; `angle` in degrees, clockwise."""
        ((px, py),) = self._pixels([(x, y)])
        return replace(self, x=px, y=py, scale=self.scale * scale, angle=self.angle + angle)

    def shape(self, points: Points, colour: Colour, edge: Colour | None = None, sharp: bool = False) -> None:
        """A filled outline, smooth unless `sharp`, with an optional darker edge."""
        pixels = self._pixels(points if sharp else smooth(points, closed=True))
        self._draw.polygon(pixels, fill=colour)
        if edge:
            self._draw.line([*pixels, pixels[0]], fill=edge, width=max(1, round(0.025 * self.scale)), joint="curve")

    def oval(
        self, x: float, y: float, rx: float, ry: float, colour: Colour, edge: Colour | None = None, angle: float = 0.0
    ) -> None:
        """A filled ellipse."""
        turn = np.linspace(0, 2 * math.pi, 64, endpoint=False)
        self.at(x, y, 1, angle).shape([(rx * math.cos(a), ry * math.sin(a)) for a in turn], colour, edge, sharp=True)

    def line(self, points: Points, width: float, colour: Colour) -> None:
        """A smooth line with round ends; `width` in units of the frame."""
        pixels = self._pixels(smooth(points, closed=False))
        thick = max(1, round(width * self.scale))
        self._draw.line(pixels, fill=colour, width=thick, joint="curve")
        if thick > 2:
            for x, y in (pixels[0], pixels[-1]):
                self._draw.ellipse((x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2), fill=colour)

    def within(self, points: Points, paint: Callable[[Pen], None]) -> None:
        """Whatever `paint` draws, kept only inside the smooth outline `points`."""
        layer, mask = self.image.copy(), Image.new("L", self.image.size, 0)
        paint(replace(self, image=layer))
        ImageDraw.Draw(mask).polygon(self._pixels(smooth(points, closed=True)), fill=255)
        self.image.paste(layer, mask=mask)

    @property
    def _draw(self) -> ImageDraw.ImageDraw:
        """RGBA drawing on an RGB picture: colours with a fourth number are blended."""
        return ImageDraw.Draw(self.image, "RGBA")

    def _pixels(self, points: Points) -> list[tuple[float, float]]:
        """From this frame to pixels."""
        a = math.radians(self.angle)
        cos, sin = self.scale * math.cos(a), self.scale * math.sin(a)
        return [(self.x + cos * x - sin * y, self.y + sin * x + cos * y) for x, y in points]
