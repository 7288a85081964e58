"""Subjects on two legs that face us: bird, robot, teapot, backpack; and the car. Same units as the quadrupeds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from hiperlab.world.face import GOLD, Head, cheeks, eyes, smile, star, wear
from hiperlab.world.identity import RGB, Identity
from hiperlab.world.pen import INK, WHITE, Coat, Pen, Point, blob, box, coat_of, limb, mix, oval, polygon
from hiperlab.world.scene import Scene

Limb = tuple[Point, Point]  # bend and end, relative to the joint, for the right side; the left one is mirrored


@dataclass(frozen=True)
class Stance:
    """Where a pose puts the parts: right then left arm and leg, lift of the body, its turn in degrees."""

    arms: tuple[Limb, Limb]
    legs: tuple[Limb, Limb]
    lift: float = 0.0
    turn: float = 0.0
    legs_first: bool = True


DOWN: Limb = ((0.12, 0.05), (0.13, 0.2))
UP: Limb = ((0.18, -0.02), (0.22, -0.28))
STEP: Limb = ((0.0, 0.1), (0.02, 0.17))
FRONT: Limb = ((0.08, 0.0), (0.16, 0.0))
STANCES = {
    "standing": Stance((DOWN, DOWN), (STEP, STEP)),
    "sitting": Stance((DOWN, DOWN), (FRONT, FRONT), lift=-0.1, legs_first=False),
    "waving": Stance((UP, DOWN), (STEP, STEP), turn=-5),
    "jumping": Stance((UP, UP), (((0.12, 0.02), (0.1, 0.14)), ((0.12, 0.02), (0.1, 0.14))), lift=0.3),
    "running": Stance((((0.16, 0.06), (0.26, -0.06)), ((0.14, 0.1), (0.26, 0.12))),
                      (((0.16, -0.02), (0.22, 0.12)), ((0.08, 0.14), (0.24, 0.06))), lift=0.05, turn=12),
    "sleeping": Stance((((0.1, 0.1), (0.12, 0.2)), ((0.1, 0.02), (0.16, 0.06))), (STEP, STEP), turn=90),
}  # fmt: skip


@dataclass(frozen=True)
class Frame:
    """Joints of a kind: half distance and height of shoulders and hips, and the limbs' colour, width and end."""

    shoulder: Point
    hip: Point
    colour: Coat
    width: float
    foot: RGB
    hand: RGB
    wing: bool = False


Paint = Callable[[Pen, Identity, Coat, Head, bool], None]
Build = tuple[Frame, Head, Paint]


def draw(pen: Pen, who: Identity, now: Scene) -> Head:
    """Draw the subject in its pose; returns its head for the camera."""
    coat, pose = coat_of(who), STANCES[now.pose]
    frame, head, paint = KINDS[who.kind](who)
    lying = now.pose == "sleeping"
    x, y = (-0.42, -0.3 * who.body) if lying else (0.0, -pose.lift)
    with pen.at(x, y, pose.turn):
        if pose.legs_first:
            _legs(pen, who, frame, pose)
        in_front = frame.wing or now.pose == "waving"  # a waving hand must not hide behind a spout
        if not in_front:
            _arms(pen, frame, pose)
        paint(pen, who, coat, head, lying)
        if in_front:
            _arms(pen, frame, pose)
        if not pose.legs_first:
            _legs(pen, who, frame, pose)
        wear(pen, now, head)
    return replace(head, x=x - head.y if lying else head.x, y=-0.3 if lying else head.y - pose.lift)


def _arms(pen: Pen, frame: Frame, pose: Stance) -> None:
    for side, (bend, end) in zip((1, -1), pose.arms):
        with pen.at(side * frame.shoulder[0], frame.shoulder[1], 0, side, 1.0):
            if frame.wing:
                pen.fill(limb((-0.04, 0), bend, (end[0], end[1] * 0.9), 0.09, 0.05), frame.colour)
                continue
            pen.fill(limb((-0.03, 0), bend, end, frame.width, frame.width), frame.colour, volume=0.7)
            pen.fill(oval(*end, frame.width * 1.5, frame.width * 1.5), frame.hand)


def _legs(pen: Pen, who: Identity, frame: Frame, pose: Stance) -> None:
    for side, (bend, end) in zip((1, -1), pose.legs):
        with pen.at(side * frame.hip[0], frame.hip[1], 0, side, 1.0):
            if not pose.legs_first:  # seated: legs towards us, soles up
                pen.fill(limb((0, 0.02), bend, end, frame.width * 1.3, frame.width * 1.3), frame.colour, volume=0.7)
                pen.fill(oval(end[0] + 0.03, end[1] - 0.03, 0.075, 0.1), frame.foot)
                pen.fill(oval(end[0] + 0.03, end[1] - 0.035, 0.045, 0.065), mix(frame.foot, WHITE, 0.45), volume=0)
                continue
            end = (end[0], end[1] * -frame.hip[1] / 0.2)
            pen.fill(limb((0, 0), bend, end, frame.width, frame.width), frame.colour, dim=0.15, volume=0.7)
            pen.fill(oval(end[0] + 0.02, end[1], 0.085, 0.05), frame.foot)


def _bird(who: Identity) -> Build:
    beak: RGB = (0.97, 0.63, 0.14)
    head = Head(0, -0.62, 0.27, top=-0.82, width=0.6, gap=0.42, eye_y=-0.12, eye_r=0.24, neck_y=0.8, neck=0.85)
    frame = Frame((0.27, -0.46), (0.11, -0.2), Coat(mix(who.coat, who.second, 0.55)), 0.032, beak, beak, wing=True)
    return frame, replace(head, r=0.27 * who.head), _paint_bird


def _paint_bird(pen: Pen, who: Identity, coat: Coat, head: Head, closed: bool) -> None:
    beak: RGB = (0.97, 0.63, 0.14)
    b, k = who.body, who.ear
    for a in (-24, 0, 24):  # tail feathers spread to the left
        with pen.at(-0.2 * b, -0.2, a - 62):
            pen.fill(limb((0, 0), (0, -0.1), (0, -0.2 * who.tail), 0.05, 0.035), mix(who.second, INK, 0.1))
    for a in (-22, 0, 22):
        with pen.at(0, head.y - 0.9 * head.r, a):
            pen.fill(limb((0, 0), (0.02, -0.08), (0.04, -0.15 * k), 0.035, 0.022), who.second)
    pen.fill(
        blob(
            (-0.3 * b, -0.98),
            (0.3 * b, -0.98),
            (0.44 * b, -0.4),
            (0.3 * b, -0.08),
            (-0.3 * b, -0.08),
            (-0.44 * b, -0.4),
        ),
        coat,
    )
    pen.fill(oval(0, -0.3, 0.2 * b, 0.17), who.belly, volume=0.5)
    with pen.at(head.x, head.y, 0, head.r):
        eyes(pen, who, head, closed)
        cheeks(pen, who, 0.72, 0.22)
        pen.fill(blob((-0.26, 0.1), (0.26, 0.1), (0.1, 0.2 + 0.4 * k), (-0.1, 0.2 + 0.4 * k)), beak)


def _robot(who: Identity) -> Build:
    metal: RGB = (0.62, 0.65, 0.7)
    head = Head(
        0, -0.72, 0.23 * who.head, top=-0.78, width=0.9, gap=0.46, eye_y=-0.1, eye_r=0.27, neck_y=0.98, neck=0.7
    )
    return Frame((0.25 * who.body, -0.44), (0.12, -0.2), Coat(metal), 0.042, who.second, who.second), head, _paint_robot


def _paint_robot(pen: Pen, who: Identity, coat: Coat, head: Head, closed: bool) -> None:
    metal: RGB = (0.62, 0.65, 0.7)
    b, r = who.body, head.r
    pen.fill(box(0, -0.53, 0.07, 0.06), metal)
    pen.fill(box(0, -0.34, 0.25 * b, 0.19, 0.07), coat)
    pen.fill(box(0, -0.33, 0.14 * b, 0.1, 0.03), who.belly, volume=0.5)
    for i, colour in enumerate((who.band, who.second, who.eye)):
        pen.fill(oval((i - 1) * 0.085 * b, -0.36, 0.028, 0.028), colour, volume=0.6)
    pen.fill(box(0, -0.285, 0.1 * b, 0.014, 0.01), who.band, volume=0)
    top = head.y - 0.9 * r
    pen.fill(limb((0, top + 0.03), (0, top), (0, top - 0.1 * who.tail), 0.017, 0.017), metal)
    pen.fill(oval(0, top - 0.12 * who.tail, 0.045, 0.045), who.band)
    for side in (-1, 1):
        pen.fill(box(side * 1.12 * r, head.y, 0.035 * who.ear, 0.07 * who.ear, 0.02), who.second)
    pen.fill(box(0, head.y, 1.1 * r, 0.84 * r, 0.08), coat)
    with pen.at(head.x, head.y, 0, r):
        pen.fill(box(0, 0.06, 0.86, 0.6, 0.26), mix(who.belly, WHITE, 0.4), volume=0.4)
        eyes(pen, who, head, closed)
        cheeks(pen, who, 0.62, 0.3, 0.15)
        pen.fill(box(0, 0.42, 0.26, 0.055, 0.05), INK, volume=0)


def _teapot(who: Identity) -> Build:
    head = Head(
        0, -0.42, 0.27 * who.body, top=-1.36, width=0.62, gap=0.4, eye_y=-0.12, eye_r=0.22, neck_y=0.72, neck=0.75
    )
    dark = Coat(mix(who.coat, INK, 0.45))
    return Frame((0.24 * who.body, -0.28), (0.12, -0.16), dark, 0.034, who.band, WHITE), head, _paint_teapot


def _paint_teapot(pen: Pen, who: Identity, coat: Coat, head: Head, closed: bool) -> None:
    b, k = who.body, who.tail
    handle = [
        (-0.28 * b, -0.56),
        (-0.42 * b - 0.26 * who.ear, -0.62),
        (-0.3 * b - 0.16 * who.ear, -0.34),
        (-0.36 * b, -0.24),
        (-0.24 * b, -0.26),
    ]
    if pen.manner == "flat":
        pen.curve(handle, INK, 0.105)
    pen.curve(handle, mix(who.second, INK, 0.1), 0.08)
    pen.fill(
        polygon(
            (0.2 * b, -0.2),
            (0.24 * b, -0.46),
            (0.32 * b + 0.14 * k, -0.7),
            (0.36 * b + 0.22 * k, -0.66),
            (0.38 * b, -0.3),
        ),
        coat,
    )
    pen.fill(oval(0.34 * b + 0.18 * k, -0.68, 0.055, 0.03), mix(who.coat, INK, 0.5), volume=0)
    pen.fill(
        blob(
            (-0.3 * b, -0.76),
            (0.3 * b, -0.76),
            (0.46 * b, -0.42),
            (0.3 * b, -0.08),
            (-0.3 * b, -0.08),
            (-0.46 * b, -0.42),
        ),
        coat,
    )
    pen.fill(limb((-0.26 * b, -0.17), (0, -0.09), (0.26 * b, -0.17), 0.02, 0.02), who.band, volume=0.4)
    pen.fill(blob((-0.24, -0.69), (-0.18, -0.84), (0.18, -0.84), (0.24, -0.69), (0.0, -0.64)), who.second)
    pen.fill(oval(0, -0.83, 0.06 * who.head, 0.06 * who.head), who.band)
    with pen.at(head.x, head.y, 0, head.r):
        eyes(pen, who, head, closed)
        cheeks(pen, who, 0.66, 0.24)
        smile(pen, 0, 0.26, 0.22, 0.12)


def _backpack(who: Identity) -> Build:
    head = Head(
        0, -0.56, 0.27 * who.body, top=-0.86, width=0.66, gap=0.4, eye_y=-0.16, eye_r=0.22, neck_y=0.62, neck=0.75
    )
    dark = Coat(mix(who.second, INK, 0.4))
    return (
        Frame((0.27 * who.body, -0.4), (0.13, -0.16), dark, 0.034, mix(who.second, INK, 0.2), who.belly),
        head,
        _paint_backpack,
    )


def _paint_backpack(pen: Pen, who: Identity, coat: Coat, head: Head, closed: bool) -> None:
    b, strap = who.body, mix(who.second, INK, 0.3)
    loop = [
        (-0.1, -0.84),
        (-0.1, -0.84 - 0.16 * who.tail),
        (0.0, -0.84 - 0.16 * who.tail),
        (0.1, -0.84 - 0.16 * who.tail),
        (0.1, -0.84),
    ]
    if pen.manner == "flat":
        pen.curve(loop, INK, 0.07)
    pen.curve(loop, strap, 0.045)
    for side in (-1, 1):
        pen.fill(box(side * 0.31 * b, -0.26, 0.07, 0.13, 0.05), who.second)
    pen.fill(
        blob(
            (-0.32 * b, -0.98),
            (0.32 * b, -0.98),
            (0.36 * b, -0.5),
            (0.36 * b, -0.08),
            (-0.36 * b, -0.08),
            (-0.36 * b, -0.5),
        ),
        coat,
    )
    pen.fill(box(0, -0.22, 0.21 * b, 0.1 * who.ear, 0.05), who.second)
    pen.fill(box(0, -0.27, 0.17 * b, 0.012, 0.01), GOLD, volume=0)
    if who.mark == "star":
        pen.fill(star(0, -0.2, 0.05), who.band, volume=0)
    for side in (-1, 1):
        pen.fill(box(side * 0.2 * b, -0.4, 0.03, 0.07, 0.02), who.band, volume=0.5)
    with pen.at(head.x, head.y, 0, head.r):
        eyes(pen, who, head, closed)
        cheeks(pen, who, 0.66, 0.2)
        smile(pen, 0, 0.2, 0.22, 0.12)


KINDS = {"bird": _bird, "robot": _robot, "teapot": _teapot, "backpack": _backpack}
