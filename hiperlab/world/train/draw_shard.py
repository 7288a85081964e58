"""Which picture has which number, and drawing a shard of them. No torch here: drawing processes start in a blink."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hiperlab import files
from hiperlab.world.caption import PATTERN_SAID, PLAIN, caption
from hiperlab.world.chance import Chance
from hiperlab.world.identity import Identity, identity
from hiperlab.world.scene import VALUES, Scene, scene
from hiperlab.world.subjects import HELD_OUT, TRAINED
from hiperlab.world.words import KINDS

HEADS: dict[str, tuple[str, ...]] = {
    "kind": KINDS,
    **{name: tuple(VALUES[name]) for name in ("pose", "place", "style", "accessory", "light")},
}
HALF = len(TRAINED) // 2
USUAL: dict[str, Any] = dict.fromkeys(("head", "ear", "tail", "leg", "body"), 1.0)
CALM: dict[str, Any] = {"close": False, "x": 0.0, "y": 0.0, "zoom": 1.12, "rotation": 0.0, "mirror": False}


@dataclass(frozen=True)
class Source:
    """A set of pictures that is never listed: picture number -> identity and scene.

    Attributes:
        name: "main" trains the miniature, so may "calm" (one camera, usual proportions, each place laid out alike,
            every style equally often, patterns always said: what a short training learns shapes from); "judge" trains
            the judges (other subjects), "held" and "pairs" check (held-out subjects: random scenes; two plain photos
            each).
        seed: of the whole training.
        views: pictures of each subject, numbers views*k to views*k + views - 1.
    """

    name: str
    seed: int
    views: int = 1

    def _number(self, purpose: str, high: int) -> int:
        return int(Chance(self.seed, f"train {self.name} {purpose}").between(0, high))

    def identity(self, number: int) -> int:
        """The seed of the subject in a picture. Main (or calm), judge and held-out subjects never overlap."""
        starts = {"main": TRAINED.start, "calm": TRAINED.start, "judge": TRAINED.start + HALF}
        start = starts.get(self.name, HELD_OUT.start + HALF)
        return start + self._number("identity", HALF // 2) + number // self.views

    def scene(self, number: int) -> int:
        """The seed of a picture's scene."""
        return self._number("scene", 2**48) + number

    def plain(self, number: int) -> bool:
        """Whether the picture is a plain photo: all of "pairs", every other view of "judge"."""
        return self.name == "pairs" or (self.name == "judge" and number % self.views % 2 == 0)

    def picture(self, number: int) -> tuple[Identity, Scene]:
        """What is drawn."""
        who = identity(self.identity(number))
        if self.name == "calm":
            return self._calm(number, who)
        return who, scene(self.scene(number), **(PLAIN if self.plain(number) else {}))

    def _calm(self, number: int, who: Identity) -> tuple[Identity, Scene]:
        """Mostly plain coats without accessories; what words do not say is nearly always the same, but for colours."""
        chance = Chance(self.scene(number), "train calm")
        now = scene(self.scene(number), **CALM, style=chance.pick(VALUES["style"]))
        if chance.happens(2 / 3):
            who = replace(who, pattern="plain")
        if chance.happens(1 / 2):
            now = replace(now, accessory="none")
        return replace(who, **USUAL), replace(now, seed=self.seed)


def wording(source: Source, number: int, which: int, who: Identity, now: Scene) -> str:
    """One of the captions of a picture."""
    rng = Chance(source.scene(number), f"train caption {which}").generator
    return caption(who, now, rng, pattern=1.0 if source.name == "calm" else PATTERN_SAID)


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
    labels: dict[str, list[Any]] = {"identity": [], "captions": [], **{head: [] for head in HEADS}}
    for row, number in enumerate(range(shard.start, shard.stop)):
        who, now = shard.source.picture(number)
        pixels[row] = render(who, now, shard.size).rgb
        said = {**asdict(now), "kind": who.kind}
        for head, values in HEADS.items():
            labels[head].append(values.index(said[head]))
        labels["identity"].append(shard.source.identity(number))
        labels["captions"].append([wording(shard.source, number, i, who, now) for i in range(shard.wordings)])
    files.atomic_write(shard.pictures, lambda file: np.save(file, pixels))
    files.atomic_write(shard.labels, json.dumps(labels))
    return shard.index
