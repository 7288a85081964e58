"""Styles: how a finished picture is turned into a painting, a sketch, a sign.

Each filter takes the picture (H, W, 3) float32 in [0, 1], the subject's alpha (H, W) in [0, 1] and the scene's chance,
and returns the picture's shape. Lengths are shares of the picture, so that a large picture is the small one in more
detail. Blurs and resizing go through Pillow's integer arithmetic and everything ends in uint8: machines agree to
within rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import skia
from PIL import Image, ImageFilter

from hiperlab.world.chance import Chance
from hiperlab.world.pen import canvas_on

GRAY = np.array([0.3, 0.59, 0.11], np.float32)


def to_bytes(picture: np.ndarray) -> np.ndarray:
    """[0, 1] to uint8, rounded."""
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)


def resized(picture: np.ndarray, size: int, method: Image.Resampling) -> np.ndarray:
    """A picture (H, W[, 3]) in [0, 1] at another size."""
    return np.asarray(Image.fromarray(to_bytes(picture)).resize((size, size), method), np.float32) / 255


def blurred(picture: np.ndarray, radius: float) -> np.ndarray:
    """Gaussian blur with a radius given as share of the picture."""
    pixels = radius * picture.shape[0]
    return np.asarray(Image.fromarray(to_bytes(picture)).filter(ImageFilter.GaussianBlur(pixels)), np.float32) / 255


def boxed(picture: np.ndarray, radius: float) -> np.ndarray:
    """Box blur, a third of the cost of `blurred`."""
    pixels = radius * picture.shape[0]
    return np.asarray(Image.fromarray(to_bytes(picture)).filter(ImageFilter.BoxBlur(pixels)), np.float32) / 255


def noise(chance: Chance, cells: int, size: int) -> np.ndarray:
    """Smooth noise (size, size) in [0, 1] with `cells` cells a side."""
    return resized(chance.array(cells, cells).astype(np.float32), size, Image.Resampling.BICUBIC)


def edges(picture: np.ndarray, width: float = 0.008) -> np.ndarray:
    """Edges (H, W) in [0, 1]: difference across `width` of the picture, greatest over channels and directions."""
    step = max(1, round(width * picture.shape[0]))
    padded = np.pad(picture, ((0, step), (0, step), (0, 0)), mode="edge")
    right, below = padded[:-step, step:], padded[step:, :-step]
    return np.maximum(np.abs(right - picture), np.abs(below - picture)).max(-1)


@lru_cache(maxsize=4)
def grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates x (1, size) and y (size, 1) of the pixel centres in [0, 1]."""
    line = (np.arange(size, dtype=np.float32) + 0.5) / size
    return line[None], line[:, None]


def saturated(picture: np.ndarray, factor: float) -> np.ndarray:
    """Colours moved away from their gray by a factor."""
    gray = (picture @ GRAY)[..., None]
    return gray + (picture - gray) * factor


def photo(picture: np.ndarray, alpha: np.ndarray, chance: Chance) -> np.ndarray:
    """A little depth of field behind the subject and a vignette."""
    x, y = grid(picture.shape[0])
    vignette = 1 - 0.45 * np.maximum((x - 0.5) ** 2 + (y - 0.5) ** 2 - 0.12, 0)
    keep = np.maximum(alpha, np.clip(1 - 7 * np.abs(y - 0.86), 0, 1))[..., None]
    soft = boxed(picture, 0.006)
    return (soft + (picture - soft) * keep) * vignette[..., None]


@lru_cache(maxsize=1)
def brush() -> skia.Image:
    """A brush stroke seen from above: streaks along it, ragged soft ends; white, to be multiplied by a colour."""
    streaks = Chance(7, "brush").array(24)[:, None] * 0.09 + 0.92
    along, across = np.linspace(-1, 1, 48)[None], np.linspace(-1, 1, 24)[:, None]
    body = np.clip((1 - along**4 - across**2 * 0.9) * 3, 0, 1)
    pixels = np.repeat(to_bytes(body)[..., None], 4, -1)
    pixels[..., :3] = to_bytes(body * streaks)[..., None]
    return skia.Image.fromarray(pixels, skia.kRGBA_8888_ColorType, skia.kPremul_AlphaType).withDefaultMipmaps()


def oil(picture: np.ndarray, alpha: np.ndarray, chance: Chance) -> np.ndarray:
    """Painted stroke by stroke: broad ones first, fine ones on the subject, along the edges they find."""
    size = picture.shape[0]
    small = resized(picture, 96, Image.Resampling.BOX)
    inside = resized(alpha.astype(np.float32), 96, Image.Resampling.BOX)
    light = blurred(small, 0.02) @ GRAY
    dy, dx = np.gradient(light)
    angle = np.where(np.hypot(dx, dy) > 0.012, np.arctan2(dx, -dy), 2.2 * noise(chance, 5, 96) - 0.6)
    pixels = np.empty((size, size, 4), np.uint8)
    pixels[..., :3], pixels[..., 3] = to_bytes(blurred(picture, 0.015)), 255
    canvas = canvas_on(pixels)
    for count, length, only_subject in ((400, 0.13, False), (750, 0.075, False), (1500, 0.04, True)):
        spots = chance.array(count, 3)
        column, row = (spots[:, 0] * 96).astype(int), (spots[:, 1] * 96).astype(int)
        if only_subject:
            inner = inside[row, column] > 0.3
            spots, column, row = spots[inner], column[inner], row[inner]
        _strokes(canvas, spots, small[row, column], angle[row, column], length)
    painted = pixels[..., :3].astype(np.float32) / 255
    return painted + (picture - painted) * 0.4 * alpha[..., None]  # the finest brush: faces stay readable


def _strokes(canvas: skia.Canvas, spots: np.ndarray, colours: np.ndarray, angle: np.ndarray, length: float) -> None:
    """Stamp the brush at (x, y) of each spot in its colour, varied by its chance, turned by `angle`."""
    if not len(spots):
        return
    scale = length / 48
    c, s = np.cos(angle) * scale, np.sin(angle) * scale
    x, y = spots[:, 0] - 24 * c + 12 * s, spots[:, 1] - 24 * s - 12 * c
    rgb = to_bytes(saturated(colours * (0.97 + 0.11 * spots[:, 2:]), 1.15)).astype(np.int64)
    packed = (255 << 24) | (rgb[:, 0] << 16) | (rgb[:, 1] << 8) | rgb[:, 2]
    turns = [skia.RSXform(*row) for row in np.stack([c, s, x, y], 1).tolist()]
    whole = [skia.Rect(0, 0, 48, 24)] * len(turns)
    linear = skia.SamplingOptions(skia.FilterMode.kLinear, skia.MipmapMode.kLinear)
    canvas.drawAtlas(brush(), turns, whole, packed.tolist(), skia.BlendMode.kModulate, linear, None, None)


def watercolor(picture: np.ndarray, alpha: np.ndarray, chance: Chance) -> np.ndarray:
    """Thin washes: bleeding colours, darker rims, granulated pigment, paper left white at the border."""
    size = picture.shape[0]
    x, y = grid(size)
    wet = blurred(picture, 0.009)
    wash = saturated((np.round(wet * 7) / 7 + wet) / 2, 1.25)
    pigment = 0.62 + 0.28 * (noise(chance, 6, size) + 0.5 * noise(chance, 48, size) - 0.75)
    rim = np.clip(edges(wet, 0.012) * 2.2 - 0.1, 0, 0.4)
    painted = 1 - (1 - wash) * (pigment + rim)[..., None]
    border = np.minimum(np.minimum(x, 1 - x), np.minimum(y, 1 - y)) + 0.06 * (noise(chance, 14, size) - 0.45)
    wetness = np.clip(border / 0.03, 0, 1)[..., None]
    return 0.975 + (painted - 0.975) * wetness


def pencil(picture: np.ndarray, alpha: np.ndarray, chance: Chance) -> np.ndarray:
    """Contours by colour dodge, two directions of hatching where it is dark, grain of the paper."""
    size = picture.shape[0]
    x, y = grid(size)
    gray = np.clip((picture @ GRAY - 0.5) * 1.1 + 0.55, 0, 1)
    far = blurred(1 - gray, 0.012)
    line = np.clip(gray / np.maximum(1 - far, 0.05), 0, 1) ** 2.5
    contour = 1 - 0.75 * np.clip(edges(picture, 0.008) * 3 - 0.25, 0, 1)
    hatch = np.ones_like(gray)
    wobble = 0.05 * noise(chance, 6, size)
    for turn, depth in ((1.0, 0.62), (-0.8, 0.36)):
        wave = np.sin((x + turn * y + wobble) * 150) * 0.5 + 0.5
        hatch *= 1 - 0.5 * np.clip((depth - gray) * 3, 0, 1) * wave
    paper = 0.95 + 0.05 * noise(chance, 60, size)
    drawn = np.clip(line * contour, 0.12, 1) * (0.72 + 0.28 * gray) * hatch * paper
    return drawn[..., None] * np.array([1.0, 0.99, 0.965], np.float32)


def pixels(picture: np.ndarray, alpha: np.ndarray, chance: Chance) -> np.ndarray:
    """Thirty-two squares a side in few colours."""
    inside = resized(alpha, 32, Image.Resampling.BOX)[..., None]
    few = saturated(resized(picture, 32, Image.Resampling.BOX), 1.25)
    few = np.round(np.clip((few - 0.5) * 1.15 + 0.5, 0, 1) * 6) / 6
    few = few * (1 - 0.75 * np.clip(1 - 4 * np.abs(inside - 0.3), 0, 1))  # a dark rim around the subject
    return resized(few, picture.shape[0], Image.Resampling.NEAREST)


def cartoon(picture: np.ndarray, alpha: np.ndarray, chance: Chance) -> np.ndarray:
    """Flat bright colours; the pen has already outlined the subject, the place gets thin lines."""
    flat = np.round(blurred(picture, 0.006) * 5) / 5
    ink = 1 - 0.7 * np.clip(edges(flat, 0.008) * 2.4 - 0.45, 0, 1)[..., None]
    backdrop = saturated(flat * 0.8 + 0.2, 1.35) * ink
    return backdrop + (saturated(picture, 1.2) - backdrop) * alpha[..., None]


def neon(picture: np.ndarray, alpha: np.ndarray, chance: Chance) -> np.ndarray:
    """Glowing tubes before a dark wall: the pen drew the subject as tubes, the place keeps its brightest edges."""
    base = picture / np.maximum(picture.max(-1, keepdims=True), 0.25)
    tubes = base * np.clip(edges(blurred(picture, 0.006), 0.012) * 3.2 - 0.3, 0, 0.75)[..., None]
    wall = picture * 0.1 + np.array([0.03, 0.02, 0.06], np.float32) + tubes
    sign = wall + (picture - wall) * alpha[..., None]
    glow = blurred(np.clip(sign - 0.25, 0, 1), 0.022) * 1.3 + blurred(np.clip(sign - 0.3, 0, 1), 0.06)
    return 1 - (1 - np.clip(sign, 0, 1)) * (1 - np.clip(glow, 0, 1))


def pop(picture: np.ndarray, alpha: np.ndarray, chance: Chance) -> np.ndarray:
    """Loud flat inks, thick contours and halftone dots that grow with darkness."""
    size = picture.shape[0]
    x, y = grid(size)
    loud = np.clip(saturated((blurred(picture, 0.005) - 0.5) * 1.5 + 0.55, 2.1), 0, 1)
    inks = np.round(loud * 2) / 2
    inks = np.clip(inks * 0.85 + loud * 0.15, 0.06, 1)
    u, v = (x * 0.94 + y * 0.34) * 24, (y * 0.94 - x * 0.34) * 24
    distance = np.hypot(u % 1 - 0.5, v % 1 - 0.5)
    gray = picture @ GRAY
    dots = np.clip((0.5 * np.sqrt(np.clip(0.95 - gray, 0, 1)) - distance) * 8, 0, 1) * (1 - 0.8 * alpha)
    dotted = inks + (inks * 0.45 - inks) * dots[..., None]
    ink = 1 - np.clip(edges(blurred(picture, 0.004), 0.014) * 2.6 - 0.5, 0, 0.95)[..., None]
    return dotted * ink


FILTERS: dict[str, Callable[[np.ndarray, np.ndarray, Chance], np.ndarray]] = {
    "photo": photo,
    "oil painting": oil,
    "watercolor": watercolor,
    "pencil sketch": pencil,
    "pixel art": pixels,
    "cartoon": cartoon,
    "neon sign": neon,
    "pop art": pop,
}
MANNERS = {"cartoon": "flat", "neon sign": "neon", "pop art": "flat"}
