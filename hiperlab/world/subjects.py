"""Embedded data: named subjects with views and prompts, single-picture edits with true targets, held-out identities.

Split rule: identities with seeds 0 to 2**31 - 1 may train the miniature; 2**31 to 2**32 - 1 are held out (`held_out`)
and never trained on; named subjects and edits use seeds from 2**32 on, never trained on either. Scenes need no split:
nothing about a subject is in them.
"""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from hiperlab.errors import UserError, near
from hiperlab.world.caption import article, true_picture
from hiperlab.world.chance import Chance
from hiperlab.world.draw import render
from hiperlab.world.identity import Identity, identity
from hiperlab.world.scene import Scene, scene
from hiperlab.world.vocabulary import KINDS, PLACES, POSES

TRAINED = range(0, 2**31)
HELD_OUT = range(2**31, 2**32)
NAMED = 2**32

TEMPLATES = ("a photo of a {}", "a photograph of a {}", "a {}")  # as the world's captions speak of plain photos
PROMPTS = (
    "a photo of a {}",
    "a photo of a {} on the beach",
    "a photo of a {} jumping in the snow",
    "a photo of a {} sleeping in a living room",
    "a photo of a {} wearing a santa hat in the city at night",
    "a photo of a {} wearing a blue scarf in the desert",
    "an oil painting of a {}",
    "a watercolor painting of a {} in a meadow",
    "a pencil sketch of a {} sitting",
    "a neon sign of a {} waving",
    "a pixel art picture of a {} under water",
    "a cartoon of a {} running wearing a crown in the jungle",
    "a photo of a {} on the moon",
)


@dataclass(frozen=True)
class Subject:
    """A named subject: its identity, the word for it and its placeholder."""

    name: str
    who: Identity

    @property
    def word(self) -> str:
        """The class noun."""
        return self.who.kind

    @property
    def placeholder(self) -> str:
        """The pseudo-word of the personalisation papers."""
        return f"<{self.name}>"


# name: (offset of the seed, kind), chosen by eye for variety of colours and patterns
SEEDS = {
    "cats": (3, "cat"),
    "puppy": (13, "dog"),
    "bunny": (15, "rabbit"),
    "teddy": (7, "bear"),
    "elephant": (10, "elephant"),
    "turtle": (5, "turtle"),
    "chick": (0, "bird"),
    "robot": (8, "robot"),
    "teapot": (1, "teapot"),
    "backpack": (11, "backpack"),
    "racer": (12, "car"),
}


def subject(name: str) -> Subject:
    """A named subject.

    Raises:
        UserError: there is none of this name.
    """
    if name not in SEEDS:
        raise UserError(f"{name!r} is not a subject of the world.{near(name, SEEDS)}")
    offset, kind = SEEDS[name]
    return Subject(name, identity(NAMED + offset, kind))


def views(name: str, size: int, n: int = 5) -> list[Image.Image]:
    """Photos of a named subject in n different scenes (poses and places differ as long as there are enough of them)."""
    return views_of(subject(name).who, SEEDS[subject(name).name][0], size, n)


def views_of(who: Identity, seed: int, size: int, n: int = 5) -> list[Image.Image]:
    """Photos of any subject in n different scenes drawn from a seed: style photo, nothing worn, daylight.

    Args:
        who: the subject.
        seed: of the scenes.
        size: side in pixels.
        n: how many.
    """
    return [Image.fromarray(render(who, now, size).rgb) for now in view_scenes(seed, n)]


def view_scenes(seed: int, n: int = 5) -> list[Scene]:
    """The scenes of `views_of`."""
    chance = Chance(seed, "views")
    poses = [list(POSES)[i] for i in chance.array(len(POSES)).argsort(kind="stable")]
    places = [list(PLACES)[i] for i in chance.array(len(PLACES)).argsort(kind="stable")]
    fixed = {"style": "photo", "accessory": "none", "light": "day", "close": False}
    return [
        scene(NAMED + 1000 * seed + i, pose=poses[i % len(poses)], place=places[i % len(places)], **fixed)
        for i in range(n)
    ]


def held_out(seed: int, kind: str | None = None) -> Identity:
    """An identity the miniature has never seen: seeds 0 to 2**31 - 1 map to the held-out half of the seeds.

    Raises:
        UserError: the seed is out of range.
    """
    if not 0 <= seed < len(HELD_OUT):
        raise UserError(f"identity_seed={seed} is out of range: choose 0 to {len(HELD_OUT) - 1}.")
    return identity(HELD_OUT.start + seed, kind)


@dataclass(frozen=True)
class Edit:
    """A single-picture edit: a source picture with its prompt, and prompts whose true pictures are known.

    A target keeps the subject, the camera and the textures of the source; only what its prompt says otherwise changes.
    """

    name: str
    who: Identity
    seed: int
    source_prompt: str
    target_prompts: tuple[str, ...]

    def picture(self, prompt: str, size: int) -> Image.Image:
        """The true picture for a prompt of this edit."""
        return Image.fromarray(true_picture(self.who, prompt, self.seed, size).rgb)

    def source(self, size: int) -> Image.Image:
        """The picture to be edited."""
        return self.picture(self.source_prompt, size)

    def targets(self, size: int) -> list[Image.Image]:
        """The true picture of every target prompt."""
        return [self.picture(prompt, size) for prompt in self.target_prompts]


# name: (named subject, scene seed, template, source words, target words)
EDITS = {
    "standing_dog": (
        "puppy", 3, "a photo of a dog {} in a meadow", "standing",
        ("sitting", "jumping", "sleeping", "running", "waving"),
    ),
    "travelling_cat": (
        "cats", 4, "a photo of a cat sitting {}", "in a living room",
        ("in the snow", "on the beach", "in the jungle", "on the moon"),
    ),
    "painted_bird": (
        "chick", 5, "{} of a bird standing on the beach", "a photo",
        ("an oil painting", "a watercolor painting", "a pencil sketch", "a cartoon"),
    ),
    "dressed_bear": (
        "teddy", 6, "a photo of a bear sitting in the city{}", "",
        (" wearing a santa hat", " wearing glasses", " wearing a crown", " wearing a blue scarf"),
    ),
    "late_car": (
        "racer", 7, "a photo of a car standing in the desert {}", "in daylight", ("at sunset", "at night"),
    ),
    "coloured_teapot": (
        "teapot", 8, "a photo of a {}teapot standing on a wooden floor", "", ("red ", "green ", "purple ", "yellow "),
    ),
    "changing_rabbit": (
        "bunny", 9, "a photo of a {} running in the snow", "rabbit", ("cat", "dog", "bear", "elephant"),
    ),
    "resting_robot": (
        "robot", 10, "a photo of a robot {} in a studio", "waving",
        ("sitting", "sleeping", "jumping wearing a red hat"),
    ),
}  # fmt: skip


def about_others(kind: str) -> tuple[str, ...]:
    """The prompts, each about another kind of thing than `kind`, in turn; one of the world's vocabulary."""
    others = [each for each in KINDS if each != kind]
    nouns = [article(others[number % len(others)]) for number in range(len(PROMPTS))]
    return tuple(prompt.replace("a {}", noun) for prompt, noun in zip(PROMPTS, nouns, strict=True))


def edit(name: str) -> Edit:
    """A named single-picture edit.

    Raises:
        UserError: there is none of this name.
    """
    if name not in EDITS:
        raise UserError(f"{name!r} is not an edit of the world.{near(name, EDITS)}")
    whom, seed, template, source, targets = EDITS[name]
    prompts = tuple(template.format(words) for words in targets)
    return Edit(name, subject(whom).who, NAMED + seed, template.format(source), prompts)
