"""PIE-Bench (Ju et al. 2023, arXiv 2310.01506) as released: 700 pictures, an edit and a mask for each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from PIL import Image

from hiperlab.data.concept import Concept, Edit, EditSettings
from hiperlab.data.dataset import DataSet, file_name, folder_of, names_of
from hiperlab.data.edit import EditDataSettings, edit_concept, edit_set
from hiperlab.data.edit_loaders import last_word, read
from hiperlab.errors import UserError, near

SIDE = 512  # of pictures and masks
KINDS = (
    "random", "change_object", "add_object", "delete_object", "content", "pose", "colour", "material", "background",
    "style",
)  # fmt: skip
ALL = "all"  # of them
EMPHASIS = 2.0  # the benchmark's factor of the edited word's map
_NEEDED = ("image_path", "original_prompt", "editing_prompt", "editing_type_id", "mask")


def load(
    dir: str | None,
    item: str | int | Sequence[str | int] | None,
    kinds: str | int | Sequence[str | int] | None,
    **settings: Unpack[EditDataSettings],
) -> DataSet:
    """Edits of the benchmark, one concept each, called as in its list.

    A concept's word is the blend word of the source where there is one, else the source's last word.

    Args:
        dir: the folder with `mapping_file.json` and `annotation_images/`.
        item: names in the list ("000000000002"), or numbers in its order from 0; one or several.
        kinds: instead of items all edits of some of `KINDS`, by name or number; "all" for the whole benchmark.
        settings: see `EditDataSettings`.

    Raises:
        UserError: the layout is another, there is no such item or kind, or a picture or mask is broken.
    """
    folder = folder_of(dir, "data.dir=PIE-Bench/data")
    rows = _mapping(folder)
    names = _chosen(rows, item, kinds, folder)
    return edit_set([(file_name(name), partial(_concept, folder, name, rows[name])) for name in names], **settings)


def decode_mask(runs: Sequence[int], side: int = SIDE) -> np.ndarray:
    """A run-length mask as the benchmark's evaluation reads it.

    Args:
        runs: start, length, start, length, … of the edited pixels in a row-major square; a run past the end is cut.
        side: of the square.

    Returns:
        uint8 (side, side): 1 where the picture is edited, and on the outermost pixels, which were annotated badly.

    Raises:
        UserError: no such pairs.
    """
    whole = all(isinstance(value, int) and value >= 0 for value in runs)
    if len(runs) % 2 or not whole or any(start >= side * side for start in runs[::2]):
        raise UserError(f"a mask needs pairs of start and length within {side} x {side} pixels.")
    flat = np.zeros(side * side, np.uint8)
    for start, length in zip(runs[::2], runs[1::2], strict=True):
        flat[start : start + length] = 1
    mask = flat.reshape(side, side)
    mask[[0, -1]] = mask[:, [0, -1]] = 1
    return mask


def _concept(folder: Path, name: str, row: Mapping[str, Any], placeholder: str) -> Concept:
    where = f"item {name} of {folder / 'mapping_file.json'}"
    if lacking := [key for key in _NEEDED if key not in row]:
        raise UserError(f"{where} lacks {', '.join(lacking)}: take PIE-Bench's own file.")
    path = folder / "annotation_images" / str(row["image_path"])
    if not path.is_file():
        raise UserError(f"{path}, the picture of {where}, is not there: fetch annotation_images/ as a whole.")
    picture = read(path)
    if picture.size != (SIDE, SIDE):
        raise UserError(
            f"{path} has {picture.width} x {picture.height} pixels, its mask {SIDE} x {SIDE}: "
            "take the picture as released."
        )
    # Brackets only mark what differs between the two texts.
    source, target = (str(row[key]).replace("[", "").replace("]", "") for key in ("original_prompt", "editing_prompt"))
    try:
        mask = Image.fromarray(decode_mask(row["mask"]) * 255)
        edit = Edit(
            source, (target,), mask=mask, settings=_edit_settings(str(row.get("blended_word", "")), source, target)
        )
    except (UserError, TypeError) as error:
        raise UserError(f"{where}: {error}") from None
    word = edit.settings.blend[0] if edit.settings and edit.settings.blend else last_word(source)
    return edit_concept(file_name(name), placeholder, word, picture, path.name, edit)


def _edit_settings(blended: str, source: str, target: str) -> EditSettings | None:
    """The benchmark's Prompt-to-Prompt: always refined, the blend words' regions only, the target's word doubled.

    Words that a text does not hold say nothing; the authors' code passes over them too.
    """
    words = blended.split()
    if len(words) < 2 or words[0] not in source.split(" ") or words[1] not in target.split(" "):
        return EditSettings("refine")
    return EditSettings("refine", (words[0], words[1]), ((words[1], EMPHASIS),))


def _chosen(rows: Mapping[str, Mapping[str, Any]], item: Any, kinds: Any, folder: Path) -> list[str]:
    """Names of the wanted rows, in the list's order where kinds are asked for."""
    if (item is None) == (kinds is None):
        raise UserError(
            f"PIE-Bench has {len(rows)} edits: name some, e.g. data.item=[{next(iter(rows))}], or kinds of them, "
            "e.g. data.kinds=[change_object,style] or data.kinds=all; not both."
        )
    if kinds is None:
        return [_item(rows, each) for each in ([item] if isinstance(item, (str, int)) else item)]
    wanted = {_kind(each) for each in names_of(str(kinds) if isinstance(kinds, int) else kinds)}
    found = [name for name, row in rows.items() if ALL in wanted or str(row.get("editing_type_id")) in wanted]
    if not found:
        raise UserError(f"{folder / 'mapping_file.json'} holds no edit of data.kinds={kinds}.")
    return found


def _item(rows: Mapping[str, Any], item: str | int) -> str:
    """One row's name from its name or number."""
    if str(item) in rows:
        return str(item)
    if str(item).isdigit() and str(int(item)) == str(item) and int(item) < len(rows):  # "00" is a torn name
        return list(rows)[int(item)]
    raise UserError(f"data.item={item} is not in PIE-Bench's list.{near(str(item), rows)}")


def _kind(kind: str) -> str:
    """A kind's number as the list writes it."""
    if kind == ALL or (kind.isdigit() and int(kind) < len(KINDS)):
        return kind
    if kind not in KINDS:
        raise UserError(f"data.kinds names {kind!r}, which is no kind of edit.{near(kind, [*KINDS, ALL])}")
    return str(KINDS.index(kind))


def _mapping(folder: Path) -> dict[str, dict[str, Any]]:
    """The benchmark's list: name -> row."""
    path = folder / "mapping_file.json"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} is not there: data.dir is PIE-Bench's folder with mapping_file.json and annotation_images/."
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}): fetch it again.") from None
    if not isinstance(rows, dict) or not rows or not all(isinstance(row, dict) for row in rows.values()):
        raise UserError(f"{path} is not PIE-Bench's list of named edits: take its own file.")
    return rows
