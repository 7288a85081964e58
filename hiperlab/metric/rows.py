"""The rows that pass between sampling, scoring and reports: the columns of each kind stand here once.

Rows are plain mappings, as JSON holds them, and may have further columns (a variant, an edit's role, what was swept).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from hiperlab import files

Row = dict[str, Any]

PICTURE, CEILING, COPY, COPY_CEILING, SET = "picture", "ceiling", "copy", "copy_ceiling", "set"  # kinds of score rows
SETS_APART = ("variant", "role")  # further columns: pictures that differ in one belong to different sets
CONCEPT, ALL = "concept", "all"  # kinds of table rows
RESULTS_ARTIFACT = "hiperlab-results"  # type of what W&B keeps of a run's rows
# Files of a run folder that a comparison reads: what services keep and give back.
COMPARED = ("results.json", "scores.jsonl", "overrides.yaml", "config.yaml", "samples/samples.jsonl")


class _Needed(TypedDict):
    concept: str
    prompt: str
    text: str
    path: str


NEEDED = tuple(_Needed.__annotations__)  # columns of every record


class SampleRecord(_Needed, total=False):
    """A picture to be scored, a line of samples/samples.jsonl.

    Attributes:
        concept: whose picture it is.
        prompt: the template, with "{}" where the concept stands.
        text: as it was sampled.
        path: of the picture.
        placeholder, word: the concept's; of a picture of several concepts, each one's. May be absent, as the seed.
        seed: of the picture.
    """

    placeholder: str | list[str]
    word: str | list[str]
    seed: int


class UnrelatedRecord(_Needed):
    """A picture of a text that its concept has no part in, drawn with what was learnt.

    Attributes:
        concept, prompt, text, path: as in `SampleRecord`.
        frozen: path of what the frozen model draws of it from the same noise; `path` itself where nothing changed.
    """

    frozen: str


class ScoreRow(TypedDict):
    """One number about a picture or a concept's pictures, a line of scores.jsonl.

    Attributes:
        kind: "picture": a drawn picture's score. "ceiling": real pictures of the concept against each other, each left
            out of its own references. "copy": similarity of a drawn picture to its nearest reference; above
            "copy_ceiling", the same of real pictures, it is nearer to one photograph than photographs are. "set": of
            all the concept's drawn pictures of one variant and role together.
        concept, prompt, seed: of the picture; a row of several has an empty prompt and no seed.
        picture: its path; empty in a row of several.
        metric: the score's name.
        value: None where nothing was found.
        protocol, protocol_hash, trained: of the protocol.
        weights: content of the judge's weights.
        lower_is_better: whether less is better.
        of_source: whether it is a score of reconstructions, not of edits.
        num_pictures: of a set: its pictures in which the judge found something.
    """

    kind: str
    concept: str
    prompt: str
    seed: int | None
    picture: str
    metric: str
    value: float | None
    protocol: str
    protocol_hash: str
    trained: bool
    weights: str
    lower_is_better: bool
    of_source: NotRequired[bool]
    num_pictures: NotRequired[int]


class TableRow(TypedDict):
    """One line of a table: the mean of a score over a concept's pictures, or over all concepts'.

    Attributes:
        kind: "concept" or "all".
        metric: the score's name.
        concept: whose; empty in rows of all.
        mean: over pictures, None without any.
        low, high: 95 % interval; None for single pictures.
        n, missed: pictures with a score, and without.
        ceiling: real against real; over all: the concepts' mean; None if unknown.
        protocol, protocol_hash, trained, weights, lower_is_better: as in `ScoreRow`.
    """

    kind: str
    metric: str
    concept: str
    mean: float | None
    low: float | None
    high: float | None
    n: int
    missed: int
    ceiling: float | None
    protocol: str
    protocol_hash: str
    trained: bool
    weights: str
    lower_is_better: bool


def columns(kind: type) -> tuple[str, ...]:
    """The column names of a kind of row, in order."""
    return tuple(kind.__annotations__)


def score_row(row: Mapping[str, Any]) -> Row:
    """A line of any scores.jsonl with today's columns.

    Those of November 2026 had no kind: a ceiling's picture was called "real", the copy detector's scores ended in
    "_copy".
    """
    if "kind" in row:
        return dict(row)
    real, metric = row.get("picture") == "real", str(row.get("metric", ""))
    copy = metric.endswith("_copy")
    kind = (COPY_CEILING if copy else CEILING) if real else (COPY if copy else PICTURE)
    found = {"kind": kind, **row, "metric": metric.removesuffix("_copy")}
    return {**found, "picture": ""} if real else found


def read_scores(folder: Path) -> list[Row]:
    """The `ScoreRow`s of a run folder's scores.jsonl, whatever version wrote it; none where nothing was scored."""
    return [score_row(row) for row in files.read_jsonl(folder / "scores.jsonl", ("concept", "metric", "value"))]


def table_row(row: Mapping[str, Any]) -> Row:
    """A line of any results.json's or comparison.json's table with today's columns; "all" was a concept once."""
    if "kind" in row:
        return dict(row)
    whole = row.get("concept") == "all"
    return {"kind": ALL, **row, "concept": ""} if whole else {"kind": CONCEPT, **row}
