"""Draw a picture of the world: place, shadow, subject, light, style. Deterministic from its arguments."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import skia

from hiperlab.errors import UserError
from hiperlab.world import car, quadruped, walker
from hiperlab.world.backdrop import Backdrop
from hiperlab.world.chance import Chance
from hiperlab.world.identity import Identity
from hiperlab.world.pen import INK, WHITE, Pen, argb, canvas_on
from hiperlab.world.places import INDOORS, PLACES, flakes
from hiperlab.world.scene import Scene
from hiperlab.world.styles import FILTERS, MANNERS, to_bytes

GROUND = 0.85  # height of the ground line where subjects stand
SUBJECT = 0.6  # picture heights per subject unit
SIZES = (32, 1024)
BODIES = {**dict.fromkeys(quadruped.BUILD, quadruped.draw), **dict.fromkeys(walker.KINDS, walker.draw), "car": car.draw}
LIGHT = {"sunset": (1.0, 0.84, 0.7), "night": (0.54, 0.6, 0.88)}


class Picture(NamedTuple):
    """rgb uint8 (size, size, 3) and the mask of the subject, worn accessories included, bool (size, size)."""

    rgb: np.ndarray
    mask: np.ndarray


class Camera(NamedTuple):
    """Where the subject's origin lands (picture units), its scale, its turn in degrees and whether it faces left."""

    x: float
    y: float
    scale: float
    turn: float
    mirror: bool


def render(who: Identity, now: Scene, size: int, beside: tuple[Identity, Scene] | None = None) -> Picture:
    """Draw a subject in a scene.

    Args:
        who: the subject.
        now: the scene.
        size: side in pixels; 64 to 768 is what the world is made for. A large picture is the small one in more detail.
        beside: a second subject with the scene that says its pose, accessory and camera; the rest is the first one's.

    Raises:
        UserError: the size is out of bounds.
    """
    if not SIZES[0] <= size <= SIZES[1]:
        raise UserError(f"size={size} cannot be drawn: choose {SIZES[0]} to {SIZES[1]} pixels, best 64 to 768.")
    subjects = [(who, now), *([] if beside is None else [(beside[0], replace(beside[1], style=now.style))])]
    cameras = [aim(*subject) for subject in subjects]
    front = np.zeros((size, size, 4), np.uint8)
    for (whom, moment), camera in zip(subjects, cameras):
        _subject(front, whom, moment, camera)
    back = np.zeros((size, size, 4), np.uint8)
    detail = 0.3 if now.style in MANNERS or now.style == "pixel art" else 1.0
    art = Backdrop(canvas_on(back), Chance(now.seed, "place"), now.light, size, detail)
    PLACES[now.place](art)
    for (_, moment), camera in zip(subjects, cameras):
        _ground_marks(art, replace(moment, place=now.place, light=now.light), camera)
    image = skia.Image.fromarray(front, skia.kRGBA_8888_ColorType, skia.kPremul_AlphaType, copy=False)
    art.canvas.drawImageRect(image, skia.Rect(0, 0, 1, 1), skia.SamplingOptions())
    for (_, moment), camera in zip(subjects, cameras):
        if moment.pose == "sleeping":
            _dreams(art, camera)
    if now.place == "snow":
        flakes(art)
    _light(art, now)
    alpha = front[..., 3].astype(np.float32) / 255
    picture = back[..., :3].astype(np.float32) / 255
    rgb = to_bytes(FILTERS[now.style](picture, alpha, Chance(now.seed, "style")))
    return Picture(rgb, front[..., 3] > 127)


def aim(who: Identity, now: Scene) -> Camera:
    """The camera of a scene: usually the whole subject on its ground line, in a close-up the face."""
    scale = SUBJECT * now.zoom
    if not now.close:
        return Camera(
            0.5 + now.x, GROUND + now.y, scale * (0.9 if now.pose == "jumping" else 1.0), now.rotation, now.mirror
        )
    head = BODIES[who.kind](Pen(skia.PictureRecorder().beginRecording(skia.Rect(1, 1))), who, now)
    scale *= 1.65
    return Camera(
        0.5 + 0.4 * now.x - head.x * scale * (-1 if now.mirror else 1),
        0.48 + now.y - head.y * scale,
        scale,
        now.rotation,
        now.mirror,
    )


def _place(canvas: skia.Canvas, camera: Camera) -> None:
    """Move from picture units to the subject's."""
    canvas.translate(camera.x, camera.y)
    canvas.rotate(camera.turn)
    canvas.scale(-camera.scale if camera.mirror else camera.scale, camera.scale)


def _subject(pixels: np.ndarray, who: Identity, now: Scene, camera: Camera) -> None:
    """Draw the subject alone on transparent ground and light it as one body."""
    canvas = canvas_on(pixels)
    canvas.save()
    _place(canvas, camera)
    pen = Pen(canvas, MANNERS.get(now.style, "soft"), unit=camera.scale * pixels.shape[0])
    BODIES[who.kind](pen, who, now)
    canvas.restore()
    if pen.manner == "soft":
        points = [skia.Point(camera.x - 0.3, camera.y - 0.6), skia.Point(camera.x + 0.2, camera.y)]
        shader = skia.GradientShader.MakeLinear(points, [argb(WHITE, 0.1), argb(INK, 0.0), argb(INK, 0.22)])
        canvas.drawRect(skia.Rect(0, 0, 1, 1), skia.Paint(Shader=shader, BlendMode=skia.BlendMode.kSrcATop))


def _ground_marks(art: Backdrop, now: Scene, camera: Camera) -> None:
    """The subject's shadow, and dust and speed lines when it runs."""
    art.canvas.save()
    _place(art.canvas, camera)
    wide, dark = {"jumping": (0.42, 0.4), "sleeping": (0.72, 0.6)}.get(now.pose, (0.56, 0.6))
    if now.light == "night" or now.place == "underwater":
        dark *= 0.7
    art.glow(0.05, 0.0, wide, (0.05, 0.04, 0.12), dark, 0.2)
    if now.pose == "running":
        for x, y, r in ((-0.62, -0.06, 0.12), (-0.78, -0.1, 0.09), (-0.5, -0.03, 0.08)):
            art.glow(x, y, r * 1.5, WHITE, 0.75)
        for y, length in ((-0.72, 0.2), (-0.5, 0.3), (-0.28, 0.22)):
            art.pen.curve([(-0.66 - length, y), (-0.66 - length / 2, y), (-0.66, y)], WHITE, 0.018 * camera.scale)
    art.canvas.restore()


def _dreams(art: Backdrop, camera: Camera) -> None:
    """Two letters Z that rise from a sleeper, upright and unmirrored."""
    side = -1 if camera.mirror else 1
    for dx, dy, r in ((0.44, -0.62, 0.05), (0.56, -0.82, 0.075)):
        x = min(max(camera.x + side * dx * camera.scale, 0.08), 0.92)
        y = max(camera.y + dy * camera.scale, 0.1)
        r *= camera.scale
        z = skia.Path()
        for move, px, py in ((z.moveTo, -r, -r), (z.lineTo, r, -r), (z.lineTo, -r, r), (z.lineTo, r, r)):
            move(x + px, y + py)
        art.pen.outline(z, INK, 0.036 * camera.scale)
        art.pen.outline(z, WHITE, 0.02 * camera.scale)


def _light(art: Backdrop, now: Scene) -> None:
    """Tint the finished picture by its light."""
    if now.light == "day":
        return
    share = 0.75 if now.place in INDOORS else 1.0
    tint = tuple(1 - (1 - c) * share for c in LIGHT[now.light])
    whole = skia.Rect(0, 0, 1, 1)
    art.canvas.drawRect(whole, skia.Paint(Color=argb(tint), BlendMode=skia.BlendMode.kMultiply))  # type: ignore[arg-type]
    if now.light == "sunset":
        points = [skia.Point(0, 0), skia.Point(1, 0.7)]
        shader = skia.GradientShader.MakeLinear(points, [argb((1.0, 0.5, 0.15), 0.4), argb((1.0, 0.5, 0.3), 0.05)])
        art.canvas.drawRect(whole, skia.Paint(Shader=shader, BlendMode=skia.BlendMode.kSoftLight))
