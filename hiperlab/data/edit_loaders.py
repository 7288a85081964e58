"""Where edits come from: one's own picture, TEdBench's released folder, the world."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Unpack

import numpy as np
from PIL import Image, ImageFilter

from hiperlab import files
from hiperlab.data.concept import Concept, Edit
from hiperlab.data.dataset import DataSet, file_name, folder_of, names_of
from hiperlab.data.edit import EditDataSettings, edit_concept, edit_set
from hiperlab.data.images import ImageProblem, read_image
from hiperlab.data.masks import read_mask
from hiperlab.errors import UserError, near
from hiperlab.world.caption import true_picture
from hiperlab.world.subjects import EDITS
from hiperlab.world.subjects import Edit as WorldEdit
from hiperlab.world.subjects import edit as world_edit

WORLD_NOTE = "drawn by hiperlab's world, not a photograph"
UNCHANGED = 5.0  # grey levels (of 255) that the world may differ by outside the mask: shadows, speed lines


def load(
    image: str | None,
    source: str | None,
    targets: str | Sequence[str] | None,
    word: str | None,
    name: str | None,
    mask: str | None,
    **settings: Unpack[EditDataSettings],
) -> DataSet:
    """One picture of one's own.

    Args:
        image: the picture.
        source: what it shows, in plain words: "a standing dog".
        targets: what its edits should show, one text or several.
        word: the noun in the source text that concept methods replace (None: its last word).
        name: the edit's name (None: the picture's).
        mask: a picture of the same shape, white where edits may change it (None: nobody knows).
        settings: see `EditDataSettings`.

    Raises:
        UserError: something is missing or unreadable.
    """
    if not image:
        raise UserError("data.image is missing: name the picture to edit, e.g. data.image=photos/dog.jpg.")
    if not source or not targets:
        raise UserError(
            "an edit needs data.source='a standing dog' (what the picture shows) and data.targets=['a sitting dog']."
        )
    path = Path(image).expanduser()
    called = name or file_name(path.stem)
    noun, picture = word or last_word(source), read(path)
    edit = Edit(source, tuple(names_of(targets)), mask=read_mask(files.expand(mask), picture.size) if mask else None)
    return edit_set([(called, lambda given: edit_concept(called, given, noun, picture, path.name, edit))], **settings)


def load_tedbench(
    dir: str | None,
    item: str | int | None,
    source: str | None,
    word: str | None,
    targets: str | Sequence[str] | None,
    **settings: Unpack[EditDataSettings],
) -> DataSet:
    """One picture of TEdBench as released: `input_list.json` and `originals/`, with its own target texts.

    Args:
        dir: the folder.
        item: a picture's file name, its stem, or its number in the order of the list, from 0.
        source: what the picture shows; the benchmark has no source texts.
        word: as in `load`.
        targets: other texts than the benchmark's (None: all of the picture's).
        settings: as in `load`.

    Raises:
        UserError: the layout is another, or there is no such item.
    """
    folder = folder_of(dir, "data.dir=tedbench")
    wanted = _tedbench_list(folder)
    names = list(wanted)
    stems = {Path(each).stem: each for each in names}
    if item is None:
        raise UserError(f"data.item is missing: name one of {len(names)} pictures, e.g. data.item={names[0]}.")
    if isinstance(item, int) or str(item).isdigit():
        if not 0 <= int(item) < len(names):
            raise UserError(f"data.item={item} is out of range: 0 to {len(names) - 1}.")
        chosen = names[int(item)]
    else:
        chosen = item if item in wanted else stems.get(item, "")
    if not chosen:
        raise UserError(f"data.item={item} is not in {folder / 'input_list.json'}.{near(str(item), [*names, *stems])}")
    if not source:
        raise UserError(
            f"TEdBench has no source texts: say what {chosen} shows, e.g. data.source='a photo of a standing dog'. "
            f"Its targets: {'; '.join(wanted[chosen])}"
        )
    texts = tuple(names_of(targets)) if targets else tuple(wanted[chosen])
    called = file_name(Path(chosen).stem)
    picture = read(folder / "originals" / chosen)
    noun, edit = word or last_word(source), Edit(source, texts)
    return edit_set([(called, lambda given: edit_concept(called, given, noun, picture, chosen, edit))], **settings)


def load_world(edits: str | Sequence[str], resolution: int, **settings: Unpack[EditDataSettings]) -> DataSet:
    """Edits of the world, whose true results are known.

    Args:
        edits: one or several of `hiperlab.world.subjects.EDITS`.
        resolution: side of the pictures in pixels.
        settings: as in `load`.

    Raises:
        UserError: there is no such edit.
    """
    names = names_of(edits)
    if unknown := [name for name in names if name not in EDITS]:
        raise UserError(f"data.edits names {unknown[0]!r}, which is no edit of the world.{near(unknown[0], EDITS)}")
    return edit_set([(name, partial(_world, name, resolution)) for name in names], **settings)


def _world(name: str, size: int, placeholder: str) -> Concept:
    one = world_edit(name)
    truths = tuple(one.targets(size))
    edit = Edit(one.source_prompt, one.target_prompts, truths, world_mask(one, size))
    return edit_concept(name, placeholder, one.who.kind, one.source(size), name, edit, WORLD_NOTE)


def world_mask(one: WorldEdit, size: int) -> Image.Image | None:
    """Where the edits of one picture may change it: the subject before and after, a little widened.

    None where the truth changes elsewhere too (another place, style or light): then nothing must stay.
    """
    drawn = [true_picture(one.who, text, one.seed, size) for text in (one.source_prompt, *one.target_prompts)]
    union = Image.fromarray(np.max([picture.mask for picture in drawn], axis=0).astype(np.uint8) * 255)
    reach = 2 * (size // 32) + 1
    wide = union.filter(ImageFilter.MaxFilter(reach))
    outside = np.asarray(wide) == 0
    pictures = [picture.rgb.astype(float) for picture in drawn]
    changed = max(float(np.abs(picture - pictures[0])[outside].mean()) for picture in pictures[1:])
    return wide if changed <= UNCHANGED else None


def last_word(text: str) -> str:
    """The noun most source texts end with: "A photo of a standing dog." -> "dog"."""
    words = text.strip().rstrip(".!?,; ").split()
    return words[-1] if words else ""


def read(path: Path) -> Image.Image:
    """One picture, or one line that says why not."""
    if not path.exists():
        raise UserError(f"{path} does not exist: name the picture to edit.")
    try:
        return read_image(path)
    except ImageProblem as problem:
        raise UserError(f"{path}: {problem}.") from None


def _tedbench_list(folder: Path) -> dict[str, list[str]]:
    """Picture -> its target texts, in the list's order."""
    path = folder / "input_list.json"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        found: dict[str, list[str]] = {}
        for row in rows:
            found.setdefault(str(row["img_name"]), []).append(str(row["target_text"]))
    except FileNotFoundError:
        raise UserError(f"{path} is not there: data.dir is TEdBench's folder with input_list.json.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not TEdBench's list of img_name and target_text ({error}).") from None
    if not found:
        raise UserError(f"{path} is empty.")
    return found
