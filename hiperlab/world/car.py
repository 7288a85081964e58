"""The car: side view, driving to the right, eyes behind its windows."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hiperlab.world.face import Head, cheeks, eyes, wear
from hiperlab.world.identity import RGB, Identity
from hiperlab.world.pen import INK, WHITE, Coat, Pen, blob, box, coat_of, limb, mix, oval, polygon
from hiperlab.world.scene import Scene


@dataclass(frozen=True)
class Stance:
    """Turn in degrees about a point on the ground, lift, squash of the body, turn of the wheels."""

    turn: float = 0.0
    about: float = 0.0
    lift: float = 0.0
    wheels: float = 0.0


STANCES = {
    "standing": Stance(),
    "sitting": Stance(turn=-34, about=-0.3),
    "waving": Stance(),
    "jumping": Stance(turn=-12, lift=0.32),
    "running": Stance(turn=5, lift=0.02, wheels=0.05),
    "sleeping": Stance(turn=180, lift=0.0),
}
GLASS: RGB = (0.72, 0.88, 0.95)


def draw(pen: Pen, who: Identity, now: Scene) -> Head:
    """Draw the car in its pose; returns its head (the cabin) for the camera."""
    pose, coat, b = STANCES[now.pose], coat_of(who), who.body
    roof = -0.56 - 0.1 * who.head
    asleep = now.pose == "sleeping"
    head = Head(
        0.02,
        -0.47,
        0.25,
        top=(roof + 0.47) / 0.25 + 0.06,
        width=0.72,
        gap=0.36,
        eye_y=0.0,
        eye_r=0.25,
        neck_y=0.8,
        neck=0.8,
    )
    with pen.at(pose.about, roof if asleep else -pose.lift, pose.turn), pen.at(-pose.about, 0):
        if now.pose == "waving":
            _arm(pen, who)
        _shell(pen, who, coat, roof, b)
        with pen.at(head.x, head.y, 0, head.r):
            eyes(pen, who, head, asleep)
        _wheels(pen, who, b, pose.wheels)
        wear(pen, now, head)
    return replace(head, y=roof + 0.47 if asleep else head.y - pose.lift)


def _shell(pen: Pen, who: Identity, coat: Coat, roof: float, b: float) -> None:
    if who.collar != "none":  # rear spoiler
        pen.fill(
            polygon(
                (-0.5 * b, -0.36),
                (-0.6 * b, -0.36 - 0.15 * who.tail),
                (-0.44 * b, -0.36 - 0.13 * who.tail),
                (-0.42 * b, -0.36),
            ),
            who.second,
        )
    pen.fill(
        blob((-0.46 * b, -0.3), (-0.4 * b, roof - 0.02), (-0.1, roof - 0.02), (0.3 * b, roof - 0.02), (0.42 * b, -0.3)),
        coat,
    )
    pen.fill(
        blob(
            (-0.38 * b, -0.34),
            (-0.33 * b, roof + 0.06),
            (-0.1, roof + 0.05),
            (0.25 * b, roof + 0.06),
            (0.36 * b, -0.34),
        ),
        GLASS,
        volume=0.4,
    )
    body = blob(
        (-0.62 * b, -0.4),
        (-0.2, -0.39),
        (0.3, -0.4),
        (0.64 * b, -0.37),
        (0.66 * b, -0.08),
        (0.2, -0.09),
        (-0.2, -0.09),
        (-0.64 * b, -0.08),
    )
    pen.fill(body, coat)
    if who.socks:
        pen.fill(box(0, -0.17, 0.52 * b, 0.022, 0.02), who.second, volume=0)
    with pen.at(0.1, -0.24, 0, 0.3):
        cheeks(pen, who, 0.5, 0.0, 0.17)
    pen.curve([(-0.06, -0.25), (0.1, -0.17), (0.26, -0.25)], INK, 0.024)
    pen.fill(oval(0.565 * b, -0.27, 0.05 * who.ear, 0.055 * who.ear), (1.0, 0.94, 0.6))
    pen.fill(oval(-0.585 * b, -0.27, 0.03, 0.045), (0.9, 0.2, 0.15), volume=0.5)
    pen.fill(limb((-0.6 * b, -0.1), (0, -0.085), (0.61 * b, -0.1), 0.025, 0.025), mix(who.band, INK, 0.15), volume=0.5)


def _wheels(pen: Pen, who: Identity, b: float, spin: float) -> None:
    r = 0.125 * (0.5 + 0.5 * who.leg)
    for side in (-1, 1):
        x = side * 0.36 * b
        pen.fill(oval(x, -r, r, r), (0.17, 0.17, 0.19))
        pen.fill(oval(x, -r, r * 0.58, r * 0.58), who.band)
        pen.fill(oval(x, -r, r * 0.2, r * 0.2), WHITE, volume=0.4)


def _arm(pen: Pen, who: Identity) -> None:
    pen.fill(limb((0.3, -0.36), (0.52, -0.4), (0.52, -0.66), 0.035, 0.035), mix(who.coat, INK, 0.4), volume=0.6)
    pen.fill(oval(0.52, -0.68, 0.065, 0.07), WHITE)
