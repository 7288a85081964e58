"""The bench's numbers as text, and two files of them side by side. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hiperlab.errors import UserError

PARTS = ("text", "unet", "backward", "optimizer", "rest")
KEY = ("method", "model", "size", "precision", "batch", "concepts")  # rows that agree in these are the same work
OTHERS = ("startup_s", "ceiling_tflops", "diffusers")  # figures of no row
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
    """Every figure that both have, and how many times as large it is now; a step_ms below 1 is faster.

    Raises:
        UserError: they have no row in common.
    """
    first = {tuple(row[key] for key in KEY): row for row in before["rows"]}
    both = [(key, first[key], row) for row in now["rows"] if (key := tuple(row[name] for name in KEY)) in first]
    if not both:
        raise UserError("the two files have no row in common (method, model, size, precision, batch, concepts).")
    said = [_pair(KEY, "figure", "before", "now", "ratio")]
    for key, old, new in both:
        said += _ratios(key, {name: value for name, value in old.items() if name not in KEY}, new)
    old, new = ({name: found[name] for name in OTHERS if name in found} for found in (before, now))
    return "\n".join([*said, *_ratios([""] * len(KEY), old, new)])


def _ratios(key: Sequence[Any], before: Mapping[str, Any], now: Mapping[str, Any], head: str = "") -> Iterator[str]:
    """A line for each number that both have, at any depth: "parts_ms.unet"."""
    for name, old in before.items():
        new, label = now.get(name), f"{head}{name}"
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _ratios(key, old, new, f"{label}.")
        elif isinstance(old, int | float) and isinstance(new, int | float):
            ratio = f"{new / old:.3f}" if old else "-"
            yield _pair(key, label, f"{old:.4g}", f"{new:.4g}", ratio)


def _pair(key: Sequence[Any], figure: str, before: str, now: str, ratio: str) -> str:
    """A line of the comparison."""
    method, model, size, precision, batch, concepts = key
    name = f"{method:<{NAME}}  {model:<8}  {size:>4}  {precision:<9}  {batch:>5}  {concepts:>8}"
    return f"{name}  {figure:<20}  {before:>9}  {now:>9}  {ratio:>6}"
