"""comparison.html: one page that stands alone, with tables to sort, figures, and pictures side by side.

Nothing on it comes from outside: figures and pictures are part of the file, its script is beside the template.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
from PIL import Image

from hiperlab.compare import tables
from hiperlab.compare.plots import Plot
from hiperlab.compare.references import references
from hiperlab.compare.runs import COSTS, NO_SEED, Measured, Picture
from hiperlab.compare.statistics import Estimate
from hiperlab.compare.summary import Summary
from hiperlab.metric.table import SOURCE
from hiperlab.report import page

MOST_SIDE = 256  # pixels of an embedded picture
MOST_BYTES = 30_000_000  # of all embedded pictures together, unless all are asked for
QUALITY = 90
MOST_RUNS = 500  # lines of the table of runs
TRUTH = "truth_distance"
ALL, NONE, LINK = "all", "none", "link"
Key = tuple[int, int, int]  # subject, prompt, seed


class Cell(NamedTuple):
    """A cell of a table: what it shows, what it is sorted by, a line below, a style, and an interval as a bar.

    Attributes:
        text: as shown.
        value: sorted by; None is last.
        below: in small letters.
        kind: style class.
        bar: where interval and mean lie between the column's least and most, three percentages; empty for none.
    """

    text: str
    value: float | str | None
    below: str = ""
    kind: str = ""
    bar: tuple[float, ...] = ()


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


class Shown(NamedTuple):
    """A picture of the wall: its address ("" where there is none), and its scores."""

    address: str
    note: str = ""


@dataclass
class Row:
    """Pictures of one subject, prompt and seed, one per method, beside what they should be."""

    number: int
    prompt: str
    label: str
    seed: str
    truth: str
    cells: list[Shown]


@dataclass
class Block:
    """A subject's rows under its real pictures, or why there are none."""

    subject: str
    references: list[str]
    missing: str
    rows: list[Row] = field(default_factory=list)


def write(summary: Summary, plots: Sequence[Plot], folder: Path, pictures: str) -> str:
    """The page's text.

    Args:
        summary: what it shows.
        plots: figures, in order.
        folder: where it will lie; pictures that are not part of it are addressed from there.
        pictures: how many are part of the page: a number, "all", "none", or "link" for addresses of the run folders'.
    """
    measured = summary.measured
    wall = _Wall(summary, folder, pictures)
    blocks = list(wall.blocks())
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
        runs=_runs(measured),
        left_out=measured.left_out,
        plots=[(plot.caption, _embedded(plot.svg, "image/svg+xml"), plot.name) for plot in plots],
        blocks=blocks,
        methods=[(c, measured.names[c]) for c in summary.contenders],
        subjects=[_subject(measured, s) for s in range(len(measured.subjects))],
        prompts=list(dict.fromkeys(row.prompt for block in blocks for row in block.rows)),
        wall_note=wall.note,
        captions={
            "scores": tables.caption(summary),
            "differences": tables.test_caption(summary),
            "ranks": tables.rank_caption(summary),
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


def _subject(measured: Measured, subject: int) -> str:
    """A subject's name; its data set only where there are several."""
    data, concept = measured.subjects[subject]
    return concept if len({each.data for each in measured.subjects}) == 1 else f"{data} · {concept}"


def _embedded(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


# ---- tables ---------------------------------------------------------------------------------------------------------


def _means(summary: Summary, contender: int, subject: int | None) -> list[Cell]:
    """A contender's cells, one per metric."""
    cells = []
    for metric in summary.metrics:
        found = summary.estimate(contender, metric, subject)
        if found is None:
            cells.append(Cell("–", None))
            continue
        mark = summary.marks(metric, subject).get(contender, "")
        below = tables.bounds(summary, metric, found.low, found.high)
        bar = _bar(summary, metric, found) if subject is None else ()
        cells.append(Cell(summary.number(metric, found.mean), found.mean, below, mark, bar))
    return cells


def _bar(summary: Summary, metric: int, found: Estimate) -> tuple[float, ...]:
    """Begin, mean and end of an interval on the scale of all contenders' intervals, in percent."""
    others = [each for c in summary.contenders if (each := summary.estimate(c, metric))]
    ends = [end for each in others for end in (each.low, each.high, each.mean) if end is not None]
    least, width = min(ends), max(ends) - min(ends)
    if not width or found.low is None or found.high is None:
        return ()
    return tuple(round(100 * (end - least) / width, 1) for end in (found.low, found.mean, found.high))


def _scores(summary: Summary) -> Sheet:
    """The main table; real pictures against each other are its last line."""
    measured, lines = summary.measured, []
    for c in summary.contenders:
        name = measured.names[c]
        count = max((each.num_values for m in summary.metrics if (each := summary.estimate(c, m))), default=0)
        missed = max(summary.missed[c, m] for m in summary.metrics)
        pictures = Cell(str(count), count, f"up to {missed} without a score" if missed else "")
        lines.append(Line([Cell(name, name), *_means(summary, c, None), pictures], name))
    ceilings = {m: [value for (metric, _), value in measured.ceilings.items() if metric == m] for m in summary.metrics}
    if any(ceilings.values()):
        cells = [
            Cell(summary.number(m, sum(found) / len(found)) if found else "–", None) for m, found in ceilings.items()
        ]
        lines.append(Line([Cell("real pictures", None), *cells, Cell("", None)], "", kind="ceiling"))
    return Sheet("scores", ["method", *(tables.head(summary, m) for m in summary.metrics), "pictures"], lines)


def _by_subject(summary: Summary) -> Sheet:
    """A line per method and subject."""
    measured, lines = summary.measured, []
    for subject in range(len(measured.subjects)):
        name = _subject(measured, subject)
        for c in summary.contenders:
            if any(summary.estimate(c, m, subject) for m in summary.metrics):
                label = measured.names[c]
                cells = [Cell(name, name), Cell(label, label), *_means(summary, c, subject)]
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


# ---- pictures -------------------------------------------------------------------------------------------------------


class _Wall:
    """Pictures by subject, prompt and seed, a column per method."""

    def __init__(self, summary: Summary, folder: Path, asked: str) -> None:
        self.summary, self.measured, self.folder, self.asked = summary, summary.measured, folder, asked
        self.bytes = 0
        self.unreadable: list[str] = []
        self.by_key: dict[Key, dict[int, Picture]] = {}
        seeds = self.measured.training_seeds
        for picture in sorted(self.measured.pictures, key=lambda each: int(seeds[each.run])):
            row = self.by_key.setdefault((picture.subject, picture.prompt, picture.seed), {})
            row.setdefault(picture.contender, picture)  # of several training seeds the least
        self.keys = self._chosen()
        self.scores = self._scores()

    @property
    def note(self) -> str:
        """How many pictures of how many are shown, and which."""
        total = len(self.measured.pictures)
        if self.asked == NONE or not total:
            return "No pictures were asked for." if total else ""
        shown = sum(len(self.by_key[key]) for key in self.keys)
        seeds = len(np.unique(self.measured.training_seeds)) > 1
        which = " Of several training seeds the least is shown." if seeds else ""
        if self.asked == LINK:
            which += " They lie in the run folders: this page shows them only where it was written."
        more = "" if shown == total else " --pictures all puts all into the page."
        if any(each.name == TRUTH for each in self.measured.metrics) and not any(
            p.role for p in self.measured.pictures
        ):
            which += f" The true pictures of {TRUTH} are drawn by its judge and kept nowhere."
        bad = f" Not readable: {', '.join(self.unreadable[:3])}." if self.unreadable else ""
        return f"{shown} of {total} pictures.{which}{more}{bad}"

    def _chosen(self) -> list[Key]:
        """The rows that are shown: first one seed of each prompt, and of all subjects alike, as many as asked for."""
        if self.asked == NONE:
            return []
        most = int(self.asked) if self.asked.isdecimal() else 10**9
        turn: dict[Key, tuple[int, int]] = {}
        seeds: dict[tuple[int, int], int] = {}
        prompts: dict[int, dict[int, int]] = {}
        for key in self.by_key:
            subject, prompt, _ = key
            of = prompts.setdefault(subject, {})
            place = seeds[subject, prompt] = seeds.get((subject, prompt), -1) + 1
            turn[key] = (place, of.setdefault(prompt, len(of)))
        chosen, count = [], 0
        for key in sorted(self.by_key, key=lambda key: (*turn[key], key[0])):
            if count + len(self.by_key[key]) > most:
                break
            count += len(self.by_key[key])
            chosen.append(key)
        return sorted(chosen, key=lambda key: (key[0], turn[key][1], turn[key][0]))

    def _scores(self) -> dict[tuple[int, int, int, Key], float]:
        """(metric, run, contender, key) -> value, of the trade-off's two scores."""
        s, wanted = self.measured.scores, [m for m in (self.summary.x, self.summary.y) if m is not None]
        places = np.flatnonzero(np.isin(s.metric, wanted)) if self.keys else np.zeros(0, dtype=np.int64)
        columns = (s.metric, s.run, s.contender, s.subject, s.prompt, s.seed, s.value)
        lines = zip(*(column[places].tolist() for column in columns), strict=True)
        return {(m, run, c, (subject, prompt, seed)): value for m, run, c, subject, prompt, seed, value in lines}

    def blocks(self) -> Iterator[Block]:
        """A block per subject, its rows in order."""
        number = 0
        for subject in dict.fromkeys(key[0] for key in self.keys):
            beside = references(self.measured, subject)
            images = [self._jpeg(image) for image in beside.shown]
            block = Block(_subject(self.measured, subject), images, beside.missing)
            for key in (key for key in self.keys if key[0] == subject):
                number += 1
                truth = beside.truths.get(key[1])
                row = self.by_key[key]
                roles = {picture.role for picture in row.values()}
                prompt = self.measured.prompts[key[1]].replace("{}", "S*")
                block.rows.append(
                    Row(
                        number, prompt, "the source again" if roles == {SOURCE} else "",
                        "" if key[2] == NO_SEED else f"seed {key[2]}", self._jpeg(truth) if truth else "",
                        [self._shown(row.get(c), key) for c in self.summary.contenders],
                    )
                )  # fmt: skip
            yield block

    def _shown(self, picture: Picture | None, key: Key) -> Shown:
        if picture is None:
            return Shown("")
        path = self.measured.runs[picture.run].folder / picture.path
        places = [(m, picture.run, picture.contender, key) for m in (self.summary.x, self.summary.y) if m is not None]
        scores = [
            f"{tables.head(self.summary, place[0])} {self._number(place[0], self.scores[place])}"
            for place in places
            if place in self.scores
        ]
        if self.asked == LINK:
            return Shown(self._address(path), " · ".join(scores))
        if self.asked != ALL and self.bytes > MOST_BYTES:
            return Shown("")
        try:
            with Image.open(path) as image:
                return Shown(self._jpeg(image.convert("RGB")), " · ".join(scores))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # Pillow's readers raise any of them
            self.unreadable.append(path.name)
            return Shown("")

    def _number(self, metric: int, value: float) -> str:
        return self.summary.number(metric, value) if metric in self.summary.decimals else f"{value:.3g}"

    def _address(self, path: Path) -> str:
        """Relative to the page, so that a folder with both can be moved."""
        return quote(Path(os.path.relpath(path, self.folder.resolve())).as_posix())

    def _jpeg(self, image: Image.Image) -> str:
        """A picture as an address that holds it."""
        if max(image.size) > MOST_SIDE:
            image = image.copy()
            image.thumbnail((MOST_SIDE, MOST_SIDE), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="JPEG", quality=QUALITY, subsampling=0)
        self.bytes += buffer.tell()
        return _embedded(buffer.getvalue(), "image/jpeg")
