"""What a drawn picture is looked at beside: the subject's real pictures, an edit's source and its true results.

A run folder keeps none of them as files. They stand in the first row of grids/<concept>.png, from where they are cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from hiperlab.compare.runs import Measured, Picture
from hiperlab.report.grid import first_row

MOST_SHOWN = 5


class References(NamedTuple):
    """Pictures of one subject.

    Attributes:
        shown: real pictures of it, or an edit's source.
        truths: prompt (its place in `Measured.prompts`) -> what the edit should have become.
        missing: why there are none; "" where there are.
    """

    shown: list[Image.Image]
    truths: dict[int, Image.Image]
    missing: str


def references(measured: Measured, subject: int) -> References:
    """Those of a subject, from the first run whose grid shows them; truths from the first one that has these."""
    shown: list[Image.Image] = []
    truths: dict[int, Image.Image] = {}
    why = "no run kept a grid of it"
    by_run: dict[int, list[Picture]] = {}
    for picture in measured.pictures:
        if picture.subject == subject:
            by_run.setdefault(picture.run, []).append(picture)
    for run, pictures in by_run.items():
        edit = bool(pictures[0].role)
        if shown and (truths or not edit):
            continue
        row = _first_row(measured.runs[run].folder, measured.subjects[subject].concept, pictures, edit)
        if isinstance(row, str):
            why = row
            continue
        if edit and not truths:
            asked = [first.prompt for first in _columns(pictures)]
            truths = {prompt: picture for prompt, picture in zip(asked[1:], row[1:]) if picture is not None}
        if not shown:
            shown = [picture for picture in (row[:1] if edit else row[:MOST_SHOWN]) if picture is not None]
    return References(shown, truths, "" if shown else why)


def _columns(pictures: Sequence[Picture]) -> list[Picture]:
    """The first picture of each of an edit's columns, which are told by the number that begins a file's name."""
    found: dict[str, Picture] = {}
    for picture in pictures:
        found.setdefault(Path(picture.path).name.split("_")[0], picture)
    return list(found.values())


def _first_row(folder: Path, concept: str, pictures: Sequence[Picture], edit: bool) -> list[Image.Image | None] | str:
    """The first row of a concept's grid, or why it cannot be had."""
    path = folder / "grids" / f"{Path(concept).name}.png"
    if edit:
        rows = 1 + len({(each.seed, each.contender) for each in pictures})
    else:
        rows = 1 + len({(each.prompt, each.contender) for each in pictures})
    try:
        with Image.open(path) as canvas, Image.open(folder / pictures[0].path) as below:
            found = first_row(canvas, rows, below.convert("RGB"))
    except FileNotFoundError:
        return "no run kept a grid of it"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # Pillow's readers raise any of them
        return f"{path.name} cannot be read"
    return found or f"{path.name} is of other pictures than those in samples/"
