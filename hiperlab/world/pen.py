"""The pen: shapes in unit coordinates (x right, y down), softly shaded, flat with outlines, or as neon tubes.

Shapes are skia paths; skia's CPU rasteriser draws them at any resolution with exact coverage antialiasing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import cos, hypot, pi, sin

import numpy as np
import skia

from hiperlab.world.identity import RGB, Identity
from hiperlab.world.vocabulary import PATTERNS

Point = tuple[float, float]
INK: RGB = (0.13, 0.1, 0.12)
WHITE: RGB = (0.98, 0.98, 0.97)
PINK: RGB = (0.95, 0.62, 0.64)

# The coat is evaluated in the local coordinates of each part, so the pattern moves with the limb it grows on.
COAT = skia.RuntimeEffect.MakeForShader("""
uniform float3 coat; uniform float3 second; uniform float kind; uniform float freq;
uniform float phase; uniform float slant; uniform float amount;
half4 main(float2 p) {
    float2 q = float2(p.x * cos(slant) - p.y * sin(slant), p.x * sin(slant) + p.y * cos(slant));
    float w = 0.0;
    if (kind < 1.5) {
        float wave = q.x * freq * 6.2832 * 0.8 + phase + (0.4 + amount) * sin(q.y * 9.0 + phase);
        w = smoothstep(-0.25, 0.25, sin(wave) - 0.35 + 0.5 * amount);
    } else if (kind < 2.5) {
        float2 g = q * freq * 1.5 + float2(phase, phase * 0.7);
        float2 c = floor(g);
        g.x += 0.5 * mod(c.y, 2.0); c = floor(g);
        float2 d = fract(g) - 0.5 - 0.14 * sin(c.yx * float2(1.7, 2.3) + phase);
        w = 1.0 - smoothstep(0.0, 0.1, length(d) - 0.2 - 0.13 * amount);
    } else if (kind < 3.5) {
        float2 g = q * freq * 1.25;
        float n = sin(g.x * 1.9 + phase) + sin(g.y * 2.3 + phase * 1.7) + sin((g.x + g.y) * 1.4 + phase * 2.3);
        w = smoothstep(-0.12, 0.12, n - 0.7 + 0.8 * amount);
    } else {
        w = smoothstep(-0.06, 0.1, p.y + 0.05 * sin(p.x * 11.0 + phase) - 0.1 + 0.1 * amount);
    }
    return half4(half3(mix(coat, second, w)), 1.0);
}
""")


@dataclass(frozen=True)
class Coat:
    """A surface: its mean colour (for outlines and flat uses) and, if patterned, its shader."""

    rgb: RGB
    shader: skia.Shader | None = None

    def scaled(self, unit: float) -> Coat:
        """The same coat for a frame whose unit is `unit` subject units, so that its pattern keeps its size."""
        return Coat(self.rgb, self.shader and self.shader.makeWithLocalMatrix(skia.Matrix.Scale(1 / unit, 1 / unit)))


def coat_of(who: Identity) -> Coat:
    """The patterned surface of an identity."""
    if who.pattern == "plain":
        return Coat(who.coat)
    numbers = (PATTERNS.index(who.pattern), who.frequency, who.phase, who.slant, who.amount)
    data = np.array((*who.coat, *who.second, *numbers), np.float32)
    return Coat(who.coat, COAT.makeShader(skia.Data.MakeWithCopy(data.tobytes())))


def canvas_on(pixels: np.ndarray) -> skia.Canvas:
    """A canvas in picture units that draws into an RGBA array (size, size, 4) of premultiplied uint8."""
    canvas = skia.Surface(pixels, skia.kRGBA_8888_ColorType, skia.kPremul_AlphaType).getCanvas()
    canvas.scale(pixels.shape[1], pixels.shape[0])
    return canvas


def mix(a: RGB, b: RGB, share: float) -> RGB:
    """`a` with a share of `b` in [0, 1]."""
    r, g, c = (x + (y - x) * share for x, y in zip(a, b))
    return r, g, c


def argb(rgb: RGB, alpha: float = 1.0) -> int:
    """RGB and alpha in [0, 1] as skia's 32-bit colour."""
    r, g, b = (int(min(max(c, 0.0), 1.0) * 255 + 0.5) for c in rgb)
    return (int(alpha * 255 + 0.5) << 24) | (r << 16) | (g << 8) | b


def oval(x: float, y: float, rx: float, ry: float) -> skia.Path:
    """An axis-aligned ellipse."""
    return skia.Path.Oval(skia.Rect(x - rx, y - ry, x + rx, y + ry))


def box(x: float, y: float, rx: float, ry: float, corner: float = 0.0) -> skia.Path:
    """A rectangle of half sizes rx, ry with rounded corners."""
    return skia.Path.RRect(skia.RRect.MakeRectXY(skia.Rect(x - rx, y - ry, x + rx, y + ry), corner, corner))


def polygon(*points: Point) -> skia.Path:
    """A closed polygon."""
    return skia.Path.Polygon([skia.Point(*p) for p in points], True)


def blob(*points: Point) -> skia.Path:
    """A closed smooth curve through the middles of the polygon's edges."""
    path = skia.Path()
    n = len(points)
    middle = [
        ((points[i][0] + points[(i + 1) % n][0]) / 2, (points[i][1] + points[(i + 1) % n][1]) / 2) for i in range(n)
    ]
    path.moveTo(*middle[-1])
    for corner, end in zip(points, middle):
        path.quadTo(*corner, *end)
    path.close()
    return path


def limb(a: Point, bend: Point, b: Point, ra: float, rb: float, steps: int = 9) -> skia.Path:
    """A rounded tapering tube from a to b along the quadratic curve with control point `bend`; end radii ra, rb."""
    left, right = [], []
    for i in range(steps):
        t = i / (steps - 1)
        x = (1 - t) ** 2 * a[0] + 2 * t * (1 - t) * bend[0] + t * t * b[0]
        y = (1 - t) ** 2 * a[1] + 2 * t * (1 - t) * bend[1] + t * t * b[1]
        dx = (1 - t) * (bend[0] - a[0]) + t * (b[0] - bend[0])
        dy = (1 - t) * (bend[1] - a[1]) + t * (b[1] - bend[1])
        scale = (ra + (rb - ra) * t) / (hypot(dx, dy) or 1.0)
        left.append((x - dy * scale, y + dx * scale))
        right.append((x + dy * scale, y - dx * scale))
    cap_b = _cap(b, left[-1])
    cap_a = _cap(a, right[0])
    return polygon(*left, *cap_b, *right[::-1], *cap_a)


def _cap(centre: Point, start: Point, steps: int = 7) -> list[Point]:
    """Points of the half circle around `centre` that begins beside `start`."""
    dx, dy = start[0] - centre[0], start[1] - centre[1]
    turn = [-pi * i / steps for i in range(1, steps)]
    return [(centre[0] + dx * cos(t) - dy * sin(t), centre[1] + dx * sin(t) + dy * cos(t)) for t in turn]


class Pen:
    """Fills and strokes paths on a canvas in one manner.

    Args:
        canvas: a skia canvas scaled to unit coordinates.
        manner: "soft" (shaded), "flat" (dark outlines) or "neon" (dark fill, glowing outline).
        unit: pixels per unit of what is drawn, so that outlines keep their width in scaled frames.
    """

    def __init__(self, canvas: skia.Canvas, manner: str = "soft", unit: float = 1.0) -> None:
        self.canvas, self.manner, self.unit = canvas, manner, unit

    @contextmanager
    def at(self, x: float, y: float, angle: float = 0.0, sx: float = 1.0, sy: float | None = None) -> Iterator[None]:
        """Draw in a frame moved to (x, y), turned by `angle` degrees and scaled."""
        self.canvas.save()
        self.canvas.translate(x, y)
        self.canvas.rotate(angle)
        self.canvas.scale(sx, sx if sy is None else sy)
        yield
        self.canvas.restore()

    def fill(
        self, path: skia.Path, colour: RGB | Coat, dim: float = 0.0, alpha: float = 1.0, volume: float = 1.0
    ) -> None:
        """Fill a path.

        Args:
            path: the shape.
            colour: RGB or a coat.
            dim: share of darkness, for parts that lie behind.
            alpha: opacity of the whole.
            volume: strength of the rounding shade; 0 for thin or flat things.
        """
        coat = colour if isinstance(colour, Coat) else Coat(colour)
        if self.manner == "neon":
            self.canvas.drawPath(path, skia.Paint(Color=argb(mix(coat.rgb, INK, 0.9), alpha), AntiAlias=True))
            self.outline(path, mix(coat.rgb, WHITE, 0.15 if max(coat.rgb) > 0.4 else 0.6), 0.02, alpha)
            return
        if self.manner == "flat" and volume > 0:
            self.outline(path, INK, 0.032, alpha)
        paint = skia.Paint(Color=argb(mix(coat.rgb, INK, dim), alpha), AntiAlias=True)
        if coat.shader is not None:
            paint.setShader(coat.shader)
            if dim:
                paint.setColorFilter(skia.ColorFilters.Blend(argb(INK, dim), skia.BlendMode.kSrcATop))
        self.canvas.drawPath(path, paint)
        if self.manner == "soft" and volume > 0:
            self._round(path, volume, alpha)

    def _round(self, path: skia.Path, volume: float, alpha: float) -> None:
        """Light from the picture's upper left, shade at the lower right, whatever the frame's turn."""
        frame = self.canvas.getTotalMatrix()
        a, b, c, d = frame.getScaleX(), frame.getSkewX(), frame.getSkewY(), frame.getScaleY()
        lx, ly = -d + 1.4 * b, c - 1.4 * a  # inverse linear part applied to (-1, -1.4), up to the determinant
        sign = 1.0 if a * d - b * c > 0 else -1.0
        bounds = path.getBounds()
        size = max(bounds.width(), bounds.height())
        reach = sign * 0.26 / (hypot(lx, ly) or 1.0)
        centre = (bounds.centerX() + lx * reach * bounds.width(), bounds.centerY() + ly * reach * bounds.height())
        colours = [
            argb(WHITE, 0.3 * volume * alpha),
            argb(WHITE, 0.0),
            argb(INK, 0.0),
            argb((0.1, 0.04, 0.16), 0.42 * volume * alpha),
        ]
        shader = skia.GradientShader.MakeRadial(centre, size * 0.82, colours, [0.0, 0.42, 0.5, 1.0])
        self.canvas.drawPath(path, skia.Paint(Shader=shader, AntiAlias=True))

    def outline(self, path: skia.Path, colour: RGB, width: float, alpha: float = 1.0) -> None:
        """Stroke a path with round joins; `width` in the subject's units whatever the frame's scale."""
        frame = self.canvas.getTotalMatrix()
        local = hypot(frame.getScaleX(), frame.getSkewY()) / self.unit
        paint = skia.Paint(Color=argb(colour, alpha), AntiAlias=True, Style=skia.Paint.kStroke_Style)
        paint.setStrokeWidth(width / local)
        paint.setStrokeCap(skia.Paint.kRound_Cap)
        paint.setStrokeJoin(skia.Paint.kRound_Join)
        self.canvas.drawPath(path, paint)

    def curve(self, points: Sequence[Point], colour: RGB, width: float) -> None:
        """Stroke a smooth open curve (start, control, end, control, end, ...)."""
        path = skia.Path()
        path.moveTo(*points[0])
        for control, end in zip(points[1::2], points[2::2]):
            path.quadTo(*control, *end)
        self.outline(path, mix(colour, WHITE, 0.7) if self.manner == "neon" else colour, width)
