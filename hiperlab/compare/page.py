"""comparison.html: one page that stands alone, with tables to sort, figures, and pictures side by side.

Nothing on it comes from outside: figures and pictures are part of the file, its script is beside the template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hiperlab.compare import tables
from hiperlab.compare.claims import FAILS, HOLDS
from hiperlab.compare.plots import Plot
from hiperlab.compare.runs import COSTS, NO_SEED, Measured
from hiperlab.compare.statistics import DIGITS, Estimate
from hiperlab.compare.summary import Summary
from hiperlab.compare.wall import Wall, embedded
from hiperlab.report import page

MARKED = (HOLDS, FAILS)  # verdicts that stand out
MOST_RUNS = 500  # lines of the table of runs


class Cell(NamedTuple):
    """A cell of a table: what it shows, what it is sorted by, a line below, a style, and an interval as a bar.

    Attributes:
        text: as shown.
        value: sorted by; None is last.
        below: in small letters.
        kind: style class.
        bar: where interval and mean lie between the column's least and most, three percentages; empty for none.
        parts: the value of each subject (None without one), of which the page shows the mean where some are chosen.
    """

    text: str
    value: float | str | None
    below: str = ""
    kind: str = ""
    bar: tuple[float, ...] = ()
    parts: Sequence[float | None] = ()


class Line(NamedTuple):
    """A row of a table: its cells, the text that a filter looks at, and the subject it is about ("" for all)."""

    cells: Sequence[Cell]
    text: str
    subject: str = ""
    kind: str = ""


class Sheet(NamedTuple):
    """A table that can be sorted and filtered."""

    name: str
    head: Sequence[str]
    lines: Sequence[Line]
    caption: str = ""


def write(summary: Summary, plots: Sequence[Plot], folder: Path, pictures: str) -> str:
    """The page's text.

    Args:
        summary: what it shows.
        plots: figures, in order.
        folder: where it will lie; pictures that are not part of it are addressed from there.
        pictures: how many are part of the page: a number, "all", "none", or "link" for addresses of the run folders'.
    """
    measured = summary.measured
    wall = Wall(summary, folder, pictures)
    blocks = wall.blocks()
    count = len(summary.contenders)
    return page.render(
        "comparison.html",
        package="hiperlab.compare",
        name=_title(summary),
        facts=[
            ("runs", len(measured.runs)),
            ("compared", count),
            ("subjects", len(measured.subjects)),
            ("prompts", len([prompt for prompt in measured.prompts if prompt])),
            ("sampling seeds", len(np.unique(measured.scores.seed[measured.scores.seed != NO_SEED]))),
            ("training seeds", len(np.unique(measured.training_seeds))),
            ("protocol", measured.protocol),
        ],
        must_know=summary.notes,
        scores=_scores(summary),
        by_subject=_by_subject(summary),
        differences=_differences(summary),
        ranks=_ranks(summary),
        costs=_costs(summary),
        claims=_claims(summary),
        runs=_runs(measured),
        left_out=measured.left_out,
        plots=[(plot.caption, embedded(plot.svg, "image/svg+xml"), plot.name, plot.title) for plot in plots],
        blocks=blocks,
        methods=[(c, measured.names[c]) for c in summary.contenders],
        subjects=[measured.subject_name(s) for s in range(len(measured.subjects))],
        prompts=list(dict.fromkeys(row.prompt for block in blocks for row in block.rows)),
        wall_note=wall.note,
        captions={
            "scores": tables.caption(summary),
            "differences": tables.test_caption(summary),
            "ranks": tables.rank_caption(summary),
            "claims": tables.claims_caption(summary),
        },
    )


def _title(summary: Summary) -> str:
    """How many methods, or settings of one, on how many subjects."""
    count, subjects = len(summary.contenders), len(summary.measured.subjects)
    methods = {summary.measured.contenders[c].method for c in summary.contenders}
    what = f"{count} methods" if len(methods) == count > 1 else f"{count} settings of {len(methods)} methods"
    what = f"{count} settings of {methods.pop()}" if len(methods) == 1 < count else what
    what = methods.pop() if count == 1 else what
    return f"Comparison of {what} on {subjects} subject{'s' * (subjects != 1)}"


# ---- tables ---------------------------------------------------------------------------------------------------------


def _means(
    summary: Summary, contender: int, subject: int | None, ends: Mapping[int, tuple[float, float]]
) -> list[Cell]:
    """A contender's cells, one per metric; with bars on the scale of `ends`, of a metric's intervals."""
    cells = []
    for metric in summary.metrics:
        found = summary.estimate(contender, metric, subject)
        if found is None:
            cells.append(Cell("–", None))
            continue
        mark = summary.marks(metric, subject).get(contender, "")
        below = tables.bounds(summary, metric, found.low, found.high)
        bar = _bar(found, *ends[metric]) if metric in ends else ()
        parts = _parts(summary, contender, metric) if subject is None else ()
        cells.append(Cell(summary.number(metric, found.mean), found.mean, below, mark, bar, parts))
    return cells


def _parts(summary: Summary, contender: int, metric: int) -> list[float | None]:
    """Each subject's mean, to the digits that decide which is the best."""
    found = [summary.estimate(contender, metric, subject) for subject in range(len(summary.measured.subjects))]
    return [None if each is None else round(each.mean, DIGITS) for each in found]


def _ends(summary: Summary) -> dict[int, tuple[float, float]]:
    """Per metric the least and the greatest end of all contenders' intervals."""
    found = {}
    for metric in summary.metrics:
        others = [each for c in summary.contenders if (each := summary.estimate(c, metric))]
        ends = [end for each in others for end in (each.low, each.high, each.mean) if end is not None]
        if ends:
            found[metric] = (min(ends), max(ends))
    return found


def _bar(found: Estimate, least: float, most: float) -> tuple[float, ...]:
    """Begin, mean and end of an interval on a scale, in percent."""
    if most == least or found.low is None or found.high is None:
        return ()
    return tuple(round(100 * (end - least) / (most - least), 1) for end in (found.low, found.mean, found.high))


def _scores(summary: Summary) -> Sheet:
    """The main table; real pictures against each other are its last line."""
    measured, lines, ends = summary.measured, [], _ends(summary)
    subjects = range(len(measured.subjects))
    for c in summary.contenders:
        name = measured.names[c]
        count = max((each.num_values for m in summary.metrics if (each := summary.estimate(c, m))), default=0)
        missed = max(summary.missed[c, m] for m in summary.metrics)
        pictures = Cell(str(count), count, f"up to {missed} without a score" if missed else "")
        lines.append(Line([Cell(name, name), *_means(summary, c, None, ends), pictures], name))
    ceilings = {m: [measured.ceilings.get((m, s)) for s in subjects] for m in summary.metrics}
    if any(each is not None for found in ceilings.values() for each in found):
        cells = []
        for m, parts in ceilings.items():
            found = [value for value in parts if value is not None]
            shown = summary.number(m, sum(found) / len(found)) if found else "–"
            cells.append(Cell(shown, None, parts=parts if found else ()))
        lines.append(Line([Cell("real pictures", None), *cells, Cell("", None)], "", kind="ceiling"))
    return Sheet("scores", ["method", *(tables.head(summary, m) for m in summary.metrics), "pictures"], lines)


def _by_subject(summary: Summary) -> Sheet:
    """A line per method and subject."""
    measured, lines = summary.measured, []
    for subject in range(len(measured.subjects)):
        name = measured.subject_name(subject)
        for c in summary.contenders:
            if any(summary.estimate(c, m, subject) for m in summary.metrics):
                label = measured.names[c]
                cells = [Cell(name, name), Cell(label, label), *_means(summary, c, subject, {})]
                lines.append(Line(cells, f"{label} {name}", name))
    return Sheet("subjects", ["subject", "method", *(tables.head(summary, m) for m in summary.metrics)], lines)


def _differences(summary: Summary) -> Sheet:
    """A line per tested pair and metric."""
    head, *texts = tables.differences(summary)
    lines = []
    for each, text in zip(summary.differences, texts, strict=True):
        numbers = {3: each.found.difference, 5: each.found.p, 6: each.holm, 7: each.found.num_units}
        cells = [Cell(shown, numbers.get(place, shown)) for place, shown in enumerate(text)]
        clear = each.holm <= 0.05
        lines.append(Line(cells, " ".join(text[:3]), kind="clear" if clear else ""))
    return Sheet("differences", head, lines)


def _ranks(summary: Summary) -> Sheet:
    """A line per method, a rank with its interval per metric."""
    metrics = [metric for metric in summary.metrics if metric in summary.ranks]
    lines = []
    for c in summary.contenders:
        cells = [Cell(summary.measured.names[c], summary.measured.names[c])]
        for metric in metrics:
            if (found := summary.ranks[metric].get(c)) is None:
                cells.append(Cell("–", None))
                continue
            between = "" if found.low is None else f"[{found.low:g}, {found.high:g}]"
            best = "" if found.best is None else f" · first in {100 * found.best:.0f} %"
            cells.append(Cell(f"{found.rank:g}", found.rank, f"{between}{best}"))
        lines.append(Line(cells, summary.measured.names[c]))
    return Sheet("ranks", ["method", *(tables.head(summary, m) for m in metrics)], lines if metrics else [])


def _claims(summary: Summary) -> Sheet:
    """A line per test of each published ordering that was measured."""
    head, *texts = tables.claims(summary)
    rows = [
        Line(
            [Cell(shown, shown) for shown in text],
            " ".join(text),
            kind=kind if (kind := _verdict(text[-1])) in MARKED else "",
        )
        for text in texts
    ]
    return Sheet("claims", head, rows)


def _verdict(text: str) -> str:
    """A claim's verdict without its margin, and without those of its single tests."""
    return text.partition(",")[0].partition(" (")[0]


def _costs(summary: Summary) -> Sheet:
    head, *texts = tables.costs(summary)
    lines = []
    for c, text in zip(summary.contenders, texts, strict=True):
        values = [summary.measured.names[c], *(summary.costs[c][key] for key in COSTS)]
        lines.append(Line([Cell(shown, value) for shown, value in zip(text, values, strict=True)], text[0]))
    return Sheet("cost", head, lines)


def _runs(measured: Measured) -> Sheet:
    """Which runs these are."""
    order = np.argsort(measured.scores.run, kind="stable")
    runs, first = np.unique(measured.scores.run[order], return_index=True)
    names = {
        int(r): measured.contenders[measured.scores.contender[order[f]]]._replace(variant="").name
        for r, f in zip(runs, first)
    }
    lines = []
    for number, run in list(enumerate(measured.runs))[:MOST_RUNS]:
        texts = [names.get(number, run.method), run.data, str(run.seed), "" if run.steps is None else str(run.steps)]
        values = [texts[0], run.data, run.seed, run.steps, str(run.folder)]
        shown = [*texts, str(run.folder)]
        lines.append(Line([Cell(text, value) for text, value in zip(shown, values, strict=True)], " ".join(shown)))
    more = len(measured.runs) - MOST_RUNS
    caption = f"The first {MOST_RUNS}; {more} more are in comparison.json." if more > 0 else ""
    return Sheet("runs", ["method", "data", "training seed", "steps", "folder"], lines, caption)
