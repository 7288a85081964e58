"""A concept: what one personalisation learns, as plain values that every other room can hold."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from hiperlab.errors import UserError

SLOT = "{}"  # where a template or prompt takes the placeholder

MOST_OF_A_NAME = 120  # characters: endings are put behind it, and file systems hold 255 bytes
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def fill(text: str, word: str) -> str:
    """Put `word` at every slot "{}" of `text`; other braces stay (str.format would break on them)."""
    return text.replace(SLOT, word)


def slotted(text: str, word: str) -> str:
    """The text with the first whole-word occurrence of `word` as the slot; unchanged where the word is not in it."""
    return re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", SLOT, text, count=1)


def check_name(name: object) -> None:
    """Refuse a concept's name that is no plain file name; names come from files, too.

    Raises:
        UserError: it is no text, or has other characters than letters, digits, "_", "-" and ".", or begins with one.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > MOST_OF_A_NAME:
        raise UserError(
            f"concept name {str(name)[:80]!r} cannot be a file name: use letters, digits, '_', '.' and '-', "
            f"the first one a letter or digit, {MOST_OF_A_NAME} at most."
        )


@dataclass(frozen=True)
class EditSettings:
    """How a data set's authors drew an edit by its attention maps; methods of that kind may follow it, none must.

    Attributes:
        mode: "replace" or "refine", Prompt-to-Prompt's two kinds; None where nobody said.
        blend: the word of the source and the word of the target outside whose regions nothing may change.
        equalizer: words of the target and the factors of their maps.
        tau: how long a map or value is taken from the source, a share of the steps in [0, 1], by StyleDiffusion's
            names: "v" values, "c" cross-attention, "s" self-attention, "u" unconditional self-attention.
    """

    mode: str | None = None
    blend: tuple[str, str] | None = None
    equalizer: tuple[tuple[str, float], ...] = ()
    tau: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Edit:
    """What an edit wants of its one picture, in exact texts.

    Attributes:
        source: what the picture shows.
        targets: what its edits should show.
        truths: the true picture of each target where the world knows it, else None; empty where none is known.
        mask: white where an edit may change the picture, black where it must not, grey where nobody is sure; None
            where nobody knows.
        settings: how its authors drew it; None where nobody said.
    """

    source: str
    targets: tuple[str, ...]
    truths: tuple[Image.Image | None, ...] = ()
    mask: Image.Image | None = None
    settings: EditSettings | None = None

    def __post_init__(self) -> None:
        if not self.source.strip() or not self.targets or not all(text.strip() for text in self.targets):
            raise UserError("an edit needs a source text and at least one target text, none of them empty.")
        assert len(self.truths) in (0, len(self.targets)), f"{len(self.truths)} truths, {len(self.targets)} targets"


@dataclass(frozen=True)
class Concept:
    """One thing to personalise.

    Attributes:
        name: used in file names, so letters, digits, "_", "." and "-" only, and it starts with a letter or digit.
        placeholder: the new word, e.g. "<cats>"; no white space, no braces.
        word: the super category or class noun, e.g. "cat".
        views: the reference pictures, RGB, upright (EXIF applied), in their original size.
        sources: one name per view, for messages.
        templates: training prompts, each with "{}".
        prompts: evaluation prompts, each with "{}".
        note: what a reader of the results must know about the pictures, e.g. "drawn placeholder, not a photograph".
        captions: a training prompt of its own for each view, with "{}"; "" for a view without, empty for none at all.
        masks: a file for each view that says where the loss counts, see `read_mask`; None for a view without, empty
            for none at all.
        edit: for an edit: the texts as they stand; its prompts may lack the slot where a target names another noun.
        held_out: further pictures of it that no training sees, for scores; empty where there are none.
        unrelated: texts about other things, without the slot, for scores of what should not have changed.

    Raises:
        UserError: if one of these is not so.
    """

    name: str
    placeholder: str
    word: str
    views: Sequence[Image.Image]
    sources: tuple[str, ...]
    templates: tuple[str, ...]
    prompts: tuple[str, ...]
    note: str = ""
    edit: Edit | None = None
    captions: tuple[str, ...] = ()
    masks: tuple[Path | None, ...] = ()
    held_out: Sequence[Image.Image] = ()
    unrelated: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.name.lower() == "all":
            raise UserError("a concept cannot be called 'all': tables use that name for their totals.")
        if not self.placeholder or re.search(r"[\s{}]", self.placeholder):
            raise UserError(f"placeholder {self.placeholder!r} must be one word without spaces or braces, e.g. <cat>.")
        if not self.word.strip():
            raise UserError(f"concept {self.name} has no class word: name it, e.g. data.word=cat.")
        if not self.views:
            raise UserError(f"concept {self.name} has no picture: give at least one.")
        assert len(self.sources) == len(self.views), f"{len(self.sources)} names for {len(self.views)} views"
        for kind, texts in (("template", self.templates), ("prompt", self.prompts)):
            if not texts:
                raise UserError(f"concept {self.name} has no {kind}: give at least one with '{SLOT}'.")
            for text in texts:
                if SLOT not in text and not (self.edit and kind == "prompt"):
                    raise UserError(f"{kind} {text!r} of concept {self.name} lacks '{SLOT}', the placeholder's slot.")
