"""Rows -> a table: means with intervals, per concept and over all, never across protocols.

The interval is a percentile bootstrap over prompts. Pictures of one prompt resemble each other, so resampling pictures
(or a normal interval over them) would look too sure; and means of bounded, skewed scores over 10 to 25 prompts are not
normal. Concepts are kept fixed and prompts are drawn anew within each, so an interval says what other prompts and
seeds would give for *these* concepts, not what other concepts would. A concept with a single prompt is resampled over
its pictures. The draws' seed is fixed: the same rows give the same table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from hiperlab.errors import UserError
from hiperlab.metric.score import REAL, Row

SOURCE = "source"  # role of an edit's reconstruction, which is no edit
ALL = "all"  # in the table's column "concept": over all concepts
DRAWS = 2000
LEVEL = 0.95


def aggregate(rows: Iterable[Mapping[str, Any]], by: Sequence[str] = ()) -> list[Row]:
    """Summarise score rows.

    Args:
        rows: lines of scores.jsonl, of one protocol; reconstructions (role "source") count only in scores of them.
        by: further columns to keep apart, e.g. ("method", "truncation").

    Returns:
        One line per value of `by`, metric and concept, then concept="all": mean over pictures, low and high (95 %
        interval, None for single pictures), n (pictures with a score), missed (pictures without), ceiling (real
        against real; over all: the concepts' mean; None if unknown), protocol, protocol_hash, trained, weights,
        lower_is_better.

    Raises:
        UserError: rows of several protocols, protocol hashes or judges' weights.
    """
    rows = [row for row in rows if row.get("role") != SOURCE or row.get("of_source")]
    _refuse_mixtures(rows)
    real = {(row["metric"], row["concept"]): row["value"] for row in rows if row["picture"] == REAL}
    groups: dict[tuple[Any, ...], dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        if row["picture"] != REAL:
            key = (*(row.get(column) for column in by), row["metric"])
            groups.setdefault(key, {}).setdefault(row["concept"], []).append(row)
    table: list[Row] = []
    for key, concepts in groups.items():
        labels = dict(zip((*by, "metric"), key))
        ceilings = {concept: real.get((labels["metric"], concept)) for concept in concepts}
        for concept, mine in concepts.items():
            table.append(
                {**labels, "concept": concept, **_summary([mine]), "ceiling": ceilings[concept], **_stamp(mine)}
            )
        known = [value for value in ceilings.values() if value is not None]
        whole = float(np.mean(known)) if len(known) == len(concepts) else None  # of other concepts it would mislead
        lists = list(concepts.values())
        table.append({**labels, "concept": ALL, **_summary(lists), "ceiling": whole, **_stamp(lists[0])})
    return table


def interval(concepts: Sequence[Sequence[Sequence[float]]], draws: int = DRAWS) -> tuple[float, float] | None:
    """95 % bootstrap interval of the mean over all pictures.

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
    for concept in concepts:
        units = concept if len(concept) > 1 else [[value] for prompt in concept for value in prompt]
        if not units:
            continue
        drawn = rng.multinomial(len(units), np.full(len(units), 1 / len(units)), size=draws)  # (draws, units)
        total += drawn @ np.array([sum(unit) for unit in units], dtype=np.float64)
        count += drawn @ np.array([len(unit) for unit in units], dtype=np.float64)
    low, high = np.quantile(total / count, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _summary(concepts: Sequence[Sequence[Mapping[str, Any]]]) -> Row:
    """Mean, interval and counts of the rows of one or several concepts."""
    values: list[list[list[float]]] = []
    missed = 0
    for rows in concepts:
        prompts: dict[str, list[float]] = {}
        for row in rows:
            if row["value"] is None:
                missed += 1
            else:
                prompts.setdefault(row["prompt"], []).append(row["value"])
        values.append(list(prompts.values()))
    flat = [value for concept in values for prompt in concept for value in prompt]
    low, high = interval(values) or (None, None)
    mean = float(np.mean(flat)) if flat else None
    return {"mean": mean, "low": low, "high": high, "n": len(flat), "missed": missed}


def _stamp(rows: Sequence[Mapping[str, Any]]) -> Row:
    """What the numbers are, from any of their rows."""
    return {
        column: rows[0].get(column) for column in ("protocol", "protocol_hash", "trained", "weights", "lower_is_better")
    }


def _refuse_mixtures(rows: Sequence[Mapping[str, Any]]) -> None:
    """Numbers of different protocols, or of one protocol under other weights, have no common mean."""
    hashes = sorted({f"{row['protocol']} {row['protocol_hash']}" for row in rows})
    if len(hashes) > 1:
        raise UserError(f"rows of several protocols ({', '.join(hashes)}) have no common mean: score all under one.")
    weights: dict[str, set[str]] = {}
    for row in rows:
        weights.setdefault(row["metric"], set()).add(row["weights"])
    for name, seen in weights.items():
        if len(seen) > 1:
            raise UserError(f"rows of {name} come from different weights ({', '.join(sorted(seen))}): score all again.")
