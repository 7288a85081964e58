"""The bench's numbers as text, and two files of them side by side. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hiperlab.errors import UserError

PARTS = ("text", "unet", "backward", "optimizer", "rest")
KEY = ("method", "model", "size", "precision", "batch", "concepts")  # rows that agree in these are the same work
NAME = 17  # letters of the longest method's name
COLUMNS = {  # title -> (width, key, format)
    "batch": (5, "batch", "d"),
    "concepts": (8, "concepts", "d"),
    "ms/step": (9, "step_ms", ".1f"),
    "samples/s": (9, "samples_per_s", ".2f"),
    "concepts/h": (10, "concepts_per_hour", ".3g"),
    "steps": (6, "published_steps", "d"),
    "MB": (6, "peak_mb", ".0f"),
    "GFLOP": (8, "step_gflop", ".1f"),
    "ceiling": (7, "share_of_ceiling", ".1%"),
    "pictures/s": (10, "pictures_per_s", ".3g"),
}


CAPTION = """
concepts: that share each pass; concepts/h: at this batch and the published steps; MB: most memory while training;
GFLOP: of a whole step; ceiling: its share of the large matrix product's rate; text (with conditioning) to rest:
milliseconds of a step that waits for each part
"""


def heading() -> str:
    """What the columns mean, and their titles."""
    cells = [f"{title:>{width}}" for title, (width, *_) in COLUMNS.items()]
    return CAPTION + "  ".join([f"{'method':<{NAME}}", *cells, *(f"{part:>9}" for part in PARTS)])


def lines(found: Mapping[str, Any]) -> list[str]:
    """Whatever `found` holds, in words or as rows under `heading`."""
    said = []
    if place := found.get("environment"):
        said.append(f"{place['device']}, threads: {place['threads']}, torch {place['packages']['torch']}")
    if start := found.get("startup_s"):
        said.append(f"start-up: the door {start['door']:.2f} s, imports of a run {start['stages']:.1f} s")
    if "ceiling_tflops" in found:
        said.append(f"large matrix product: {found['ceiling_tflops']:.3g} TFLOP/s")
    said += [_row(row) for row in found.get("rows", [])]
    if pair := found.get("diffusers"):
        said.append(
            f"Textual Inversion, batch {pair['batch']}: ours {pair['ours_ms']:.1f} ms a step, diffusers' calls "
            f"{pair['theirs_ms']:.1f} ms, {pair['ratio']:.2f} times as long"
        )
    return said


def _row(row: Mapping[str, Any]) -> str:
    cells = [f"{row['method']:<{NAME}}"]
    cells += [_cell(row.get(key), width, kind) for width, key, kind in COLUMNS.values()]
    return "  ".join([*cells, *(_cell(row["parts_ms"].get(part), 9, ".1f") for part in PARTS)])


def _cell(value: float | None, width: int, kind: str) -> str:
    """A number to the right; a dash for what was not measured."""
    return f"{'-' if value is None else format(value, kind):>{width}}"


def read(path: Path) -> dict[str, Any]:
    """What an earlier bench wrote.

    Raises:
        UserError: there is no such file, or it is none of the bench's.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        for row in found["rows"]:
            row["step_ms"] / 1, [row[key] for key in KEY]
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a file that --json wrote.") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is no file of the bench: give one that --json wrote.") from None
    return dict(found)


def compared(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Rows that both have, and how many times as long a step takes now: below 1 is faster.

    Raises:
        UserError: they have no row in common.
    """
    first = {tuple(row[key] for key in KEY): row for row in before["rows"]}
    said = [_pair(KEY, "before", "now", "ratio")]
    for row in now["rows"]:
        key = tuple(row[name] for name in KEY)
        if key in first:
            old, new = first[key]["step_ms"], row["step_ms"]
            said.append(_pair(key, f"{old:.1f}", f"{new:.1f}", f"{new / old:.3f}"))
    if len(said) == 1:
        raise UserError("the two files have no row in common (method, model, size, precision, batch, concepts).")
    return "\n".join(said)


def _pair(key: Sequence[Any], before: str, now: str, ratio: str) -> str:
    """A line of the comparison."""
    method, model, size, precision, batch, concepts = key
    name = f"{method:<{NAME}}  {model:<8}  {size:>4}  {precision:<9}  {batch:>5}  {concepts:>8}"
    return f"{name}  {before:>9}  {now:>9}  {ratio:>6}"
