"""Embedded data without a single file: subjects of the procedural world, named ones and any held-out identity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Unpack

from PIL import Image

from hiperlab.data.concept import SLOT, Concept
from hiperlab.data.dataset import ConceptSettings, ConceptSource, DataSet, data_set, names_of
from hiperlab.errors import UserError
from hiperlab.world.caption import article
from hiperlab.world.identity import Identity, identity
from hiperlab.world.subjects import PROMPTS, SEEDS, TEMPLATES, TRAINED, about_others, held_out, subject, views_of

NOTE = "drawn by hiperlab's world, not a photograph"
WORLD = "world"  # data.property: training texts in the world's own grammar
Views = tuple[list[Image.Image], list[str]]  # and what messages call each
VIEWS = 5  # that a subject is learnt from, unless the settings say otherwise
SMALLEST = 64  # pixels; below, a subject cannot be told


def load_named(concepts: str | Sequence[str], resolution: int, **settings: Unpack[ConceptSettings]) -> DataSet:
    """Draw views of one or several named subjects; the same pixels every time.

    The class noun is each subject's kind, `property` may be "world" (the world's own templates), the evaluation
    prompts are the world's thirteen, and there are five views, unless the settings say otherwise. Held-out pictures are
    further views of the same subject.

    Args:
        concepts: one or several of `hiperlab.world.subjects.SEEDS`.
        resolution: side of the pictures in pixels.
        settings: see `ConceptSettings`.

    Raises:
        UserError: unknown subject, resolution or number of views.
    """
    found = {name: (subject(name).who, SEEDS[name][0]) for name in names_of(concepts)}
    if len(found) < len(names_of(concepts)):
        raise UserError(f"data.concepts={names_of(concepts)} names a subject twice.")
    return _subjects(found, resolution, settings)


def load_held_out(
    identity_seed: int | Sequence[int], kind: str | None, resolution: int, **settings: Unpack[ConceptSettings]
) -> DataSet:
    """Draw views of subjects that no shipped network was trained on, one per seed.

    They are called "world-17" or "world-17-cat"; the truth scores know a subject by its placeholder.

    Args:
        identity_seed: one or several of 0 to 2**31 - 1.
        kind: one of `hiperlab.world.vocabulary.KINDS`, or None to let each seed choose.
        resolution: side of the pictures in pixels.
        settings: as in `load_named`.

    Raises:
        UserError: seed out of range, unknown kind, resolution or number of views.
    """
    seeds = [identity_seed] if isinstance(identity_seed, int) else list(identity_seed)
    ending = f"-{kind}" if kind else ""
    found = {f"world-{seed}{ending}": (held_out(seed, kind), seed) for seed in seeds}
    return _subjects(found, resolution, settings)


def load_domain(
    kind: str,
    subjects: int,
    first: int,
    views_each: int,
    name: str | None,
    resolution: int,
    **settings: Unpack[ConceptSettings],
) -> DataSet:
    """Draw many subjects of one kind as one concept: what E4T pre-trains on.

    Their seeds are of the half that networks may be trained on, so none of them is a subject of the other loaders.

    Args:
        kind: one of `hiperlab.world.vocabulary.KINDS`.
        subjects: how many identities.
        first: the first one's seed, 0 to 2**31 - 1 like the last one's.
        views_each: pictures of each, in different scenes.
        name: of the concept (None: "<kind>-domain").
        resolution: side of the pictures in pixels.
        settings: as in `load_named`.

    Raises:
        UserError: unknown kind, a number out of range.
    """
    most = settings["max_views"]
    if min(subjects, views_each, 1 if most is None else most) < 1:
        raise UserError(
            f"data.subjects={subjects}, views_each={views_each} and max_views={most} leave no picture: use 1 or "
            "more of each."
        )
    seeds = range(first, first + subjects)
    if first not in TRAINED or seeds[-1] not in TRAINED:
        raise UserError(f"data.first={first} with data.subjects={subjects} leaves the range 0 to {len(TRAINED) - 1}.")

    def read(most: int | None) -> Views:
        views: list[Image.Image] = []
        sources: list[str] = []
        for seed in seeds[: math.ceil((most or subjects * views_each) / views_each)]:
            views += views_of(identity(seed, kind), seed, resolution, views_each)
            sources += [f"{kind} {seed}, view {number}" for number in range(views_each)]
        return views[:most], sources[:most]

    made = _drawn([ConceptSource(name or f"{kind}-domain", kind, read, PROMPTS, NOTE)], resolution, settings)
    return replace(made, concepts=tuple(replace(each, unrelated=about_others(kind)) for each in made.concepts))


def _subjects(found: Mapping[str, tuple[Identity, int]], resolution: int, settings: ConceptSettings) -> DataSet:
    """Concepts of identities with the seeds of their scenes."""
    if (most := settings["max_views"]) is not None and most < 1:
        raise UserError(f"data.max_views={most} leaves no picture: use 1 or more, or null for five.")

    def read(name: str, most: int | None) -> Views:
        views = views_of(*found[name], resolution, most or VIEWS)
        return views, [f"{name}, view {number}" for number in range(len(views))]

    concepts = [
        ConceptSource(name, who.kind, partial(read, name), PROMPTS, NOTE, VIEWS) for name, (who, _) in found.items()
    ]
    made = _drawn(concepts, resolution, settings)
    others = [about_others(who.kind) for who, _ in found.values()]
    pairs = zip(made.concepts, others, strict=True)
    return replace(made, concepts=tuple(replace(concept, unrelated=texts) for concept, texts in pairs))


def _drawn(concepts: Sequence[ConceptSource], resolution: int, settings: ConceptSettings) -> DataSet:
    """Concepts of drawn pictures, with the world's templates and prompts where they are asked for."""
    if resolution < SMALLEST:
        raise UserError(f"data.resolution={resolution} is too small: use {SMALLEST} pixels or more.")
    own_templates = settings["property"] == WORLD
    plain: ConceptSettings = {**settings, "property": "object"} if own_templates else settings
    made = data_set(concepts, **plain)
    return replace(made, concepts=tuple(_in_its_words(each, settings) for each in made.concepts))


def _in_its_words(concept: Concept, settings: ConceptSettings) -> Concept:
    """A concept with the world's templates and prompts, in the grammar of its noun, where they are asked for."""
    class_noun = settings["class_noun"]
    if settings["property"] == WORLD:
        concept = replace(concept, templates=_spoken(TEMPLATES, concept.word, class_noun == "all"))
    if settings["prompts"] is None:
        concept = replace(concept, prompts=_spoken(PROMPTS, concept.word, class_noun != "none"))
    return concept


def _spoken(texts: Sequence[str], noun: str, named: bool) -> tuple[str, ...]:
    """The world's texts with the noun's own article ("an {}" for an elephant), and with the noun where it is named."""
    slot = f"{SLOT} {noun}" if named else SLOT
    return tuple(text.replace(f"a {SLOT}", f"{article(noun).split()[0]} {slot}") for text in texts)
