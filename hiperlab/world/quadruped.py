"""Animals on four legs: body in side view, face towards us.

Subject units: feet at y = 0 (y down, so up is negative), standing height about 1, facing right.
"""

from __future__ import annotations

from dataclasses import dataclass

from hiperlab.world.face import Head, cheeks, collar, eyes, mark, skin, smile, wear
from hiperlab.world.identity import Identity
from hiperlab.world.pen import INK, PINK, WHITE, Coat, Pen, Point, blob, box, coat_of, limb, mix, oval, polygon
from hiperlab.world.scene import Scene

Leg = tuple[Point, Point, Point]  # hip, knee (control point), foot


@dataclass(frozen=True)
class Stance:
    """Where a pose puts the parts."""

    body: Point
    angle: float  # degrees, negative = chest up
    length: float
    head: Point
    far: tuple[Leg, ...]
    near: tuple[Leg, ...]
    tail: tuple[Point, Point, Point]
    haunch: Point | None = None
    raised: tuple[Leg, ...] = ()  # drawn last, over the head
    tilt: float = 0.0  # of the head


STANCES = {
    "standing": Stance((-0.06, -0.36), -3, 0.33, (0.23, -0.64),
        (((-0.2, -0.28), (-0.2, -0.14), (-0.17, -0.03)), ((0.16, -0.28), (0.18, -0.14), (0.21, -0.03))),
        (((-0.29, -0.3), (-0.34, -0.14), (-0.29, -0.03)), ((0.07, -0.28), (0.08, -0.14), (0.09, -0.03))),
        ((-0.34, -0.44), (-0.56, -0.5), (-0.52, -0.8))),
    "sitting": Stance((-0.06, -0.33), -58, 0.32, (0.07, -0.7),
        (((0.08, -0.34), (0.2, -0.2), (0.19, -0.03)),),
        (((0.02, -0.36), (0.08, -0.2), (0.07, -0.03)), ((-0.12, -0.1), (-0.04, -0.05), (0.0, -0.035))),
        ((-0.28, -0.08), (-0.5, -0.02), (-0.56, -0.22)), haunch=(-0.15, -0.15)),
    "waving": Stance((-0.06, -0.33), -66, 0.32, (0.04, -0.7),
        (((0.08, -0.34), (0.19, -0.2), (0.17, -0.03)),),
        (((-0.12, -0.1), (-0.04, -0.05), (0.02, -0.035)),),
        ((-0.28, -0.08), (-0.5, -0.02), (-0.56, -0.22)), haunch=(-0.15, -0.15),
        raised=(((0.07, -0.4), (0.36, -0.36), (0.42, -0.74)),), tilt=-8),
    "sleeping": Stance((-0.1, -0.19), 2, 0.37, (0.28, -0.24),
        (),
        (((-0.26, -0.1), (-0.2, -0.02), (-0.08, -0.04)), ((0.14, -0.08), (0.3, -0.02), (0.46, -0.045))),
        ((-0.42, -0.12), (-0.64, -0.02), (-0.4, -0.02)), haunch=(-0.27, -0.15), tilt=10),
    "jumping": Stance((-0.05, -0.62), -30, 0.34, (0.25, -0.93),
        (((-0.28, -0.5), (-0.34, -0.34), (-0.5, -0.26)), ((0.14, -0.66), (0.34, -0.68), (0.48, -0.78))),
        (((-0.24, -0.48), (-0.26, -0.3), (-0.4, -0.18)), ((0.12, -0.62), (0.3, -0.58), (0.45, -0.62))),
        ((-0.3, -0.5), (-0.56, -0.5), (-0.64, -0.72)), tilt=-8),
    "running": Stance((-0.05, -0.42), -2, 0.38, (0.31, -0.66),
        (((-0.26, -0.36), (-0.3, -0.2), (-0.14, -0.1)), ((0.18, -0.36), (0.22, -0.2), (0.08, -0.1))),
        (((-0.3, -0.38), (-0.4, -0.26), (-0.58, -0.16)), ((0.16, -0.36), (0.34, -0.26), (0.5, -0.18))),
        ((-0.38, -0.48), (-0.6, -0.62), (-0.8, -0.54)), tilt=4),
}  # fmt: skip

# kind: leg width, body height, head size, tail length, tail width at root and tip
BUILD = {
    "cat": (0.062, 0.19, 0.235, 1.0, 0.045, 0.04),
    "dog": (0.066, 0.2, 0.235, 0.7, 0.05, 0.03),
    "rabbit": (0.06, 0.2, 0.22, 0.0, 0.1, 0.1),
    "bear": (0.092, 0.24, 0.25, 0.0, 0.06, 0.06),
    "elephant": (0.098, 0.25, 0.245, 0.7, 0.022, 0.012),
    "turtle": (0.068, 0.17, 0.19, 0.3, 0.045, 0.01),
}


def draw(pen: Pen, who: Identity, now: Scene) -> Head:
    """Draw the animal in its pose; returns its head for the camera."""
    coat, pose = coat_of(who), STANCES[now.pose]
    width, height, size, *_ = BUILD[who.kind]
    width *= 0.6 + 0.4 * who.leg
    head = Head(*pose.head, size * who.head, pose.tilt, **FACES[who.kind])
    _tail(pen, who, coat, pose)
    for leg in pose.far:
        _leg(pen, who, coat, leg, width, dim=0.28)
    _body(pen, who, coat, pose, height * who.body)
    if pose.haunch:
        with pen.at(*pose.haunch):
            pen.fill(oval(0, 0, 0.17, 0.15), coat)
    for leg in pose.near:
        _leg(pen, who, coat, leg, width)
    collar(pen, who, head)
    with pen.at(head.x, head.y, head.angle, head.r):
        _head(pen, who, coat.scaled(head.r), head, closed=now.pose == "sleeping")
    wear(pen, now, head)
    for leg in pose.raised:
        _leg(pen, who, coat, leg, width * 1.1)
    return head


def _leg(pen: Pen, who: Identity, coat: Coat, leg: Leg, width: float, dim: float = 0.0) -> None:
    hip, knee, foot = leg
    with pen.at(*hip):
        knee, foot = (knee[0] - hip[0], knee[1] - hip[1]), (foot[0] - hip[0], foot[1] - hip[1])
        pen.fill(limb((0, 0), knee, foot, width * 1.2, width * 0.9), coat, dim, volume=0.7)
        if who.kind == "elephant":
            pen.fill(oval(foot[0] + 0.02, foot[1] + 0.005, width * 0.8, 0.025), who.belly, dim, volume=0)
        else:
            pen.fill(
                oval(foot[0] + 0.025, foot[1], width * 1.15, width * 0.72), Coat(who.belly) if who.socks else coat, dim
            )


def _tail(pen: Pen, who: Identity, coat: Coat, pose: Stance) -> None:
    _, _, _, length, root, tip = BUILD[who.kind]
    a, c, b = pose.tail
    if not length:  # a stub
        light = Coat(who.belly) if who.kind == "rabbit" else coat
        pen.fill(oval(a[0] - 0.03, a[1], root * who.tail, root * who.tail), light)
        return
    k = length * who.tail
    with pen.at(*a):
        bend, end = ((c[0] - a[0]) * k, (c[1] - a[1]) * k), ((b[0] - a[0]) * k, (b[1] - a[1]) * k)
        pen.fill(limb((0, 0), bend, end, root, tip), coat, volume=0.6)
        if who.socks and who.kind in ("cat", "dog", "elephant"):
            pen.fill(oval(*end, tip * 1.3 + 0.012, tip * 1.3 + 0.012), who.belly, volume=0.5)


def _body(pen: Pen, who: Identity, coat: Coat, pose: Stance, height: float) -> None:
    length = pose.length
    with pen.at(*pose.body, pose.angle):
        outline = ((-1.12, -1.0), (0.2, -1.15), (1.2, -1.0), (1.2, 0.9), (0.1, 1.2), (-1.12, 1.05))
        pen.fill(blob(*[(x * length, y * height) for x, y in outline]), coat)
        if who.kind == "turtle":
            _shell(pen, who, length, height)
        else:
            pen.fill(oval(0.04, height * 0.62, length * 0.62, height * 0.32), who.belly, alpha=0.9, volume=0)


def _shell(pen: Pen, who: Identity, length: float, height: float) -> None:
    rise = height * (1.5 + 0.6 * who.ear)
    dome = blob(
        (-length * 1.25, height * 0.5), (-length * 1.1, -rise), (length * 0.9, -rise), (length * 1.15, height * 0.5)
    )
    pen.fill(dome, who.band)
    for x, y in ((-0.62, -0.1), (-0.05, -0.3), (0.52, -0.1), (-0.32, 0.22), (0.26, 0.22)):
        with pen.at(x * length, y * rise - height * 0.2, 0, length * 0.24):
            pen.fill(
                polygon((-1, 0), (-0.5, -0.8), (0.5, -0.8), (1, 0), (0.5, 0.8), (-0.5, 0.8)),
                mix(who.band, who.second, 0.65),
                volume=0.5,
            )
    pen.fill(
        limb((-length * 1.02, height * 0.42), (0, height * 0.62), (length * 0.98, height * 0.42), 0.035, 0.035),
        who.belly,
    )


FACES: dict[str, dict[str, float]] = {
    "cat": {"top": -0.74, "width": 0.66},
    "dog": {"top": -0.76, "width": 0.74},
    "rabbit": {"top": -0.72, "width": 0.66},
    "bear": {"top": -0.78, "width": 0.66, "eye_r": 0.19},
    "elephant": {"top": -0.78, "width": 0.74, "eye_r": 0.18, "gap": 0.46},
    "turtle": {"top": -0.76, "width": 0.72, "eye_r": 0.28, "gap": 0.44, "neck": 0.5, "neck_y": 0.95},
}


def _head(pen: Pen, who: Identity, coat: Coat, head: Head, closed: bool) -> None:
    """Ears behind, skull, mark, muzzle, eyes, then whatever hangs in front."""
    ear = who.ear
    if who.kind in EARS:
        EARS[who.kind](pen, who, coat, ear)
    pen.fill(blob((-1.08, -0.98), (1.08, -0.98), (1.16, 0.3), (0.62, 1.0), (-0.62, 1.0), (-1.16, 0.3)), coat)
    mark(pen, who)
    MUZZLES[who.kind](pen, who, coat)
    eyes(pen, who, head, closed)
    cheeks(pen, who, 0.68, 0.32)
    if who.kind == "dog":
        for side in (-1, 1):
            flap = limb((side * 0.72, -0.62), (side * 1.3, -0.7), (side * 1.12, -0.2 + 0.75 * ear), 0.2, 0.3)
            pen.fill(flap, mix(who.second, coat.rgb, 0.25))


def _pointed(pen: Pen, who: Identity, coat: Coat, ear: float) -> None:
    for side in (-1, 1):
        tip = (side * 0.86, -0.8 - 0.75 * ear)
        pen.fill(
            blob(
                (side * 0.05, -0.7), (side * 0.62, -1.2), tip, tip, (side * 1.08, -0.9), (side * 1.0, -0.1), (0, -0.2)
            ),
            coat,
        )
        pen.fill(
            polygon((side * 0.42, -0.78), (side * 0.8, -0.62 - 0.66 * ear), (side * 0.86, -0.45)), skin(coat), volume=0
        )


def _upright(pen: Pen, who: Identity, coat: Coat, ear: float) -> None:
    for side in (-1, 1):
        tip = (side * 0.56, -0.95 - 1.05 * ear)
        pen.fill(limb((side * 0.38, -0.65), (side * 0.36, -1.2), tip, 0.24, 0.25), coat)
        pen.fill(limb((side * 0.38, -0.85), (side * 0.37, -1.2), tip, 0.11, 0.13), skin(coat), volume=0)


def _round(pen: Pen, who: Identity, coat: Coat, ear: float) -> None:
    for side in (-1, 1):
        pen.fill(oval(side * 0.76, -0.72, 0.38 * ear, 0.38 * ear), coat)
        pen.fill(oval(side * 0.74, -0.7, 0.21 * ear, 0.21 * ear), skin(coat), volume=0)


def _fans(pen: Pen, who: Identity, coat: Coat, ear: float) -> None:
    for side in (-1, 1):
        with pen.at(side * (0.75 + 0.42 * ear), -0.12, side * -10):
            pen.fill(oval(0, 0, 0.6 * ear, 0.8 * ear), coat, dim=0.1)
            pen.fill(oval(side * -0.03, 0.03, 0.4 * ear, 0.58 * ear), skin(coat), volume=0)


EARS = {"cat": _pointed, "rabbit": _upright, "bear": _round, "elephant": _fans}


def _cat(pen: Pen, who: Identity, coat: Coat) -> None:
    for side in (-1, 1):
        pen.fill(oval(side * 0.2, 0.42, 0.27, 0.22), who.belly, volume=0)
    pen.fill(blob((-0.2, 0.16), (0.2, 0.16), (0.0, 0.42)), PINK, volume=0.3)
    for side in (-1, 1):
        pen.curve([(0, 0.34), (side * 0.1, 0.58), (side * 0.3, 0.46)], INK, 0.016)
        for k in (-1, 1):
            pen.curve(
                [(side * 0.5, 0.36 + 0.06 * k), (side * 0.9, 0.32 + 0.08 * k), (side * 1.25, 0.34 + 0.2 * k)],
                WHITE,
                0.01,
            )


def _dog(pen: Pen, who: Identity, coat: Coat) -> None:
    pen.fill(oval(0, 0.46, 0.52, 0.42), who.belly, volume=0.6)
    pen.fill(blob((-0.2, 0.5), (0.2, 0.5), (0.22, 1.05), (-0.22, 1.05)), PINK, volume=0.4)
    smile(pen, 0, 0.5, 0.32, 0.1)
    pen.fill(oval(0, 0.24, 0.21, 0.15), INK, volume=0.6)


def _rabbit(pen: Pen, who: Identity, coat: Coat) -> None:
    pen.fill(oval(0, 0.44, 0.4, 0.28), who.belly, volume=0)
    pen.fill(box(0, 0.66, 0.13, 0.13, 0.04), WHITE, volume=0.2)
    smile(pen, 0, 0.46, 0.26, 0.08)
    pen.fill(blob((-0.16, 0.22), (0.16, 0.22), (0.0, 0.42)), PINK, volume=0.3)


def _bear(pen: Pen, who: Identity, coat: Coat) -> None:
    pen.fill(oval(0, 0.42, 0.5, 0.4), who.belly, volume=0.6)
    smile(pen, 0, 0.5, 0.22, 0.1)
    pen.fill(oval(0, 0.24, 0.2, 0.14), INK, volume=0.6)


def _elephant(pen: Pen, who: Identity, coat: Coat) -> None:
    for side in (-1, 1):
        pen.fill(limb((side * 0.42, 0.5), (side * 0.5, 0.8), (side * 0.66, 0.9), 0.12, 0.05), WHITE, volume=0.4)
    k = 0.75 + 0.25 * who.tail
    pen.fill(limb((0, 0.2), (-0.02, 1.25 * k), (0.5, 1.28 * k), 0.3, 0.17), coat)
    for y in (0.45, 0.65):
        pen.curve([(-0.18, y), (0, y + 0.08), (0.18, y)], mix(coat.rgb, INK, 0.45), 0.012)


def _turtle(pen: Pen, who: Identity, coat: Coat) -> None:
    smile(pen, 0, 0.38, 0.42, 0.14)


MUZZLES = {"cat": _cat, "dog": _dog, "rabbit": _rabbit, "bear": _bear, "elephant": _elephant, "turtle": _turtle}
