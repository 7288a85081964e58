"""Embedded data without a single file: subjects of the procedural world, named ones and any held-out identity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hiperlab.data.concept import SLOT
from hiperlab.data.dataset import DataSet, Texts, default_placeholder, names_of, per_concept
from hiperlab.errors import UserError
from hiperlab.world.caption import article
from hiperlab.world.identity import Identity
from hiperlab.world.subjects import PROMPTS, SEEDS, TEMPLATES, held_out, subject, views_of

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
        kind: one of `hiperlab.world.words.KINDS`, or None to let each seed choose.
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
        if property == WORLD:
            concept = replace(concept, templates=_spoken(TEMPLATES, noun, class_noun == "all"))
        if prompts is None:
            concept = replace(concept, prompts=_spoken(PROMPTS, noun, class_noun != "none"))
        made.append(concept)
    return DataSet(tuple(made), center_crop, flip)


def _spoken(texts: Sequence[str], noun: str, named: bool) -> tuple[str, ...]:
    """The world's texts with the noun's own article ("an {}" for an elephant), and with the noun where it is named."""
    slot = f"{SLOT} {noun}" if named else SLOT
    return tuple(text.replace(f"a {SLOT}", f"{article(noun).split()[0]} {slot}") for text in texts)
