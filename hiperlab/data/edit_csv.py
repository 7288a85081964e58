"""The edits of StyleDiffusion's authors: their CSV files, one edit and its settings a row.

Columns as in `data/stylediffusion_editing.csv` of their repository: case_number, prompt, image_path, url, target,
blend_word "[('cat',),('tiger',)]", eq_params "[('tiger',),(2,)]", tau_v tau_c tau_s tau_u "[.5,]", edit_type
"Replacement" or "Refinement". Only prompt, image_path and target must be there; other columns and empty cells are
passed over.
"""

from __future__ import annotations

import ast
import csv
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from hiperlab.data.concept import Concept, Edit, EditSettings
from hiperlab.data.dataset import DataSet, file_name, folder_of
from hiperlab.data.edit import EditDataSettings, edit_concept, edit_set
from hiperlab.data.edit_loaders import last_word, read
from hiperlab.data.masks import read_mask
from hiperlab.errors import UserError, near

MODES = {"Replacement": "replace", "Refinement": "refine"}
TAUS = ("v", "c", "s", "u")
_NEEDED = ("prompt", "image_path", "target")
_EMPTY = ("", "nan", "none")

Row = Mapping[str, str]


def load(
    file: str | None,
    dir: str | None,
    item: str | int | Sequence[str | int] | None,
    masks: str | None,
    **settings: Unpack[EditDataSettings],
) -> DataSet:
    """Edits of a CSV file, one concept a row, called <case number>-<picture>.

    A concept's word is the blend word of the source where there is one, else the prompt's last word.

    Args:
        file: the CSV file.
        dir: what its picture paths start from, or the folder that holds the pictures (None: the CSV's own folder).
        item: case numbers to take, one or several (None: all).
        masks: a folder of the authors' foreground masks, "<case number> <prompt>.png", white where the edited thing
            is (None: no masks).
        settings: see `EditDataSettings`.

    Raises:
        UserError: a file is missing, lacks a column, or a cell cannot be read.
    """
    if not file:
        raise UserError(
            "data.file is missing: name the CSV, e.g. data.file=StyleDiffusion/data/stylediffusion_editing.csv."
        )
    path = Path(file).expanduser()
    folder = folder_of(dir, "data.dir=StyleDiffusion") if dir else path.parent
    rows = _chosen(_rows(path), item, path)
    shapes = folder_of(masks, "data.masks=fgmask") if masks else None
    edits = []
    for case, row in rows.items():
        where = f"row {case} of {path.name}"
        picture = _picture(folder, row["image_path"], where)
        mask = shapes and shapes / f"{case} {row['prompt']}.png"
        name = file_name(f"{case}-{picture.stem}")
        edits.append((name, partial(_concept, name, row, picture, mask, where)))
    return edit_set(edits, **settings)


def _concept(name: str, row: Row, picture: Path, mask: Path | None, where: str, placeholder: str) -> Concept:
    source, target = row["prompt"], row["target"]
    settings = _edit_settings(row, where)
    word = settings.blend[0] if settings.blend else last_word(source)
    view = read(picture)
    shape = read_mask(mask, None, keep_grey=True) if mask else None
    edit = Edit(source, (target,), mask=shape, settings=settings)
    return edit_concept(name, placeholder, word, view, picture.name, edit)


def _picture(folder: Path, written: str, where: str) -> Path:
    """Where a row's picture lies: its path from the folder, else its name in it."""
    candidates = (folder / written, folder / Path(written).name)
    for path in candidates:
        if path.is_file():
            return path
    raise UserError(
        f"{where}: neither {candidates[0]} nor {candidates[1]} is there: name the pictures' folder, data.dir=…"
    )


def _edit_settings(row: Row, where: str) -> EditSettings:
    """What the row says beside texts and picture."""
    kind = _cell(row, "edit_type")
    if kind and kind not in MODES:
        raise UserError(f"{where}: edit_type {kind!r} is no edit.{near(kind, MODES)}")
    pairs = {name: _pair(row, name, where) for name in ("blend_word", "eq_params")}
    blend, equalizer = pairs["blend_word"], pairs["eq_params"]
    if blend and not all(len(words) == 1 and isinstance(words[0], str) for words in blend):
        raise UserError(f"{where}: blend_word must name one word of each text, as [('cat',),('tiger',)].")
    return EditSettings(
        MODES[kind] if kind else None,
        (blend[0][0], blend[1][0]) if blend else None,
        tuple((str(word), float(factor)) for word, factor in zip(*equalizer, strict=False)) if equalizer else (),
        {name: tau for name in TAUS if (tau := _tau(row, f"tau_{name}", where)) is not None},
    )


def _pair(row: Row, name: str, where: str) -> tuple[tuple[Any, ...], tuple[Any, ...]] | None:
    """A cell of two groups of one length, as [('tiger',),(2,)]; a lone value counts as a group of one."""
    value = _literal(row, name, where)
    if value is None:
        return None
    if isinstance(value, (list, tuple)) and len(value) == 2:
        first, second = (each if isinstance(each, (list, tuple)) else (each,) for each in value)
        if len(first) == len(second) > 0:
            return tuple(first), tuple(second)
    raise UserError(f"{where}: {name} must hold two groups of one length, as [('tiger',),(2,)].")


def _tau(row: Row, name: str, where: str) -> float | None:
    """A share of the steps, as [.5,] or .5."""
    value = _literal(row, name, where)
    values = value if isinstance(value, (list, tuple)) else (value,)
    if value is None:
        return None
    if len(values) != 1 or not isinstance(values[0], (int, float)) or not 0 <= values[0] <= 1:
        raise UserError(f"{where}: {name} must be one number from 0 to 1: give every value a row of its own.")
    return float(values[0])


def _literal(row: Row, name: str, where: str) -> Any:
    """A cell as the Python value that it spells; None where it is empty."""
    text = _cell(row, name)
    if not text:
        return None
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise UserError(
            f"{where}: {name} {text!r} cannot be read: write it as [.5,] or [('cat',),('tiger',)]."
        ) from None


def _cell(row: Row, name: str) -> str:
    text = (row.get(name) or "").strip()
    return "" if text.lower() in _EMPTY else text


def _rows(path: Path) -> dict[str, Row]:
    """Case number -> row; rows without one are numbered from 0."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            found = list(table)
            columns = table.fieldnames or []
    except FileNotFoundError:
        raise UserError(f"data.file={path} does not exist.") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no CSV ({error}).") from None
    if lacking := [name for name in _NEEDED if name not in columns]:
        raise UserError(
            f"{path} lacks the columns {', '.join(lacking)}: take a file of edits, such as "
            "stylediffusion_editing.csv (stylediffusion_prompts.csv has no targets)."
        )
    rows: dict[str, Row] = {_cell(row, "case_number") or str(number): row for number, row in enumerate(found)}
    for case, row in rows.items():
        if empty := [name for name in _NEEDED if not _cell(row, name)]:
            raise UserError(f"row {case} of {path} has an empty {', '.join(empty)}.")
    if len(rows) < len(found) or not rows:
        raise UserError(f"{path} has {len(found)} rows and {len(rows)} case numbers: give every row its own.")
    return rows


def _chosen(rows: Mapping[str, Row], item: Any, path: Path) -> dict[str, Row]:
    """The wanted rows by case number."""
    if item is None:
        return dict(rows)
    wanted = [str(each) for each in ([item] if isinstance(item, (str, int)) else item)]
    if unknown := [case for case in wanted if case not in rows]:
        raise UserError(f"data.item={unknown[0]} is no case number of {path}.{near(unknown[0], rows)}")
    return {case: rows[case] for case in wanted}
