"""Which picture has which number, and drawing a shard of them. No torch here: drawing processes start in a blink."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hiperlab import files
from hiperlab.world.caption import PATTERN_SAID, PLAIN, caption, caption_parts, caption_two
from hiperlab.world.chance import Chance
from hiperlab.world.identity import Identity, identity
from hiperlab.world.scene import VALUES, Scene, scene
from hiperlab.world.subjects import HELD_OUT, TRAINED
from hiperlab.world.vocabulary import COLOURS, KINDS, PATTERNS

HEADS: dict[str, tuple[str, ...]] = {
    "kind": KINDS,
    **{name: tuple(VALUES[name]) for name in ("pose", "place", "style", "accessory", "light")},
    "colour": tuple(COLOURS),
    "pattern": PATTERNS,
    "second": ("none", *KINDS),
}
HALF = len(TRAINED) // 2
TRAINING, JUDGING = ("main", "calm", "two"), ("judge", "judge_two")
CALM: dict[str, Any] = {"close": False, "x": 0.0, "y": 0.0, "zoom": 1.12, "rotation": 0.0, "mirror": False}
LEFT, RIGHT = {"x": -0.23, "zoom": 0.76}, {"x": 0.23, "zoom": 0.76}  # cameras of two subjects side by side
UPRIGHT = ("standing", "sitting", "waving")  # poses in which two subjects do not cover one another


class Shot(NamedTuple):
    """What a picture shows: a subject in a scene, and whom it has beside it with what scene, if anybody."""

    who: Identity
    now: Scene
    beside: tuple[Identity, Scene] | None = None


@dataclass(frozen=True)
class Source:
    """A set of pictures that is never listed: picture number -> identity and scene.

    Attributes:
        name: "main" trains the miniature, so do "calm" (one camera, each place laid out alike, every style equally
            often, patterns always said: what a short training learns shapes from) and "two" (two subjects side by
            side); "judge" and "judge_two" train the judges (other subjects), "held" and "pairs" check (held-out
            subjects: random scenes; two plain photos each).
        seed: of the whole training.
        views: pictures of each subject, numbers views*k to views*k + views - 1.
    """

    name: str
    seed: int
    views: int = 1

    def _number(self, purpose: str, high: int) -> int:
        return int(Chance(self.seed, f"train {self.name} {purpose}").between(0, high))

    def identity(self, number: int) -> int:
        """The seed of the subject in a picture. Training, judges' and held-out subjects never overlap."""
        if self.name in TRAINING:
            start = TRAINED.start
        elif self.name in JUDGING:
            start = TRAINED.start + HALF
        else:
            start = HELD_OUT.start + HALF
        return start + self._number("identity", HALF // 2) + number // self.views

    def scene(self, number: int) -> int:
        """The seed of a picture's scene."""
        return self._number("scene", 2**48) + number

    def plain(self, number: int) -> bool:
        """Whether the picture is a plain photo: all of "pairs", every other view of "judge"."""
        return self.name == "pairs" or (self.name == "judge" and number % self.views % 2 == 0)

    def picture(self, number: int) -> Shot:
        """What is drawn."""
        who = identity(self.identity(number))
        if self.name == "calm":
            return self._calm(number, who)
        if self.name in ("two", "judge_two"):
            return self._two(number, who)
        return Shot(who, scene(self.scene(number), **(PLAIN if self.plain(number) else {})))

    def _calm(self, number: int, who: Identity) -> Shot:
        """What words do not say about the scene is always the same; half of the subjects wear nothing."""
        chance = Chance(self.scene(number), "train calm")
        now = scene(self.scene(number), **CALM, style=chance.pick(VALUES["style"]))
        if chance.happens(1 / 2):
            now = replace(now, accessory="none")
        return Shot(who, replace(now, seed=self.seed))

    def _two(self, number: int, who: Identity) -> Shot:
        """Two kinds side by side, nothing worn."""
        chance = Chance(self.scene(number), "train two")
        other = identity(self.identity(number) + HALF // 4, chance.pick([kind for kind in KINDS if kind != who.kind]))
        same = CALM | {"accessory": "none"}
        now = scene(self.scene(number), **same | LEFT | {"pose": chance.pick(UPRIGHT)})
        return Shot(who, now, (other, scene(self.scene(number), **same | RIGHT | {"pose": chance.pick(UPRIGHT)})))


def wording(source: Source, number: int, which: int, shot: Shot) -> str:
    """One of the captions of a picture."""
    rng = Chance(source.scene(number), f"train caption {which}").generator
    said = 1.0 if source.name == "calm" else PATTERN_SAID
    if shot.beside is None:
        return caption(shot.who, shot.now, rng, pattern=said)
    return caption_two(shot.who, shot.beside[0], shot.now, rng, pattern=said)


def named(source: Source, number: int, shot: Shot) -> str:
    """A caption with the subject's name, in whose place the word for its kind stands, as methods write prompts."""
    rng = Chance(source.scene(number), "train name").generator
    kind = shot.who.kind
    noun = str(rng.choice([f"a {kind}", kind, f"a {kind} {kind}"], p=[0.5, 0.2, 0.3]))
    if shot.beside is None:
        return caption_parts(shot.who, shot.now, rng, subject=noun)[0]
    return caption_two(shot.who, shot.beside[0], shot.now, rng, subject=noun)


def truth(shot: Shot) -> dict[str, str]:
    """What a reader should see, attribute -> value, as in `HEADS`."""
    said = {**asdict(shot.who), **asdict(shot.now), "second": "none" if shot.beside is None else shot.beside[0].kind}
    return {head: said[head] for head in HEADS}


@dataclass(frozen=True)
class Shard:
    """The pictures [start, stop) of a source, in two files of one folder.

    Attributes:
        source: whose pictures.
        start, stop: their numbers.
        size: side in pixels.
        wordings: captions of each picture.
        folder: where the files go, `00000.npy` (uint8, (n, size, size, 3)) and `00000.json`.
        index: number of the shard.
    """

    source: Source
    start: int
    stop: int
    size: int
    wordings: int
    folder: Path
    index: int

    @property
    def pictures(self) -> Path:
        """The file of the pixels."""
        return self.folder / f"{self.index:05d}.npy"

    @property
    def labels(self) -> Path:
        """The file of captions and attributes; written last, so a shard that has it is whole."""
        return self.folder / f"{self.index:05d}.json"


def draw(shard: Shard) -> int:
    """Draw a shard unless it is there; returns its number."""
    if shard.labels.is_file() and shard.pictures.is_file():
        return shard.index
    from hiperlab.world.draw import render

    pixels = np.empty((shard.stop - shard.start, shard.size, shard.size, 3), np.uint8)
    labels: dict[str, list[Any]] = {name: [] for name in ("identity", "captions", "named", *HEADS)}
    for row, number in enumerate(range(shard.start, shard.stop)):
        shot = shard.source.picture(number)
        pixels[row] = render(shot.who, shot.now, shard.size, shot.beside).rgb
        for head, value in truth(shot).items():
            labels[head].append(HEADS[head].index(value))
        labels["identity"].append(shard.source.identity(number))
        labels["captions"].append([wording(shard.source, number, i, shot) for i in range(shard.wordings)])
        labels["named"].append(named(shard.source, number, shot))
    files.atomic_write(shard.pictures, lambda file: np.save(file, pixels))
    files.atomic_write(shard.labels, json.dumps(labels))
    return shard.index
