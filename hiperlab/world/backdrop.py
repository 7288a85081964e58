"""Tools for drawing places in picture units: x and y from 0 (upper left) to 1 (lower right)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import skia

from hiperlab.world.chance import Chance
from hiperlab.world.identity import RGB
from hiperlab.world.pen import WHITE, Pen, argb, mix, oval

SKIES: dict[str, tuple[RGB, RGB, RGB]] = {  # top, middle, horizon
    "day": ((0.3, 0.56, 0.92), (0.55, 0.77, 0.97), (0.86, 0.94, 0.98)),
    "sunset": ((0.35, 0.25, 0.55), (0.93, 0.45, 0.42), (1.0, 0.8, 0.45)),
    "night": ((0.14, 0.16, 0.42), (0.26, 0.3, 0.62), (0.45, 0.48, 0.78)),  # before the night's own dimming
}
CUBIC = skia.SamplingOptions(skia.CubicResampler.Mitchell())


class Backdrop:
    """A canvas in picture units with the scene's chance and light.

    Args:
        canvas: skia canvas scaled so that the picture is the unit square.
        chance: stream of the scene's textures.
        light: "day", "sunset" or "night".
        size: side of the picture in pixels.
        detail: factor on the strength of textures; low for flat styles.
    """

    def __init__(self, canvas: skia.Canvas, chance: Chance, light: str, size: int, detail: float = 1.0) -> None:
        self.canvas, self.chance, self.light, self.detail = canvas, chance, light, detail
        self.pen = Pen(canvas, unit=float(size))
        self.horizon = chance.between(0.5, 0.62)

    def gradient(self, top: float, bottom: float, colours: Sequence[RGB]) -> None:
        """Fill the strip between two heights with a vertical gradient."""
        shader = skia.GradientShader.MakeLinear([skia.Point(0, top), skia.Point(0, bottom)], [argb(c) for c in colours])
        self.canvas.drawRect(skia.Rect(0, top, 1, bottom), skia.Paint(Shader=shader))

    def glow(self, x: float, y: float, radius: float, colour: RGB, alpha: float = 1.0, squash: float = 1.0) -> None:
        """A soft round spot, opaque in the middle and fading to nothing."""
        with self.pen.at(x, y, 0, radius, radius * squash):
            shader = skia.GradientShader.MakeRadial(
                (0, 0), 1, [argb(colour, alpha), argb(colour, 0.62 * alpha), argb(colour, 0)], [0, 0.4, 1]
            )
            self.canvas.drawRect(skia.Rect(-1, -1, 1, 1), skia.Paint(Shader=shader))

    def texture(
        self, top: float, bottom: float, cells: tuple[int, int], dark: RGB, light: RGB, strength: float
    ) -> None:
        """Smooth noise between two colours over a strip; `cells` rows and columns of noise.

        Args:
            top: height where the strip begins.
            bottom: height where it ends.
            cells: rows and columns of the noise.
            dark: one extreme colour.
            light: the other.
            strength: greatest opacity in [0, 1].
        """
        grid = self.chance.array(*cells)
        pixels = np.empty((*cells, 4), np.uint8)
        for channel in range(3):
            pixels[..., channel] = np.rint(np.where(grid < 0.5, dark[channel], light[channel]) * 255)
        pixels[..., 3] = np.rint(np.abs(grid - 0.5) * 2 * strength * self.detail * 255)
        image = skia.Image.fromarray(pixels, skia.kRGBA_8888_ColorType)
        self.canvas.drawImageRect(image, skia.Rect(0, top, 1, bottom), CUBIC)

    def sky(self) -> None:
        """Sky down to the horizon, with sun or moon, clouds or stars as the light has it."""
        colours = SKIES[self.light]
        self.gradient(0, self.horizon + 0.02, colours)
        x, y = self.chance.between(0.12, 0.88), self.chance.between(0.1, 0.2)
        if self.light == "night":
            self.stars(26)
            self.glow(x, y, 0.16, (0.8, 0.85, 1.0), 0.5)
            self.pen.fill(oval(x, y, 0.055, 0.055), (1.0, 1.0, 0.9), volume=0)
            self.pen.fill(oval(x + 0.022, y - 0.014, 0.046, 0.046), colours[0], volume=0)
        elif self.light == "sunset":
            self.glow(x, self.horizon - 0.06, 0.42, (1.0, 0.75, 0.35), 0.9)
            self.pen.fill(oval(x, self.horizon - 0.07, 0.075, 0.075), (1.0, 0.93, 0.65), volume=0)
            self.clouds((1.0, 0.68, 0.6), 2)
        else:
            self.glow(x, y, 0.18, (1.0, 0.97, 0.75), 0.8)
            self.pen.fill(oval(x, y, 0.05, 0.05), (1.0, 0.97, 0.72), volume=0)
            self.clouds(WHITE, 3)

    def stars(self, count: int, below: float = 1.0) -> None:
        """Small bright dots."""
        paint = skia.Paint(AntiAlias=True)
        for x, y, bright in self.chance.array(count, 3):
            paint.setColor(argb(WHITE, 0.45 + 0.55 * bright))
            self.canvas.drawCircle(float(x), float(y * below), float(0.003 + 0.005 * bright), paint)

    def clouds(self, colour: RGB, count: int) -> None:
        """Heaps of soft balls."""
        for x, y, scale in self.chance.array(count, 3):
            for dx, dy, r in ((-0.08, 0.015, 0.07), (0.0, -0.015, 0.095), (0.09, 0.01, 0.075)):
                k = 0.7 + 0.6 * scale
                self.glow(
                    float(x + dx * k), float(0.06 + 0.6 * self.horizon * y + dy), float(r * k * 1.5), colour, 0.85, 0.55
                )

    def ridge(self, height: float, rough: float, colour: RGB, bumps: int = 6) -> skia.Path:
        """A hilly strip from its rolling upper edge to the bottom; drawn and returned."""
        ys = height - rough * self.chance.array(bumps + 1)
        path = skia.Path()
        path.moveTo(-0.1, 1.1)
        path.lineTo(-0.1, float(ys[0]))
        for i in range(bumps):
            x0, x1 = -0.1 + 1.2 * i / bumps, -0.1 + 1.2 * (i + 1) / bumps
            path.cubicTo((x0 + x1) / 2, float(ys[i]), (x0 + x1) / 2, float(ys[i + 1]), x1, float(ys[i + 1]))
        path.lineTo(1.1, 1.1)
        path.close()
        self.canvas.drawPath(path, skia.Paint(Color=argb(colour), AntiAlias=True))
        return path

    def strokes(self, segments: np.ndarray, colour: RGB, width: float, alpha: float = 1.0) -> None:
        """Many straight strokes at once: segments (n, 4) of x0, y0, x1, y1 in picture units, alpha in [0, 1]."""
        path = skia.Path()
        for x0, y0, x1, y1 in segments.tolist():
            path.moveTo(x0, y0)
            path.lineTo(x1, y1)
        paint = skia.Paint(Color=argb(colour, alpha), AntiAlias=True, Style=skia.Paint.kStroke_Style, StrokeWidth=width)
        paint.setStrokeCap(skia.Paint.kRound_Cap)
        self.canvas.drawPath(path, paint)

    def scatter(self, count: int, top: float, bottom: float) -> np.ndarray:
        """Positions (count, 4) of x, y, depth and chance, far ones first: depth 0 at `top` to 1 at `bottom`."""
        spots = self.chance.array(count, 4)
        spots = spots[np.argsort(spots[:, 2], kind="stable")]
        spots[:, 1] = top + (bottom - top) * spots[:, 2] ** 1.4
        return spots

    def tint(self, colour: RGB, share: float = 0.25) -> RGB:
        """A colour seen in this light's haze."""
        return mix(colour, SKIES[self.light][2], share)
