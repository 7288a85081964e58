"""Embedded data without a single file: subjects of the procedural world, named ones and any held-out identity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from PIL import Image

from hiperlab.data.concept import SLOT, Concept
from hiperlab.data.dataset import DataSet, Texts, default_placeholder, names_of, per_concept
from hiperlab.errors import UserError
from hiperlab.world.caption import article
from hiperlab.world.identity import Identity, identity
from hiperlab.world.subjects import PROMPTS, SEEDS, TEMPLATES, TRAINED, held_out, subject, views_of

NOTE = "drawn by hiperlab's world, not a photograph"
WORLD = "world"  # data.property: training texts in the world's own grammar
SMALLEST = 64  # pixels; below, a subject cannot be told


def load_named(
    concepts: str | Sequence[str],
    placeholder: str | Sequence[str] | None,
    word: str | Sequence[str] | None,
    property: str,
    prompts: str | Sequence[str] | None,
    class_noun: str,
    max_views: int | None,
    resolution: int,
    center_crop: bool,
    flip: float,
) -> DataSet:
    """Draw views of one or several named subjects; the same pixels every time.

    Args:
        concepts: one or several of `hiperlab.world.subjects.SEEDS`.
        placeholder: the new word (None: "<name>"), a list with several subjects.
        word: class noun, for all or a list (None: each subject's kind).
        property: "world", or "object" or "style" for the templates of the papers.
        prompts: evaluation prompts, see `load_prompts` (None: the world's thirteen).
        class_noun: see `Texts`.
        max_views: how many views (None: five).
        resolution: side of the pictures in pixels.
        center_crop: see `DataSet`.
        flip: see `DataSet`.

    Raises:
        UserError: unknown subject, resolution or number of views.
    """
    found = {name: (subject(name).who, SEEDS[name][0]) for name in names_of(concepts)}
    if len(found) < len(names_of(concepts)):
        raise UserError(f"data.concepts={names_of(concepts)} names a subject twice.")
    return _data_set(
        found, placeholder, word, property, prompts, class_noun, max_views, resolution, center_crop, flip
    )  # fmt: skip


def load_held_out(
    identity_seed: int | Sequence[int],
    kind: str | None,
    placeholder: str | Sequence[str] | None,
    word: str | Sequence[str] | None,
    property: str,
    prompts: str | Sequence[str] | None,
    class_noun: str,
    max_views: int | None,
    resolution: int,
    center_crop: bool,
    flip: float,
) -> DataSet:
    """Draw views of subjects that no shipped network was trained on, one per seed.

    Args:
        identity_seed: one or several of 0 to 2**31 - 1.
        kind: one of `hiperlab.world.vocabulary.KINDS`, or None to let each seed choose.
        placeholder: the new word (None: "<world-17>" or "<world-17-cat>"; the truth scores know the subject by it).
        word: as in `load_named`.
        property: as in `load_named`.
        prompts: as in `load_named`.
        class_noun: as in `load_named`.
        max_views: as in `load_named`.
        resolution: as in `load_named`.
        center_crop: as in `load_named`.
        flip: as in `load_named`.

    Raises:
        UserError: seed out of range, unknown kind, resolution or number of views.
    """
    seeds = [identity_seed] if isinstance(identity_seed, int) else list(identity_seed)
    ending = f"-{kind}" if kind else ""
    found = {f"world-{seed}{ending}": (held_out(seed, kind), seed) for seed in seeds}
    return _data_set(
        found, placeholder, word, property, prompts, class_noun, max_views, resolution, center_crop, flip
    )  # fmt: skip


def _data_set(
    found: dict[str, tuple[Identity, int]],
    placeholder: str | Sequence[str] | None,
    word: str | Sequence[str] | None,
    property: str,
    prompts: str | Sequence[str] | None,
    class_noun: str,
    max_views: int | None,
    resolution: int,
    center_crop: bool,
    flip: float,
) -> DataSet:
    """Concepts of identities with the seeds of their scenes."""
    if resolution < SMALLEST:
        raise UserError(f"data.resolution={resolution} is too small: use {SMALLEST} pixels or more.")
    if max_views is not None and max_views < 1:
        raise UserError(f"data.max_views={max_views} leaves no picture: use 1 or more, or null for five.")
    names = list(found)
    words, placeholders = per_concept(word, names, "word"), per_concept(placeholder, names, "placeholder")
    texts = Texts("object" if property == WORLD else property, PROMPTS if prompts is None else prompts, class_noun)
    made = []
    for (name, (who, seed)), given_word, given in zip(found.items(), words, placeholders, strict=True):
        views = views_of(who, seed, resolution, max_views or 5)
        noun = given_word or who.kind
        sources = [f"{name}, view {number}" for number in range(len(views))]
        concept = texts.concept(name, given or default_placeholder(name), noun, (views, sources), "", NOTE)
        made.append(_in_its_words(concept, property, prompts is None, class_noun))
    return DataSet(tuple(made), center_crop, flip)


def load_domain(
    kind: str,
    subjects: int,
    first: int,
    views_each: int,
    name: str | None,
    placeholder: str | None,
    word: str | None,
    property: str,
    prompts: str | Sequence[str] | None,
    class_noun: str,
    max_views: int | None,
    resolution: int,
    center_crop: bool,
    flip: float,
) -> DataSet:
    """Draw many subjects of one kind as one concept: what E4T pre-trains on.

    Their seeds are of the half that networks may be trained on, so none of them is a subject of the other loaders.

    Args:
        kind: one of `hiperlab.world.vocabulary.KINDS`.
        subjects: how many identities.
        first: the first one's seed, 0 to 2**31 - 1 like the last one's.
        views_each: pictures of each, in different scenes.
        name: of the concept (None: "<kind>-domain").
        placeholder: the new word (None: "<name>").
        word: class noun (None: the kind).
        property: as in `load_named`.
        prompts: as in `load_named`.
        class_noun: as in `load_named`.
        max_views: at most so many pictures in all (None: all).
        resolution: as in `load_named`.
        center_crop: as in `load_named`.
        flip: as in `load_named`.

    Raises:
        UserError: unknown kind, a number out of range.
    """
    if resolution < SMALLEST:
        raise UserError(f"data.resolution={resolution} is too small: use {SMALLEST} pixels or more.")
    if min(subjects, views_each, 1 if max_views is None else max_views) < 1:
        raise UserError(
            f"data.subjects={subjects}, views_each={views_each} and max_views={max_views} leave no picture: use 1 or "
            "more of each."
        )
    seeds = range(first, first + subjects)
    if first not in TRAINED or seeds[-1] not in TRAINED:
        raise UserError(f"data.first={first} with data.subjects={subjects} leaves the range 0 to {len(TRAINED) - 1}.")
    views: list[Image.Image] = []
    sources: list[str] = []
    for seed in seeds[: math.ceil((max_views or subjects * views_each) / views_each)]:
        views += views_of(identity(seed, kind), seed, resolution, views_each)
        sources += [f"{kind} {seed}, view {number}" for number in range(views_each)]
    name, noun = name or f"{kind}-domain", word or kind
    texts = Texts("object" if property == WORLD else property, PROMPTS if prompts is None else prompts, class_noun)
    pictures = (views[:max_views], sources[:max_views])
    concept = texts.concept(name, placeholder or default_placeholder(name), noun, pictures, "", NOTE)
    return DataSet((_in_its_words(concept, property, prompts is None, class_noun),), center_crop, flip)


def _in_its_words(concept: Concept, property: str, own_prompts: bool, class_noun: str) -> Concept:
    """A concept with the world's templates and prompts where they are asked for."""
    if property == WORLD:
        concept = replace(concept, templates=_spoken(TEMPLATES, concept.word, class_noun == "all"))
    if own_prompts:
        concept = replace(concept, prompts=_spoken(PROMPTS, concept.word, class_noun != "none"))
    return concept


def _spoken(texts: Sequence[str], noun: str, named: bool) -> tuple[str, ...]:
    """The world's texts with the noun's own article ("an {}" for an elephant), and with the noun where it is named."""
    slot = f"{SLOT} {noun}" if named else SLOT
    return tuple(text.replace(f"a {SLOT}", f"{article(noun).split()[0]} {slot}") for text in texts)
