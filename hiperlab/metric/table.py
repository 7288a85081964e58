"""Rows -> a table: means with intervals, per concept and over all, never across protocols.

The interval is an expanded percentile bootstrap over prompts (`hiperlab.metric.bootstrap`). Pictures of one prompt
resemble each other, so resampling pictures (or a normal interval over them) would look too sure; and means of bounded,
skewed scores over 10 to 25 prompts are not normal. Concepts are kept fixed and prompts are drawn anew within each, so
an interval says what other prompts and seeds would give for *these* concepts, not what other concepts would. A concept
with a single prompt is resampled over its pictures. The draws' seed is fixed: the same rows give the same table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from hiperlab.errors import UserError
from hiperlab.metric.bootstrap import tail
from hiperlab.metric.rows import ALL, CEILING, CONCEPT, PICTURE, SET, Row, ScoreRow, TableRow, columns

SOURCE = "source"  # role of an edit's reconstruction, which is no edit
DRAWS = 2000
STAMP = [name for name in columns(ScoreRow) if name in columns(TableRow) and name not in ("kind", "concept", "metric")]


def aggregate(rows: Iterable[Mapping[str, Any]], by: Sequence[str] = ()) -> list[Row]:
    """Summarise score rows.

    Args:
        rows: `ScoreRow`s of one protocol; reconstructions (role "source") count only in scores of them, the copy
            detector's rows never.
        by: further columns to keep apart, e.g. ("method", "truncation").

    Returns:
        `TableRow`s with the columns `by` in front: one per value of `by`, metric and concept, then that of all
        concepts.

    Raises:
        UserError: rows of several protocols, protocol hashes or judges' weights.
    """
    rows = [row for row in rows if counts(row)]
    refuse_mixtures(rows)
    real = {(row["metric"], row["concept"]): row["value"] for row in rows if row["kind"] == CEILING}
    groups: dict[tuple[Any, ...], dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        if row["kind"] != CEILING:
            key = (*(row.get(column) for column in by), row["metric"])
            groups.setdefault(key, {}).setdefault(row["concept"], []).append(row)
    table: list[Row] = []
    for key, concepts in groups.items():
        labels = dict(zip((*by, "metric"), key))
        ceilings = {concept: real.get((labels["metric"], concept)) for concept in concepts}
        for concept, mine in concepts.items():
            table.append(_line(CONCEPT, labels, concept, [mine], ceilings[concept]))
        known = [value for value in ceilings.values() if value is not None]
        whole = float(np.mean(known)) if len(known) == len(concepts) else None  # of other concepts it would mislead
        table.append(_line(ALL, labels, "", list(concepts.values()), whole))
    return table


def counts(row: Mapping[str, Any]) -> bool:
    """Whether a score row is one of a table: no copy detector's, and of a reconstruction only scores of these."""
    return row["kind"] in (PICTURE, SET, CEILING) and (row.get("role") != SOURCE or bool(row.get("of_source")))


def _line(
    kind: str, labels: Mapping[str, Any], concept: str, rows: list[list[Mapping[str, Any]]], ceiling: float | None
) -> Row:
    """A `TableRow` of the rows of one or several concepts, with its labels in front."""
    stamp = {column: rows[0][0].get(column) for column in STAMP}
    return {**labels, "kind": kind, "concept": concept, **_summary(rows), "ceiling": ceiling, **stamp}


def interval(concepts: Sequence[Sequence[Sequence[float]]], draws: int = DRAWS) -> tuple[float, float] | None:
    """95 % bootstrap interval of the mean over all pictures.

    The expanded percentile interval (Hesterberg 2015): of few prompts the plain one is too narrow, of 5 it covers 83 %.
    Units are drawn anew within each concept, so that its degrees of freedom are the prompts less the concepts.

    Args:
        concepts: per concept, per prompt, the pictures' values.
        draws: number of resamplings.

    Returns:
        (low, high), or None if no concept has two values: nothing varies then.
    """
    if all(sum(len(prompt) for prompt in concept) < 2 for concept in concepts):
        return None
    rng = np.random.Generator(np.random.Philox(key=0))
    total, count = np.zeros(draws), np.zeros(draws)
    num_units = num_groups = 0
    for concept in concepts:
        units = concept if len(concept) > 1 else [[value] for prompt in concept for value in prompt]
        if not units:
            continue
        if len(units) > 1:  # a single one does not vary
            num_units, num_groups = num_units + len(units), num_groups + 1
        drawn = rng.multinomial(len(units), np.full(len(units), 1 / len(units)), size=draws)  # (draws, units)
        total += drawn @ np.array([sum(unit) for unit in units], dtype=np.float64)
        count += drawn @ np.array([len(unit) for unit in units], dtype=np.float64)
    share = tail(num_units, num_groups)
    low, high = np.quantile(total / count, [share, 1 - share])
    return float(low), float(high)


def _summary(concepts: Sequence[Sequence[Mapping[str, Any]]]) -> Row:
    """Mean, interval and counts of the rows of one or several concepts."""
    values: list[list[list[float]]] = []
    count = missed = 0
    for rows in concepts:
        prompts: dict[str, list[float]] = {}
        for row in rows:
            if row["value"] is None:
                missed += row.get("num_pictures", 1)
            else:
                count += row.get("num_pictures", 1)
                prompts.setdefault(row["prompt"], []).append(row["value"])
        values.append(list(prompts.values()))
    flat = [value for concept in values for prompt in concept for value in prompt]
    low, high = interval(values) or (None, None)
    mean = float(np.mean(flat)) if flat else None
    return {"mean": mean, "low": low, "high": high, "n": count, "missed": missed}


def refuse_mixtures(rows: Sequence[Mapping[str, Any]]) -> None:
    """Numbers of different protocols, or of one protocol under other weights, have no common mean.

    Args:
        rows: with `metric` and the columns of `ScoreRow` that say how it was scored.

    Raises:
        UserError: they are several protocols', protocol hashes' or judges' weights'.
    """
    hashes = sorted({f"{row['protocol']} {row['protocol_hash']}" for row in rows})
    if len(hashes) > 1:
        raise UserError(f"rows of several protocols ({', '.join(hashes)}) have no common mean: score all under one.")
    weights: dict[str, set[str]] = {}
    for row in rows:
        weights.setdefault(row["metric"], set()).add(row["weights"])
    for name, seen in weights.items():
        if len(seen) > 1:
            raise UserError(f"rows of {name} come from different weights ({', '.join(sorted(seen))}): score all again.")
