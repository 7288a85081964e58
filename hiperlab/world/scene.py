"""Scene: what a prompt controls (pose, place, style, accessory, light), and what is chance (camera, textures)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hiperlab.errors import UserError, near
from hiperlab.world.chance import Chance
from hiperlab.world.vocabulary import ACCESSORIES, COLOURS, LIGHTS, PLACES, POSES, STYLES

VALUES: dict[str, Sequence[str]] = {
    "pose": tuple(POSES),
    "place": tuple(PLACES),
    "style": tuple(STYLES),
    "accessory": tuple(ACCESSORIES),
    "accessory_colour": tuple(COLOURS),
    "light": tuple(LIGHTS),
}


@dataclass(frozen=True)
class Scene:
    """One moment: attributes named by words, camera and textures left to chance.

    Attributes:
        seed: of the textures and of where things stand in the place.
        pose, place, style, accessory, accessory_colour, light: keys of the tables in `words.py`.
        close: a close-up of the face.
        x, y: where the subject stands, in picture widths from the middle and from its usual ground line.
        zoom: factor around 1; rotation: degrees; mirror: whether the subject faces left.
    """

    seed: int
    pose: str
    place: str
    style: str
    accessory: str
    accessory_colour: str
    light: str
    close: bool
    x: float
    y: float
    zoom: float
    rotation: float
    mirror: bool


def scene(seed: int, **fixed: object) -> Scene:
    """The scene with this seed, some attributes fixed: a pure function; fixing one attribute changes no other.

    Args:
        seed: any integer.
        fixed: any field of `Scene` except seed, for example pose="sitting", place="beach".

    Raises:
        UserError: a fixed name or value does not exist.
    """
    for name, value in fixed.items():
        if name in VALUES and value not in VALUES[name]:
            raise UserError(f"{name}={value!r} is not known in the world.{near(str(value), VALUES[name])}")
    chance = Chance(seed, "scene")
    drawn = Scene(
        seed=seed,
        pose=chance.pick(VALUES["pose"]),
        place=chance.pick(VALUES["place"]),
        style=chance.pick(VALUES["style"], (0.4, *[0.6 / 7] * 7)),
        accessory=chance.pick(VALUES["accessory"], (0.46, *[0.09] * 6)),
        accessory_colour=chance.pick(VALUES["accessory_colour"]),
        light=chance.pick(VALUES["light"], (0.72, 0.14, 0.14)),
        close=chance.happens(0.06),
        x=chance.between(-0.05, 0.05),
        y=chance.between(-0.015, 0.02),
        zoom=chance.between(1.0, 1.16),
        rotation=chance.between(-2.0, 2.0),
        mirror=chance.happens(0.2),
    )
    unknown = sorted(set(fixed) - set(drawn.__dataclass_fields__) | (set(fixed) & {"seed"}))
    if unknown:
        raise UserError(f"scene attribute {unknown[0]!r} does not exist.{near(unknown[0], drawn.__dataclass_fields__)}")
    return replace(drawn, **fixed)  # type: ignore[arg-type]  # values were checked above
