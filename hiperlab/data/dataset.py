"""The value every loader returns, and the steps the loaders share."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from hiperlab.data.concept import Concept
from hiperlab.data.prompts import load_prompts, with_class
from hiperlab.data.templates import templates
from hiperlab.errors import UserError, near

CLASS_NOUN = ("none", "prompts", "all")


@dataclass(frozen=True)
class DataSet:
    """The concepts of a run and how their pictures become pixels.

    Attributes:
        concepts: one or several, with different names and placeholders.
        center_crop: cut the largest centred square before resizing (else pictures are squeezed).
        flip: probability in [0, 1] of mirroring a picture.
        short_side: resize the short side, then cut the middle (HiPer, Imagic), whatever `center_crop` says.

    Raises:
        UserError: if one of these is not so.
    """

    concepts: tuple[Concept, ...]
    center_crop: bool
    flip: float
    short_side: bool = False

    def __post_init__(self) -> None:
        if not self.concepts:
            raise UserError("no concept to learn: name at least one, e.g. data.concepts=[cats].")
        # Case is ignored: CLIP's tokenizer lowers all text, and some file systems do not tell Cat from cat.
        _distinct([c.name for c in self.concepts], "name", "data.concepts")
        _distinct([c.placeholder for c in self.concepts], "placeholder", "data.placeholder")
        if not 0 <= self.flip <= 1:
            raise UserError(f"data.flip={self.flip} is no probability: use 0 to 1.")


@dataclass(frozen=True)
class Texts:
    """The word settings that all loaders take.

    Attributes:
        property: "object" or "style", chooses the training templates.
        prompts: evaluation prompts (a list's name, a file, the prompts), or None for the loader's own choice.
        class_noun: where the class noun follows the placeholder ("a {} cat"): "none"; "prompts" = evaluation prompts,
            as DreamBooth's list is printed; "all" = training templates too.
    """

    property: str
    prompts: str | Sequence[str] | None
    class_noun: str

    def concept(
        self,
        name: str,
        placeholder: str,
        word: str,
        pictures: tuple[Sequence[Image.Image], Sequence[str]],
        default_prompts: str,
        note: str = "",
    ) -> Concept:
        """A concept of these pictures (views, sources) with its templates and prompts."""
        if self.class_noun not in CLASS_NOUN:
            raise UserError(f"data.class_noun={self.class_noun!r} is unknown.{near(str(self.class_noun), CLASS_NOUN)}")
        train = templates(self.property)
        test = load_prompts(default_prompts if self.prompts is None else self.prompts)
        if self.class_noun == "all":
            train = with_class(train, word)
        if self.class_noun != "none":
            test = with_class(test, word)
        views, sources = pictures
        return Concept(name, placeholder, word, tuple(views), tuple(sources), train, test, note)


def per_concept(value: str | Sequence[str] | None, names: Sequence[str], key: str) -> list[str | None]:
    """One value per concept from a setting that may be null, one word for all, or a list in the concepts' order.

    Raises:
        UserError: a list of another length.
    """
    if value is None or isinstance(value, str):
        return [value] * len(names)
    if len(value) != len(names):
        raise UserError(
            f"data.{key} has {len(value)} entries for {len(names)} concepts ({', '.join(names)}): give one each."
        )
    return list(value)


def names_of(value: str | Sequence[str]) -> list[str]:
    """`data.concepts=cat` and `data.concepts=[cat,dog]` both as a list."""
    return [value] if isinstance(value, str) else [str(name) for name in value]


def default_placeholder(name: str) -> str:
    """The placeholder of a concept nobody named: "<cat2>"; lower case, as CLIP's tokenizer lowers all text."""
    return f"<{name.lower()}>"


def file_name(text: str) -> str:
    """A concept name made from a folder's name: "My cat" -> "My-cat"."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-._") or "concept"


def folder_of(directory: str | None, example: str) -> Path:
    """The existing folder a user named as data.dir.

    Raises:
        UserError: none named, or there is none of that name.
    """
    if not directory:
        raise UserError(f"data.dir is missing: name the folder, e.g. {example}.")
    path = Path(directory).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"data.dir={directory} is a file: name the folder that holds the pictures.")
    parent = path.parent
    here = [p.name for p in parent.iterdir() if p.is_dir() and not p.name.startswith(".")] if parent.is_dir() else []
    raise UserError(f"data.dir={directory} does not exist.{near(path.name, here) if here else ' Check the path.'}")


def _distinct(values: list[str], what: str, key: str) -> None:
    """Refuse a value that two concepts share."""
    twice = [value for value, count in Counter(v.casefold() for v in values).items() if count > 1]
    if twice:
        raise UserError(f"two concepts have the {what} {twice[0]!r}: give each its own ({key}).")
