"""A sweep's result: which setting did best, as a table and side by side as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from hiperlab import files
from hiperlab.metric.rows import ALL, read_scores
from hiperlab.metric.table import aggregate
from hiperlab.report import page
from hiperlab.report.grid import grid, save_png

MOST_COLUMNS, MOST_PROMPTS = 8, 6


class Job(NamedTuple):
    """One finished run of a sweep.

    Args:
        labels: what was swept, e.g. {"method": "neti", "seed": "0"}.
        folder: its run folder.
    """

    labels: Mapping[str, str]
    folder: Path


def compare(sweep_dir: Path, jobs: Sequence[Job]) -> str:
    """Write comparison.json, comparison.html and comparison.png into the sweep's folder.

    Runs that differ in nothing but the run's seed are one line; intervals are those of `metric.table.aggregate`.

    Returns:
        The table over all concepts as text; "" when no job has scores.

    Raises:
        UserError: the jobs were scored under different protocols.
    """
    keys = [key for key in dict.fromkeys(key for job in jobs for key in job.labels) if key != "seed"]
    rows = [{**row, **job.labels} for job in jobs for row in read_scores(job.folder)]
    if not rows:
        return ""
    table = aggregate(rows, by=(*keys, "variant"))
    totals = [row for row in table if row["kind"] == ALL]
    files.write_json(sweep_dir / "comparison.json", table)
    picture = _side_by_side(sweep_dir, jobs)
    lines = _lines(totals, keys)
    notes = [] if all(row["trained"] for row in totals) else ["The judge is UNTRAINED: these numbers measure nothing."]
    html = page.render(
        "comparison.html",
        name=sweep_dir.name,
        must_know=notes,
        scores=page.Table(lines[0], lines[1:], "95 % intervals by bootstrap."),
        picture=page.figure(picture, sweep_dir, "same prompt and seed") if picture else None,
    )
    files.atomic_write(sweep_dir / "comparison.html", html)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    return "\n".join([*text, *notes, str(sweep_dir / "comparison.html")])


def _lines(totals: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[list[str]]:
    """A line per setting, a column per metric."""
    metrics = list(dict.fromkeys(row["metric"] for row in totals))
    names = [*keys, *(["variant"] if any(row.get("variant") for row in totals) else [])]
    settings: dict[tuple[str, ...], dict[str, Mapping[str, Any]]] = {}
    for row in totals:
        settings.setdefault(tuple(str(row.get(name) or "") for name in names), {})[row["metric"]] = row
    lower = {row["metric"] for row in totals if row.get("lower_is_better")}
    lines = [[*names, *(f"{metric} ↓" if metric in lower else metric for metric in metrics), "pictures"]]
    for setting, found in settings.items():
        cells = [_value(found.get(metric)) for metric in metrics]
        lines.append([*setting, *cells, str(max(row["n"] for row in found.values()))])
    return lines


def _value(row: Mapping[str, Any] | None) -> str:
    if row is None or row["mean"] is None:
        return "-"
    spread = "" if row["low"] is None else f" [{row['low']:.3f}, {row['high']:.3f}]"
    return f"{row['mean']:.3f}{spread}"


def _side_by_side(sweep_dir: Path, jobs: Sequence[Job]) -> Path | None:
    """The same prompts and sampling seed under each job, references left out; None without common pictures."""
    shown = jobs[:MOST_COLUMNS]
    found = [
        {(r["concept"], r["prompt"], r["seed"]): r for r in files.read_jsonl(job.folder / "samples" / "samples.jsonl")}
        for job in shown
    ]
    common = [key for key in (found[0] if found else {}) if all(key in each for each in found)]
    first: dict[tuple[str, str], tuple[str, str, int]] = {}
    for key in common:
        first.setdefault(key[:2], key)
    chosen = list(first.values())[:MOST_PROMPTS]
    if not chosen:
        return None
    rows: list[list[Image.Image]] = []
    for key in chosen:
        row = []
        for job, records in zip(shown, found, strict=True):
            with Image.open(job.folder / records[key]["path"]) as picture:
                row.append(picture.convert("RGB"))
        rows.append(row)
    columns = [" ".join(f"{key}={value}" for key, value in job.labels.items()) for job in shown]
    path = sweep_dir / "comparison.png"
    save_png(grid(rows, rows=[f"{concept}: {prompt}" for concept, prompt, _ in chosen], columns=columns), path)
    return path
