"""Captions beside photographs: `<name>.txt` (kohya's layout), `metadata.jsonl` or `metadata.csv` (Hugging Face's)."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from hiperlab.data.concept import SLOT, slotted
from hiperlab.errors import UserError

log = logging.getLogger(__name__)


def captions_beside(paths: Sequence[Path], word: str) -> tuple[str, ...]:
    """Each picture's caption with the slot in the class noun's place, "" for a picture without one.

    A caption that does not name the noun gets the slot in front: "on a red carpet" -> "{}, on a red carpet".

    Args:
        paths: of the pictures.
        word: the class noun.

    Raises:
        UserError: a table of captions cannot be read.
    """
    tables = {folder: _table(folder) for folder in {path.parent for path in paths}}
    found = []
    for path in paths:
        beside = path.with_suffix(".txt")
        text = (
            beside.read_text(encoding="utf-8", errors="replace")
            if beside.is_file()
            else tables[path.parent].get(path.name)
        )
        text = " ".join((text or "").replace("{", "(").replace("}", ")").split())
        spoken = slotted(text, word)
        found.append(spoken if not text or SLOT in spoken else f"{SLOT}, {text}")
    return tuple(found)


def _table(folder: Path) -> dict[str, str]:
    """File name -> text from the folder's metadata, if it has any."""
    lines, table = folder / "metadata.jsonl", folder / "metadata.csv"
    try:
        if lines.is_file():
            rows = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines() if line.strip()]
        elif table.is_file():
            with table.open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
        else:
            return {}
        return {str(row["file_name"]): str(row["text"]) for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        path = lines if lines.is_file() else table
        raise UserError(
            f"{path} is no table of file_name and text ({error!r}): mend it, or set data.captions=off."
        ) from error
