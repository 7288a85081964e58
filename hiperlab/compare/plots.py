"""Figures of a comparison, each as PNG, SVG and PDF: for the page, for slides, for a paper.

Colours are Okabe and Ito's, which people with any colour vision tell apart; markers differ, too.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from hiperlab import files
from hiperlab.compare.labels import STEPS, Contender, shortened
from hiperlab.compare.runs import COSTS
from hiperlab.compare.statistics import Values, differences
from hiperlab.compare.summary import Summary
from hiperlab.compare.tables import head, intervals, over

KINDS = ("png", "svg", "pdf")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8C6D1F")
MARKERS = "osD^vP*X<>hp"
MOST_LEGEND, MOST_PANELS, MOST_LINES, MOST_CELLS = 24, 12, 40, 40
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 9.5, "axes.labelsize": 9, "legend.fontsize": 8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e4e7eb",
    "grid.linewidth": 0.7, "axes.axisbelow": True, "text.parse_math": False, "pdf.fonttype": 42,
    "svg.hashsalt": "hiperlab", "figure.dpi": 150, "axes.edgecolor": "#8a939d", "xtick.color": "#3c444d",
    "ytick.color": "#3c444d", "axes.labelcolor": "#1c2127",
}  # fmt: skip


class Plot(NamedTuple):
    """A figure that was written.

    Attributes:
        name: of its files, without ending.
        caption: what it shows.
        svg: its content, for a page that stands alone.
        title: the full texts of what is cut in it, a line each; "" where nothing is.
    """

    name: str
    caption: str
    svg: bytes
    title: str = ""


class _Drawing(NamedTuple):
    """A figure before it is written: see `Plot`."""

    name: str
    figure: Figure
    caption: str
    title: str = ""


def draw(summary: Summary, folder: Path) -> list[Plot]:
    """Write every figure that there are numbers for into `folder`, and return them in the order to be shown."""
    found = []
    with matplotlib.rc_context(_STYLE):
        for name, figure, caption, title in _figures(summary):
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # laid out once, not again for every kind of file
            content = {kind: _saved(figure, kind) for kind in KINDS}
            for kind, data in content.items():
                files.atomic_write(folder / f"{name}.{kind}", data)
            found.append(Plot(name, caption, content["svg"], title))
    return found


def _saved(figure: Figure, kind: str) -> bytes:
    """A figure's bytes, without the time: the same numbers make the same file."""
    buffer = io.BytesIO()
    # The canvases' own writers: savefig would lay the figure out again, and draw it twice.
    if kind == "png":
        FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    elif kind == "svg":
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    else:
        FigureCanvasPdf(figure).print_pdf(buffer, metadata={"CreationDate": None})
    return buffer.getvalue()


def _figures(summary: Summary) -> Iterator[_Drawing]:
    for part in (_trade_off, _cost, _scores):
        if found := part(summary):
            yield found
    yield from _settings(summary)
    yield from _heat_maps(summary)


def _figure(width: float, height: float) -> Figure:
    """Inches. No window and no global state: a figure and its canvas."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _look(number: int) -> dict[str, Any]:
    """Colour and marker of a contender; all differ up to 24, in colour or in marker."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}


def _towards_better(summary: Summary, metric: int, axes: Axes, axis: str) -> None:
    """Turn an axis whose lower values are better, so that better is always to the right, or up."""
    if summary.measured.metrics[metric].lower_is_better:
        (axes.invert_xaxis if axis == "x" else axes.invert_yaxis)()


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        shown = shortened(labels[:MOST_LEGEND], 42)
        more = f"the first {MOST_LEGEND} of {len(labels)}" if len(labels) > MOST_LEGEND else None
        # Of an error bar its marker alone: whiskers would hide what tells it from others of its colour.
        marks = [each[0] if isinstance(each, ErrorbarContainer) else each for each in handles[:MOST_LEGEND]]
        figure.legend(marks, shown, loc="outside right upper", frameon=False, title=more)


def _trade_off(summary: Summary) -> _Drawing | None:
    """Following the text against being the subject, with intervals and the Pareto front."""
    x, y = summary.x, summary.y
    there = [] if x is None or y is None else [
        c for c in summary.contenders if summary.estimate(c, x) and summary.estimate(c, y)
    ]  # fmt: skip
    if x is None or y is None or not there:
        return None
    figure = _figure(7.2, 4.2)
    axes = figure.subplots()
    points = {}
    for number, c in enumerate(there):
        across, up = summary.means[c, x], summary.means[c, y]
        points[c] = (across.mean, up.mean)
        axes.errorbar(
            across.mean, up.mean, xerr=_whisker(across), yerr=_whisker(up), **_look(number), markersize=6.5,
            linestyle="none", linewidth=1, capsize=2, alpha=0.95, label=summary.measured.names[c],
        )  # fmt: skip
    front = sorted(points[c] for c in summary.front if c in points)
    axes.plot(*zip(*front), color="#5d6772", linewidth=1.1, linestyle="--", zorder=1)
    axes.xaxis.set_major_locator(MaxNLocator(6))  # a legend of many methods leaves the axis little width
    axes.set_xlabel(f"{head(summary, x)}  (follows the text)")
    axes.set_ylabel(f"{head(summary, y)}  (is the subject)")
    _towards_better(summary, x, axes, "x")
    _towards_better(summary, y, axes, "y")
    _legend(figure, axes)
    names = [each.name for each in summary.measured.metrics]
    bars = f"Bars are 95 % bootstrap intervals over {over(summary.units)}; the" if summary.intervals else "The"
    return _Drawing("trade_off", figure, (
        f"{names[x]} against {names[y]}: better is to the right and up. {bars} dashed line joins the Pareto front, the "
        "methods that no other beats in both."
    ))  # fmt: skip


def _whisker(found: Any) -> list[list[float]] | None:
    """Lengths of an interval's two sides, as matplotlib takes them."""
    return None if found.low is None else [[found.mean - found.low], [found.high - found.mean]]


def _scores(summary: Summary) -> _Drawing | None:
    """Every metric in a panel: means and intervals, a line per contender."""
    metrics, lines = summary.metrics, summary.contenders[:MOST_LINES]
    if len(lines) < 2:
        return None
    columns = min(4, len(metrics))
    height = max(1.1, 0.19 * len(lines) + 0.55)
    figure = _figure(1.9 * columns + 2.2, height * math.ceil(len(metrics) / columns) + 0.2)
    grid = figure.subplots(math.ceil(len(metrics) / columns), columns, sharey=True, squeeze=False)
    for axes in grid.flat[len(metrics) :]:
        axes.set_visible(False)
    for metric, axes in zip(metrics, grid.flat):
        for number, c in enumerate(lines):
            if found := summary.estimate(c, metric):
                axes.errorbar(
                    found.mean, number, xerr=_whisker(found), **_look(number), markersize=4.5, linewidth=1.2, capsize=2
                )
        axes.set_title(head(summary, metric))
        axes.set_yticks(range(len(lines)), shortened([summary.measured.names[c] for c in lines], 34))
        axes.set_ylim(len(lines) - 0.5, -0.5)
        axes.tick_params(labelsize=7.5)
        axes.locator_params(axis="x", nbins=4)
    more = f" The first {len(lines)} of {len(summary.contenders)} are shown." * (len(lines) < len(summary.contenders))
    caption = f"Means {intervals(summary)}; ↑ more is better, ↓ less is better.{more}"
    return _Drawing("scores", figure, caption)


def _cost(summary: Summary) -> _Drawing | None:
    """What a score costs, a panel per kind of cost."""
    metric = summary.y if summary.y is not None else summary.x if summary.x is not None else summary.metrics[0]
    there = [c for c in summary.contenders if summary.estimate(c, metric)]
    kinds = [key for key in COSTS if len({summary.costs[c][key] for c in there} - {None}) > 1]
    if len(there) < 2 or not kinds:
        return None
    figure = _figure(2.4 * min(3, len(kinds)) + 1.8, 2.5 * math.ceil(len(kinds) / 3))
    grid = figure.subplots(math.ceil(len(kinds) / 3), min(3, len(kinds)), sharey=True, squeeze=False)
    for axes in grid.flat[len(kinds) :]:
        axes.set_visible(False)
    for key, axes in zip(kinds, grid.flat):
        values = [value for c in there if (value := summary.costs[c][key]) is not None]
        if min(values) > 0 and max(values) > 5 * min(values):
            axes.set_xscale("log")
            if max(values) < 30 * min(values):
                axes.xaxis.set_major_locator(
                    LogLocator(subs=(1.0, 2.0, 5.0))
                )  # powers of ten alone would be one or two
        elif max(values) > 5 * (least := min((value for value in values if value > 0), default=1.0)):
            axes.set_xscale("symlog", linthresh=least)  # some cost nothing
        else:
            axes.locator_params(axis="x", nbins=4)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter())  # the logarithmic one writes formulas
        for number, c in enumerate(there):
            if (value := summary.costs[c][key]) is not None:
                found, look = summary.means[c, metric], _look(number)
                axes.errorbar(
                    value, found.mean, yerr=_whisker(found), **look, markersize=5.5, linewidth=1, capsize=2,
                    linestyle="none", label=summary.measured.names[c],
                )  # fmt: skip
        axes.set_xlabel(COSTS[key])
        axes.tick_params(labelsize=7.5)
    first = grid.flat[0]
    for row in grid:
        row[0].set_ylabel(head(summary, metric))
    if summary.measured.metrics[metric].lower_is_better:
        first.invert_yaxis()
    _legend(figure, first)
    same = [COSTS[key] for key in COSTS if len({summary.costs[c][key] for c in there} - {None}) == 1]
    caption = f"{summary.measured.metrics[metric].name} against what it costs: better is up and to the left."
    return _Drawing("cost", figure, caption + (f" The same for all: {'; '.join(same)}." if same else ""))


def _settings(summary: Summary) -> Iterator[_Drawing]:
    """Scores over each setting that is a number, a line per method that only this setting tells apart."""
    measured = summary.measured
    metrics = [metric for metric in dict.fromkeys((summary.x, summary.y)) if metric is not None] or summary.metrics[:1]
    found: dict[str, dict[str, dict[float, int]]] = {}  # setting -> line -> value -> contender
    for c in summary.contenders:
        for key, value, rest in _numbers(measured.contenders[c]):
            found.setdefault(key, {}).setdefault(rest, {})[value] = c
    for key, lines in found.items():
        kept = {name: dict(sorted(points.items())) for name, points in lines.items() if len(points) > 1}
        if kept:
            named = "training steps" if key == STEPS else key
            says = f"Scores over {named}, {intervals(summary)}."
            name = "steps" if key == STEPS else f"over_{_file(key)}"
            yield _Drawing(name, _curves(summary, metrics, kept, named), says)


def _numbers(contender: Contender) -> Iterator[tuple[str, float, str]]:
    """Each setting that is a number, and a variant that is one: its key, its value, and the name without it."""
    for key, text in contender.settings:
        if (value := _number(text)) is not None:
            rest = contender._replace(settings=tuple(pair for pair in contender.settings if pair[0] != key))
            yield key, value, rest.name
    key, _, text = contender.variant.partition("=")
    if (value := _number(text)) is not None:
        yield key, value, contender._replace(variant="").name


def _number(text: str) -> float | None:
    """A finite number, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _curves(summary: Summary, metrics: Sequence[int], lines: Mapping[str, Mapping[float, int]], named: str) -> Figure:
    """A panel per metric: means and intervals over a number."""
    values = {value for points in lines.values() for value in points}
    figure = _figure(3.0 * len(metrics) + 2.4, 3.0)
    grid = figure.subplots(1, len(metrics), squeeze=False)[0]
    for metric, axes in zip(metrics, grid, strict=True):
        for number, (name, points) in enumerate(lines.items()):
            found = {value: each for value, c in points.items() if (each := summary.estimate(c, metric))}
            middle = [each.mean for each in found.values()]
            sides = [_whisker(each) or [[0.0], [0.0]] for each in found.values()]
            whiskers = [[side[end][0] for side in sides] for end in (0, 1)]
            axes.errorbar(list(found), middle, yerr=whiskers, **_look(number), markersize=5, capsize=2, label=name)
        if min(values) > 0 and max(values) / min(values) >= 30:  # rates: they are chosen by factors
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())  # the logarithmic one writes formulas
        axes.set_xlabel(named)
        axes.set_ylabel(head(summary, metric))
        _towards_better(summary, metric, axes, "y")
    _legend(figure, grid[0])
    return figure


# ---- subject × prompt -----------------------------------------------------------------------------------------------


def _heat_maps(summary: Summary) -> Iterator[_Drawing]:
    """Subject × prompt of the trade-off's two scores: each method, and its difference to the baseline where one is."""
    measured = summary.measured
    metrics = [metric for metric in dict.fromkeys((summary.y, summary.x)) if metric is not None] or summary.metrics[:1]
    subjects = [measured.subject_name(s) for s in range(len(measured.subjects))]
    for metric in metrics:
        there = [c for c in summary.contenders if summary.estimate(c, metric)]
        more = f" The first {MOST_PANELS} of {len(there)} are shown." if len(there) > MOST_PANELS else ""
        there = there[:MOST_PANELS]
        name = measured.metrics[metric].name
        panels = [(measured.names[c], measured.values(c, metric).found()) for c in there]
        if found := _heat_map(measured.prompts, subjects, panels, head(summary, metric)):
            caption = f"{name} by subject and prompt (mean over seeds) of each method.{more}"
            yield _Drawing(f"map_{_file(name)}", found[0], caption, found[1])
        against = summary.baseline if summary.baseline is not None else there[0] if len(there) == 2 else None
        if against is None or (against, metric) not in summary.means:
            continue
        base = measured.values(against, metric)
        gains = [(measured.names[c], _gain(measured.values(c, metric), base)) for c in there if c != against]
        label = f"{name}, difference to {measured.names[against]}"
        if found := _heat_map(measured.prompts, subjects, gains, label, difference=True):
            caption = f"{name} minus that of {measured.names[against]}, by subject and prompt, on the same seeds.{more}"
            yield _Drawing(f"difference_{_file(name)}", found[0], caption, found[1])


def _gain(a: Values, b: Values) -> Values:
    """`a` minus `b` where both have the subject and prompt, paired by seeds as in the tests."""
    a, b = a.found(), b.found()
    cells = sorted(set(zip(a.subject.tolist(), a.prompt.tolist())) & set(zip(b.subject.tolist(), b.prompt.tolist())))
    found = []
    for subject, prompt in cells:
        parts = [Values(*(c[(v.subject == subject) & (v.prompt == prompt)] for c in v)) for v in (a, b)]
        if (pair := differences(*parts)) is not None:
            found.append((float(pair.means.mean()), subject, prompt))
    return Values.of(*zip(*found, strict=True)) if found else Values.of([], [])


def _heat_map(
    prompts: Sequence[str],
    subjects: Sequence[str],
    panels: Sequence[tuple[str, Values]],
    label: str,
    difference: bool = False,
) -> tuple[Figure, str] | None:
    """Panels of one colour scale, and the full texts of what is cut; None where nothing, or too much, can be compared.

    Where subjects have prompts of their own, as edits do, each of them is a row, and methods are the columns.
    """
    kept = [(name, v) for name, values in panels for v in [_with_prompt(values, prompts)] if len(v.value)]
    cells = sorted({cell for _, v in kept for cell in zip(v.subject.tolist(), v.prompt.tolist(), strict=True)})
    if len(cells) < 2:
        return None
    across = list(dict.fromkeys(subject for subject, _ in cells))
    down = sorted({prompt for _, prompt in cells})
    own = len(across) > 1 and len(cells) < 0.6 * len(across) * len(down)
    if max(len(cells) if own else len(down), 0 if own else len(across)) > MOST_CELLS:
        return None
    means = [_cell_means(v) for _, v in kept]
    names = [name for name, _ in kept]
    if own:
        rows = [f"{subjects[s]}: {_prompt(prompts[p])}" for s, p in cells]
        columns, titles = names, [""]
        tables = [np.array([[found.get(cell, np.nan) for found in means] for cell in cells])]
    else:
        rows, columns, titles = [_prompt(prompts[p]) for p in down], [subjects[s] for s in across], names
        tables = [np.array([[found.get((s, p), np.nan) for s in across] for p in down]) for found in means]
    shown_rows, shown_columns = shortened(rows, 80 if own else 56), shortened(columns, 24)
    figure = _panels(tables, titles, shown_rows, shown_columns, label, difference)
    cut = [text for text, short in zip([*rows, *columns], [*shown_rows, *shown_columns], strict=True) if text != short]
    return figure, "\n".join(cut)


def _panels(
    tables: Sequence[NDArray[np.float64]],
    titles: Sequence[str],
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
    difference: bool,
) -> Figure:
    """A heat map per table, with a common scale; titles are wrapped, so that none is cut."""
    size = (max(1.7, 0.22 * len(columns)), max(0.8, 0.2 * len(rows)))
    across = min(4 if len(columns) < 6 else 3, len(tables))
    down = math.ceil(len(tables) / across)
    wrapped = ["\n".join(textwrap.wrap(title, int(size[0] / 0.075))) for title in titles]
    lines = 1 + max(title.count("\n") for title in wrapped)
    beside = 0.4 + 0.062 * max(map(len, rows))  # inches that the rows' names take
    figure = _figure(size[0] * across + beside + 1.0, (size[1] + 0.16 + 0.14 * lines) * down + 0.9)
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    low, high = (
        float(np.nanmin([np.nanmin(table) for table in tables])),
        float(np.nanmax([np.nanmax(t) for t in tables])),
    )
    if difference:
        low, high = -max(abs(low), abs(high)), max(abs(low), abs(high))
    for axes in grid.flat[len(tables) :]:
        axes.set_visible(False)
    for number, (axes, table, title) in enumerate(zip(grid.flat, tables, wrapped)):
        image = axes.imshow(table, vmin=low, vmax=high, cmap="PuOr" if difference else "cividis", aspect="auto")
        axes.set_title(title, fontsize=8)
        axes.grid(False)
        axes.set_facecolor("#cfd5db")  # nothing there: neither of the scales has this grey
        axes.set_yticks(range(len(rows)), rows, fontsize=7)
        axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right", fontsize=7)
        axes.tick_params(length=0, labelbottom=number + across >= len(tables))
    # The scale is as high as the figure; its name may take two lines.
    high_as = int(figure.get_figheight() * 0.8 / 0.075)
    bar = figure.colorbar(image, ax=grid.ravel().tolist(), shrink=0.9, pad=0.02)
    bar.set_label("\n".join(textwrap.wrap(label, max(12, high_as))), fontsize=8)
    return figure


def _cell_means(values: Values) -> dict[tuple[int, int], float]:
    """(subject, prompt) -> mean over seeds."""
    found: dict[tuple[int, int], list[float]] = {}
    for subject, prompt, value in zip(
        values.subject.tolist(), values.prompt.tolist(), values.value.tolist(), strict=True
    ):
        found.setdefault((subject, prompt), []).append(value)
    return {cell: sum(each) / len(each) for cell, each in found.items()}


def _with_prompt(values: Values, prompts: Sequence[str]) -> Values:
    """Without scores of several pictures, which have no prompt."""
    there = np.array([bool(prompts[p]) for p in values.prompt], dtype=bool)
    return Values(*(column[there] for column in values))


def _prompt(text: str) -> str:
    return text.replace("{}", "S*")


def _file(name: str) -> str:
    """A score's name as part of a file's: names come from files, and choose no folder."""
    return "".join(letter if letter.isalnum() and letter.isascii() else "_" for letter in name)[:40]
