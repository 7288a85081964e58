"""The value every loader returns, and the steps the loaders share."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

from PIL import Image

from hiperlab.data.captions import captions_beside
from hiperlab.data.concept import Concept
from hiperlab.data.images import Crop, Photographs, read_folder
from hiperlab.data.masks import masks_beside
from hiperlab.data.prompts import load_prompts, unrelated_to, with_class
from hiperlab.data.templates import templates
from hiperlab.errors import UserError, near

log = logging.getLogger(__name__)
CLASS_NOUN = ("none", "prompts", "all")
SIDE_FILES = ("auto", "off")
CROPS: dict[bool | None, Crop | None] = {None: None, False: "squeeze", True: "square"}  # by data.center_crop


@dataclass(frozen=True)
class DataSet:
    """The concepts of a run and how their pictures become pixels.

    Attributes:
        concepts: one or several, with different names and placeholders.
        crop: how a picture that is not square becomes one; None for the method's published way.
        flip: probability in [0, 1] of mirroring a picture; None for the method's published one.

    Raises:
        UserError: if one of these is not so.
    """

    concepts: tuple[Concept, ...]
    crop: Crop | None
    flip: float | None

    def __post_init__(self) -> None:
        if not self.concepts:
            raise UserError("no concept to learn: name at least one, e.g. data.concepts=[cats].")
        # Case is ignored: CLIP's tokenizer lowers all text, and some file systems do not tell Cat from cat.
        _distinct([c.name for c in self.concepts], "name", "data.concepts")
        _distinct([c.placeholder for c in self.concepts], "placeholder", "data.placeholder")
        if self.flip is not None and not 0 <= self.flip <= 1:
            raise UserError(f"data.flip={self.flip} is no probability: use 0 to 1.")


class ConceptSettings(TypedDict):
    """The settings that every loader of concepts takes and hands on to `data_set`: a new one is added here.

    Attributes:
        placeholder: the new word (None: "<name>"), a list with several concepts.
        word: class noun, for all or a list (None: the loader's own).
        property: "object" or "style", chooses the training templates.
        prompts: evaluation prompts, see `load_prompts`, or None for the loader's own choice.
        class_noun: where the class noun follows the placeholder ("a {} cat"): "none"; "prompts" = evaluation prompts,
            as DreamBooth's list is printed; "all" = training templates too.
        captions: "auto" takes captions that lie beside the pictures as training prompts, "off" the templates.
        masks: "auto" lets masks that lie beside the pictures weigh the loss, "off" lets all of a picture count.
        max_views: at most so many pictures per concept, or None.
        held_out: so many pictures per concept are kept out of training, for scores: those behind the ones to train on.
        references: a folder of such pictures instead, a list with several concepts, or None.
        center_crop: True cuts the largest centred square, False squeezes, None is the method's published way.
        flip: see `DataSet`.
    """

    placeholder: str | Sequence[str] | None
    word: str | Sequence[str] | None
    property: str
    prompts: str | Sequence[str] | None
    class_noun: str
    captions: str
    masks: str
    max_views: int | None
    held_out: int
    references: str | Sequence[str] | None
    center_crop: bool | None
    flip: float | None


@dataclass(frozen=True)
class ConceptSource:
    """A concept as its loader found it.

    Attributes:
        name: as in `Concept`.
        word: its class noun where the user gives none.
        read: most pictures (None: all) -> the pictures and what messages call each.
        prompts: its evaluation prompts where the user gives none.
        note: as in `Concept`.
        views: how many pictures it trains on where the user sets no `max_views`; None for all there are.
    """

    name: str
    word: str
    read: Callable[[int | None], tuple[Sequence[Image.Image], Sequence[str]]]
    prompts: str | Sequence[str]
    note: str = ""
    views: int | None = None


def data_set(concepts: Sequence[ConceptSource], **settings: Unpack[ConceptSettings]) -> DataSet:
    """The concepts with their pictures, texts and words.

    Raises:
        UserError: unusable pictures or texts, an unknown choice, a list of another length than the concepts'.
    """
    check_shared(settings, ConceptSettings)
    noun, names = settings["class_noun"], [each.name for each in concepts]
    if noun not in CLASS_NOUN:
        raise UserError(f"data.class_noun={noun!r} is unknown.{near(str(noun), CLASS_NOUN)}")
    for key in ("captions", "masks"):
        if settings[key] not in SIDE_FILES:
            raise UserError(f"data.{key}={settings[key]!r} is unknown.{near(str(settings[key]), SIDE_FILES)}")
    if settings["center_crop"] not in CROPS:
        raise UserError(f"data.center_crop={settings['center_crop']!r} is unknown: use true, false or null.")
    words = per_concept(settings["word"], names, "word")
    placeholders = per_concept(settings["placeholder"], names, "placeholder")
    folders = _reference_folders(settings, names)
    made = []
    for each, word, placeholder, folder in zip(concepts, words, placeholders, folders, strict=True):
        word = word or each.word
        views, sources, held_out = _split(each, settings)
        if folder is not None:
            held_out, _ = read_folder(folder, "stop", None)
        train = templates(settings["property"])
        test = load_prompts(each.prompts if settings["prompts"] is None else settings["prompts"])
        made.append(
            Concept(
                each.name,
                placeholder or default_placeholder(each.name),
                word,
                views,
                tuple(sources),
                with_class(train, word) if noun == "all" else train,
                test if noun == "none" else with_class(test, word),
                each.note,
                captions=_captions(each.name, views, word) if settings["captions"] == "auto" else (),
                masks=_masks(each.name, views) if settings["masks"] == "auto" else (),
                held_out=held_out,
                unrelated=unrelated_to(word),
            )
        )
    return DataSet(tuple(made), CROPS[settings["center_crop"]], settings["flip"])


def _split(
    source: ConceptSource, settings: ConceptSettings
) -> tuple[Sequence[Image.Image], Sequence[str], Sequence[Image.Image]]:
    """A concept's pictures to train on, what messages call each, and those behind them that are held out.

    Raises:
        UserError: `held_out` is no number, or leaves no picture to train on.
    """
    count, most = settings["held_out"], settings["max_views"] or source.views
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise UserError(f"data.held_out={count} is no number of pictures: use 0 for none, or 1 or more.")
    if settings["max_views"] is not None and settings["max_views"] < 1:  # the source's own word for it
        return *source.read(settings["max_views"]), ()
    views, sources = source.read(None if most is None else most + count)
    if len(views) <= count:
        raise UserError(
            f"data.held_out={count} leaves no picture of {source.name} to train on: there are {len(views)}. Hold out "
            f"{len(views) - 1} at most, or name others by data.references=<folder>."
        )
    end = len(views) - count
    return views[:end], sources[:end], views[end:]


def _reference_folders(settings: ConceptSettings, names: Sequence[str]) -> list[Path | None]:
    """The folder of each concept's held-out pictures; None where none is named.

    Raises:
        UserError: no such folder, another number of them than of concepts, or `held_out` beside it.
    """
    given = settings["references"]
    if given is None:
        return [None] * len(names)
    if settings["held_out"]:
        raise UserError(
            f"data.references and data.held_out={settings['held_out']} exclude each other: add data.held_out=0."
        )
    folders = per_concept([given] if isinstance(given, str) else given, names, "references")
    return [
        None if folder is None else folder_of(folder, "data.references=photos/my_cat_held_out") for folder in folders
    ]


def check_shared(settings: Mapping[str, Any], kind: Any) -> None:
    """Refuse a data set whose yaml lacks a shared setting, or has one that nobody reads.

    Args:
        settings: as the loader was given them.
        kind: `ConceptSettings` or the like.

    Raises:
        UserError: naming the settings.
    """
    names = kind.__required_keys__
    if missing := sorted(names - settings.keys()):
        raise UserError(f"the data set's yaml lacks {', '.join(missing)}: every one has {', '.join(sorted(names))}.")
    if extra := sorted(settings.keys() - names):
        raise UserError(f"data.{extra[0]} is no setting of this data set.{near(extra[0], names)}")


def _captions(name: str, views: Sequence[Image.Image], word: str) -> tuple[str, ...]:
    """Captions beside the photographs, said in one line; drawn pictures have none."""
    found = captions_beside(views.paths, word) if isinstance(views, Photographs) else ()
    if count := sum(map(bool, found)):
        log.info(
            "%s: the captions of %d of %d pictures are training prompts (data.captions=off: templates), e.g. %s",
            name, count, len(found), next(filter(None, found)),
        )  # fmt: skip
    return found if count else ()


def _masks(name: str, views: Sequence[Image.Image]) -> tuple[Path | None, ...]:
    """Masks beside the photographs, said in one line."""
    found = masks_beside(views.paths) if isinstance(views, Photographs) else ()
    if count := sum(mask is not None for mask in found):
        log.info(
            "%s: the masks of %d of %d pictures weigh the loss (data.masks=off: all of a picture counts)",
            name, count, len(found),
        )  # fmt: skip
    return found if count else ()


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
    """The existing folder a user named, as data.dir or as what `example` sets.

    Raises:
        UserError: none named, or there is none of that name.
    """
    key = example.partition("=")[0]
    if directory is not None and not isinstance(directory, str):
        raise UserError(
            f"{key}={directory} was read as a number. If that is a folder's name, quote it twice, e.g. "
            f"'{key}=\"2023_10_01\"'."
        )
    if not directory:
        raise UserError(f"{key} is missing: name the folder, e.g. {example}.")
    path = Path(directory).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{key}={directory} is a file: name the folder that holds the pictures.")
    parent = path.parent
    here = [p.name for p in parent.iterdir() if p.is_dir() and not p.name.startswith(".")] if parent.is_dir() else []
    raise UserError(f"{key}={directory} does not exist.{near(path.name, here) if here else ' Check the path.'}")


def _distinct(values: list[str], what: str, key: str) -> None:
    """Refuse a value that two concepts share."""
    twice = [value for value, count in Counter(v.casefold() for v in values).items() if count > 1]
    if twice:
        raise UserError(f"two concepts have the {what} {twice[0]!r}: give each its own ({key}).")
