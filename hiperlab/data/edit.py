"""Edits: one picture with its source text and target texts, and how concepts and edits become one another.

An edit is a concept whose texts have the class noun replaced by the slot: prompt.replace(placeholder, word) gives the
exact text back. So edit methods read plain texts, and concept methods run on the same data with their placeholder.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypedDict, Unpack

from PIL import Image

from hiperlab.data.concept import SLOT, Concept, Edit, fill, slotted
from hiperlab.data.dataset import DataSet, check_shared, default_placeholder, per_concept
from hiperlab.errors import UserError

log = logging.getLogger(__name__)


def described(word: str) -> str:
    """What a picture of a thing shows where nobody said: "a photo of an elephant"."""
    return f"a photo of {'an' if word[0].lower() in 'aeiou' else 'a'} {word}"


def edit_concept(
    name: str, placeholder: str, word: str, picture: Image.Image, where: str, edit: Edit, note: str = ""
) -> Concept:
    """A concept of one picture.

    Args:
        name: as in `Concept`.
        placeholder: as in `Concept`.
        word: the noun that the source text names.
        picture: the source, RGB.
        where: names the picture in messages.
        edit: the texts.
        note: as in `Concept`.

    Raises:
        UserError: the source text lacks the noun.
    """
    source = slotted(edit.source, word)
    if SLOT not in source:
        raise UserError(
            f"the source text {edit.source!r} lacks the noun {word!r}: name the noun that is in it, data.word=…"
        )
    prompts = tuple(slotted(text, word) for text in edit.targets)
    return Concept(name, placeholder, word, (picture,), (where,), (source,), prompts, note, edit)


class EditDataSettings(TypedDict):
    """The settings that every loader of edits takes and hands on to `edit_set`: a new one is added here.

    Attributes:
        placeholder: the new word of concept methods (None: "<name>"), a list with several edits.
        flip: probability of mirroring; edit methods never mirror.
    """

    placeholder: str | Sequence[str] | None
    flip: float


def edit_set(edits: Sequence[tuple[str, Callable[[str], Concept]]], **settings: Unpack[EditDataSettings]) -> DataSet:
    """The edits, which see their picture as the papers crop it.

    Args:
        edits: names, each with what makes the concept of that name for a placeholder.
        settings: see `EditDataSettings`.

    Raises:
        UserError: two have one name; a list of placeholders of another length.
    """
    check_shared(settings, EditDataSettings)
    given = per_concept(settings["placeholder"], [name for name, _ in edits], "placeholder")
    made = [make(one or default_placeholder(name)) for (name, make), one in zip(edits, given, strict=True)]
    return DataSet(tuple(made), "middle", settings["flip"])


def as_edits(dataset: DataSet) -> DataSet:
    """Every concept as an edit of its first view; edits stay as they are, except for the published crop.

    A concept nobody described is "a photo of a <noun>", and its evaluation prompts are the targets.
    """
    return replace(dataset, concepts=tuple(map(_as_edit, dataset.concepts)), crop="middle", flip=0.0)


def _as_edit(concept: Concept) -> Concept:
    if concept.edit:
        return concept
    if concept.captions or concept.masks:
        log.info("%s: captions and masks beside the pictures are not used by methods that edit.", concept.name)
    # Where the noun follows the placeholder (data.class_noun), the noun in its place would be there twice.
    prompts = tuple(text.replace(f"{SLOT} {concept.word}", SLOT) for text in concept.prompts)
    edit = Edit(described(concept.word), tuple(fill(text, concept.word) for text in prompts))
    return replace(
        concept,
        views=concept.views[:1],
        sources=concept.sources[:1],
        templates=(slotted(edit.source, concept.word),),
        prompts=prompts,
        edit=edit,
        captions=(),
        masks=(),
    )


def at_most(dataset: DataSet, most: int | None) -> DataSet:
    """Only the first `most` targets of every edit (None: all), for methods that pay a fit for each."""
    return replace(dataset, concepts=tuple(_first(concept, most) for concept in dataset.concepts))


def _first(concept: Concept, most: int | None) -> Concept:
    edit = concept.edit
    assert edit, f"{concept.name} is no edit: as_edits comes first"
    kept = replace(edit, targets=edit.targets[:most], truths=edit.truths[:most])
    return replace(concept, prompts=concept.prompts[:most], edit=kept)


def one_per_target(dataset: DataSet) -> DataSet:
    """Every edit as several of one target each, for methods whose fit serves one target only.

    They are called <name>-0, <name>-1, … in the targets' order; so are their placeholders.
    """
    return replace(dataset, concepts=tuple(one for concept in dataset.concepts for one in _split(concept)))


def _split(concept: Concept) -> list[Concept]:
    edit = concept.edit
    assert edit, f"{concept.name} is no edit: as_edits comes first"
    if len(edit.targets) == 1:
        return [concept]
    parts = []
    for number, (target, prompt) in enumerate(zip(edit.targets, concept.prompts, strict=True)):
        truths = edit.truths[number : number + 1]
        ending = ">" if concept.placeholder.endswith(">") else ""
        placeholder = f"{concept.placeholder.removesuffix('>')}-{number}{ending}"
        parts.append(
            replace(
                concept, name=f"{concept.name}-{number}", placeholder=placeholder, prompts=(prompt,),
                edit=replace(edit, targets=(target,), truths=truths),
            )
        )  # fmt: skip
    return parts
