"""What the scores of finished runs are worth: each against the truth, and with copies among the pictures."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hiperlab.errors import UserError, near
from hiperlab.metric.rows import PICTURE, Row, read_scores
from hiperlab.metric.validity import Agreement, agreement, copy_bias

TRUTH = "truth_distance"


class Validity(NamedTuple):
    """A line of the table.

    Attributes:
        metric: the score's name.
        agreement: with the truth, within subjects, of honest pictures.
        with_copies: the same of all pictures.
        bias: see `copy_bias`.
    """

    metric: str
    agreement: Agreement
    with_copies: Agreement
    bias: float


def validity(runs: Sequence[Path], copies: Sequence[Path], truth: str) -> list[Validity]:
    """One line per score of pictures; scores of which less is better are turned round first.

    Args:
        runs: scored run folders of honest methods.
        copies: those of a copier, may be none.
        truth: name of the score that knows.

    Raises:
        UserError: a folder without scores of one protocol, or without the truth.
    """
    rows: list[Row] = []
    for folder in (*runs, *copies):
        found = [row for row in read_scores(folder) if row["kind"] == PICTURE]
        if not any(row["metric"] == truth for row in found):
            known = sorted({str(row["metric"]) for row in found})
            raise UserError(
                f"{folder} has no score {truth} of pictures.{near(truth, known) if known else ' Score it.'}"
            )
        rows += [{**row, "run": folder, "copy": folder in copies} for row in found]
    if len(hashes := {row["protocol_hash"] for row in rows}) > 1:
        raise UserError(f"scores of {len(hashes)} protocols have no common table: score all runs under one.")
    pictures: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        value = math.nan if row["value"] is None else float(row["value"]) * (-1 if row["lower_is_better"] else 1)
        pictures.setdefault((row["run"], row["concept"], row["picture"], row["copy"]), {})[row["metric"]] = value
    known_truth = {key: found for key, found in pictures.items() if truth in found}
    names = [name for name in dict.fromkeys(row["metric"] for row in rows) if name != truth]
    return [_line(name, known_truth, truth) for name in names if any(name in found for found in known_truth.values())]


def _line(name: str, pictures: dict[tuple[Any, ...], dict[str, float]], truth: str) -> Validity:
    def agrees(keys: Sequence[tuple[Any, ...]]) -> Agreement:
        scores, truths = ([pictures[key].get(which, math.nan) for key in keys] for which in (name, truth))
        return agreement(scores, truths, [key[1] for key in keys])

    every = list(pictures)
    bias = copy_bias([pictures[key].get(name, math.nan) for key in every], [key[3] for key in every])
    return Validity(name, agrees([key for key in every if not key[3]]), agrees(every), bias)


def main(arguments: Sequence[str]) -> int:
    """Print the table; 2 with one line where something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m hiperlab.metric.validity_table", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="scored run folders of honest methods")
    parser.add_argument("--copies", nargs="*", type=Path, default=[], help="scored run folders of method=copier")
    parser.add_argument("--truth", default=TRUTH, help=f"the score that knows (default: {TRUTH})")
    asked = parser.parse_args(arguments)
    try:
        lines = validity(asked.runs, asked.copies, asked.truth)
    except UserError as error:
        print(f"hiperlab: {error}", file=sys.stderr)
        return 2
    print(f"{'score':22}{'tau-b with ' + asked.truth:>38}{'with copies':>13}{'bias to copies':>16}")
    for line in lines:
        found = line.agreement
        interval = "" if math.isnan(found.low) else f"({found.low:.2f} to {found.high:.2f})"
        print(f"{line.metric:22}{found.tau:>20.2f} {interval:>17}{line.with_copies.tau:>13.2f}{line.bias:>16.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
