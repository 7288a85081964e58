"""A comparison as text: for the terminal, Markdown, LaTeX, CSV and JSON. Names from outside are escaped."""

from __future__ import annotations

import csv
import html
import io
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from hiperlab.compare.claims import FAILS, HEAD, HOLDS, NOT_MEASURED, UNDECIDED, Verdict, lines, margins, plain
from hiperlab.compare.runs import COSTS
from hiperlab.compare.statistics import PICTURES, PROMPTS, SUBJECTS, Estimate
from hiperlab.compare.summary import BEST, SECOND, Summary
from hiperlab.errors import human_bytes
from hiperlab.metric.rows import ALL, CONCEPT, Row

FORMAT = 1
LATEX_METRICS = 6  # columns of a LaTeX table: more do not fit a page's width
LATEX_ROWS = 25  # methods, or tests, of one: more do not fit its height
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': "''", "−": "$-$", "–": "--", "↓": r"$\downarrow$", "↑": r"$\uparrow$", "·": r"$\cdot$",
    "≥": r"$\geq$", "±": r"$\pm$", "×": r"$\times$", "…": r"\ldots{}", "[": "{[}", "]": "{]}", "*": "{*}",
}  # fmt: skip
Mark = Callable[[str, str], str]  # a number as text and "best", "second" or "" -> with its emphasis


def head(summary: Summary, metric: int) -> str:
    """A metric's name with the direction in which it is better."""
    found = summary.measured.metrics[metric]
    return f"{found.name} {'↓' if found.lower_is_better else '↑'}"


def bounds(summary: Summary, metric: int, low: float | None, high: float | None, sign: bool = False) -> str:
    """An interval as tables show it; "" without one."""
    if low is None or high is None:
        return ""
    return f"[{summary.number(metric, low, sign)}, {summary.number(metric, high, sign)}]"


def p_value(p: float) -> str:
    """A p value as tables show it."""
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def cost(column: str, value: float | None) -> str:
    """A cost as tables show it."""
    if value is None:
        return "–"
    if column in ("peak_memory", "artifact_bytes"):
        return human_bytes(value)
    return f"{value:,.0f}".replace(",", "\N{THIN SPACE}") if column == "trained_parameters" else f"{value:.3g}"


def text(summary: Summary) -> str:
    """For the terminal: a line per method, with intervals, the number of pictures, and what must be known."""
    names = ["method", *(head(summary, m) for m in summary.metrics), "pictures"]
    lines = [names, *_cells(summary, summary.metrics, lambda number, _: number)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
    shown = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    unlike = summary.measured.unlike
    return "\n".join([*filter(None, [unlike]), *shown, *(note for note in summary.notes if note != unlike)])


def _cells(summary: Summary, metrics: Sequence[int], mark: Mark) -> list[list[str]]:
    """Per contender its name, a mean with its interval per metric, and how many pictures these are of."""
    marks = {metric: summary.marks(metric) for metric in metrics}
    lines = []
    for c in summary.contenders:
        found = {metric: summary.estimate(c, metric) for metric in metrics}
        cells = [_mean(summary, m, each, mark, marks[m].get(c, "")) for m, each in found.items()]
        pictures = max((each.num_values for each in found.values() if each), default=0)
        lines.append([summary.measured.names[c], *cells, str(pictures)])
    return lines


def _mean(summary: Summary, metric: int, found: Estimate | None, mark: Mark, place: str) -> str:
    if found is None:
        return "–"
    between = bounds(summary, metric, found.low, found.high)
    return f"{mark(summary.number(metric, found.mean), place)}{' ' if between else ''}{between}"


# ---- Markdown -------------------------------------------------------------------------------------------------------


def escape_markdown(found: str) -> str:
    """Text that Markdown shows as it is, in a table too."""
    return re.sub(r"([\\`*_{}\[\]#|~$!])", r"\\\1", html.escape(" ".join(found.split()), quote=False))


def markdown(summary: Summary) -> str:
    """The page's tables as Markdown."""

    def mark(number: str, place: str) -> str:
        return {BEST: f"**{number}**", SECOND: f"<u>{number}</u>"}.get(place, number)

    escaped = escape_markdown
    scores = [["method", *(head(summary, m) for m in summary.metrics), "pictures"]]
    scores = [[escaped(cell) for cell in scores[0]]]
    scores += [[escaped(line[0]), *line[1:]] for line in _cells(summary, summary.metrics, mark)]
    parts = ["# Comparison", *(f"> {escaped(note)}" for note in summary.notes), escaped(caption(summary))]
    parts.append(_pipes(scores))
    if summary.differences:
        lines = [[escaped(cell) for cell in line] for line in differences(summary)]
        parts += ["## Paired differences", escaped(test_caption(summary)), _pipes(lines)]
    if summary.ranks:
        lines = [[escaped(cell) for cell in line] for line in ranks(summary)]
        parts += [
            "## Ranks",
            escaped(rank_caption(summary)),
            _pipes(lines),
        ]
    parts += ["## Cost", _pipes([[escaped(cell) for cell in line] for line in costs(summary)])]
    if summary.verdicts:
        lines = [[escaped(cell) for cell in line] for line in claims(summary)]
        parts += ["## Published orderings", escaped(claims_caption(summary)), _pipes(lines)]
    if summary.measured.left_out:
        parts += ["## Left out", "\n".join(f"- {escaped(line)}" for line in summary.measured.left_out)]
    return "\n\n".join(parts) + "\n"


def _pipes(lines: Sequence[Sequence[str]]) -> str:
    rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([rows[0], f"|{'---|' * len(lines[0])}", *rows[1:]])


# ---- parts that every form shows ------------------------------------------------------------------------------------


def over(units: Sequence[str]) -> str:
    """What means and tests are over, in words."""
    words = {PROMPTS: "prompts of one subject", PICTURES: "pictures of one prompt"}
    return " or ".join(words.get(unit, unit) for unit in units)


def intervals(summary: Summary) -> str:
    """Which intervals the means have, for a caption."""
    if summary.intervals:
        return f"with 95 % bootstrap intervals over {over(summary.units)}"
    return f"without intervals, as there is one {over(summary.units).replace('s of', ' of', 1).removesuffix('s')} only"


def caption(summary: Summary) -> str:
    """What the table of scores is."""
    measured = summary.measured
    counts = [(len(measured.runs), "run"), (len(measured.subjects), "subject")]
    sizes = ", ".join(f"{count} {name}{'s' * (count != 1)}" for count, name in counts)
    of = {SUBJECTS: "subjects of means over prompts and seeds", PROMPTS: "prompts of means over seeds"}
    means = " or ".join(of.get(unit, unit) for unit in summary.units)
    order = "" if summary.ranked_by is None else f" Methods are in the order of {head(summary, summary.ranked_by)}."
    return (
        f"Protocol {measured.protocol}; {sizes}. Means over {means}, {intervals(summary)}. The best is bold, the "
        f"second underlined, by means that are not rounded, over what all methods have in common.{order}"
    )


def test_caption(summary: Summary) -> str:
    """What the table of differences is."""
    whom = "all pairs" if summary.baseline is None else f"all against {summary.measured.names[summary.baseline]}"
    return f"{whom[0].upper()}{whom[1:]}, on the same subjects, prompts and seeds: {tested(summary)}"


def tested(summary: Summary) -> str:
    """What is said of a pair of methods."""
    units = over(sorted({each.found.unit for each in summary.differences}))
    if all(each.found.low is None for each in summary.differences):
        return "mean difference. There is nothing to draw anew, so that neither an interval nor a test exists."
    return (
        f"mean difference with its 95 % bootstrap interval, p of a two-sided sign-flip test over {units}, and p after "
        "Holm's correction within the metric."
    )


def rank_caption(summary: Summary) -> str:
    """What the table of ranks is."""
    over = sorted({f"{count} {unit if count != 1 else unit[:-1]}" for unit, count in summary.ranked_over.values()})
    spread = any(rank.low is not None for found in summary.ranks.values() for rank in found.values())
    return f"Place by the mean over what all methods have in common ({', '.join(over)}), 1 is the best" + (
        "; in brackets where 95 % of its bootstrap resamples lie, and the share of them in which it is first."
        if spread
        else ". There is nothing to draw anew, so that no interval exists."
    )


def differences(summary: Summary) -> list[list[str]]:
    """Lines of the table of differences, its head first."""
    names, lines = summary.measured.names, [["metric", "A", "B", "A − B", "95 % interval", "p", "p (Holm)", "n"]]
    for each in summary.differences:
        found, metric = each.found, each.metric
        number, between = summary.number(metric, found.difference, sign=True), bounds(
            summary, metric, found.low, found.high, sign=True
        )  # fmt: skip
        count = f"{found.num_units} {found.unit}"
        ps = [p_value(found.p), p_value(each.holm)]
        lines.append([head(summary, metric), names[each.a], names[each.b], number, between or "–", *ps, count])
    return lines


def ranks(summary: Summary) -> list[list[str]]:
    """Lines of the table of ranks, its head first."""
    metrics = [metric for metric in summary.metrics if metric in summary.ranks]
    lines = [["method", *(head(summary, m) for m in metrics)]]
    for c in summary.contenders:
        cells = []
        for metric in metrics:
            found = summary.ranks[metric].get(c)
            cells.append("–" if found is None else f"{found.rank:g}" if found.low is None or found.best is None else (
                f"{found.rank:g} [{found.low:g}, {found.high:g}] {100 * found.best:.0f} %"
            ))  # fmt: skip
        lines.append([summary.measured.names[c], *cells])
    return lines


def costs(summary: Summary) -> list[list[str]]:
    """Lines of the table of costs, its head first."""
    lines = [["method", *COSTS.values()]]
    for c in summary.contenders:
        lines.append([summary.measured.names[c], *(cost(key, summary.costs[c][key]) for key in COSTS)])
    return lines


# ---- LaTeX ----------------------------------------------------------------------------------------------------------


def escape_latex(found: str) -> str:
    """Text that LaTeX prints as it is; in braces where the beginning of a row would be read as an option."""
    return "".join(_LATEX.get(letter, letter) for letter in " ".join(found.split()) if letter.isprintable())


def latex(summary: Summary) -> str:
    """Tables for a paper with the package booktabs: scores, differences to one method, and orderings.

    Scores have their interval below them. Differences are to the baseline, without one to the best of each score: all
    pairs are in comparison.md and .json.
    """
    parts = [
        "% \\usepackage{booktabs}; letters beyond Latin ones need LuaLaTeX or XeLaTeX",
        *(f"% {' '.join(note.split())}" for note in summary.notes),
    ]
    groups = _evenly(summary.metrics, LATEX_METRICS)
    scores = " ".join([caption(summary), summary.measured.unlike]).strip()
    forms = [("scores", _latex_scores, scores)]
    if summary.differences:
        forms.append(("differences", _latex_differences, _against(summary)))
    for label, rows_of, says in forms:
        for number, metrics in enumerate(groups, 1):
            names = ["Method", *(head(summary, m) for m in metrics)]
            label_of = f"{label}-{number}" if len(groups) > 1 else label
            parts += _floats(names, rows_of(summary, metrics), "l" + "c" * len(metrics), says, label_of)
    if summary.verdicts:
        rows = _latex_claims([each for each in summary.verdicts if each.verdict != NOT_MEASURED])
        names = ["Ordering", "Test", "Difference", "p", "Verdict"]
        parts += _floats(names, rows, r"p{4.6cm}p{4.2cm}ccl", claims_caption(summary), "orderings")
    return "\n\n".join(parts) + "\n"


def _evenly(metrics: Sequence[int], most: int) -> list[Sequence[int]]:
    """Parts of at most `most`, as equally long as can be."""
    count = math.ceil(len(metrics) / most)
    ends = [round(part * len(metrics) / count) for part in range(count + 1)]
    return [metrics[begin:end] for begin, end in pairwise(ends)]


def _latex_scores(summary: Summary, metrics: Sequence[int]) -> list[str]:
    """Per method a row of means, and one of their intervals where it has any."""
    emphasis = {BEST: r"\textbf{%s}", SECOND: r"\underline{%s}"}
    rows = []
    for c in summary.contenders:
        means, below = [escape_latex(summary.measured.names[c])], [""]
        for m in metrics:
            found = summary.estimate(c, m)
            number = escape_latex(summary.number(m, found.mean if found else None))
            means.append(emphasis.get(summary.marks(m).get(c, ""), "%s") % number)
            below.append(_small(bounds(summary, m, found.low, found.high) if found else ""))
        rows.append("\n".join(_row(cells) for cells in (means, below) if any(cells)))
    return rows


def _latex_differences(summary: Summary, metrics: Sequence[int]) -> list[str]:
    """Per method its differences to one method: the mean, and p after Holm's correction."""
    tests = {(each.metric, a, b): (sign, each) for each in summary.differences
             for sign, a, b in ((1, each.a, each.b), (-1, each.b, each.a))}  # fmt: skip
    rows = []
    for c in summary.contenders:
        cells = []
        for m in metrics:
            to = _reference(summary, m)
            sign, each = tests.get((m, c, to), (0, None)) if to is not None else (0, None)
            if each is None:
                cells.append("0" if c == to else "--")
                continue
            number = escape_latex(summary.number(m, sign * each.found.difference, sign=True))
            p = "" if each.found.low is None else _small(f"p={p_value(each.holm)}")
            cells.append(f"{number} {p}".rstrip())
        if c != summary.baseline:
            rows.append(_row([escape_latex(summary.measured.names[c]), *cells]))
    return rows


def _reference(summary: Summary, metric: int) -> int | None:
    """Whom the others are compared with: the baseline, else the best; of several that are best the first."""
    if summary.baseline is not None:
        return summary.baseline
    return next((c for c, mark in summary.marks(metric).items() if mark == BEST), None)


def _against(summary: Summary) -> str:
    """What the table of differences to one method is."""
    to = "the best of each score (0)" if summary.baseline is None else summary.measured.names[summary.baseline]
    tests = "all pairs" if summary.baseline is None else "all methods against it"
    says = f"Mean difference to {to} on the same subjects, prompts and seeds"
    if all(each.found.low is None for each in summary.differences):
        return f"{says}. There is nothing to draw anew, so that no test exists."
    units = over(sorted({each.found.unit for each in summary.differences}))
    return (
        f"{says}; p of a two-sided sign-flip test over {units} after Holm's correction for tests of {tests} within the "
        "score."
    )


def _latex_claims(verdicts: Sequence[Verdict]) -> list[str]:
    """Per test of a claim a row, with its source as a comment: a paper cites it in its own way."""
    rows = []
    for verdict in verdicts:
        source = f"% {' '.join(verdict.claim.source.split())}\n"
        for finding, (says, _, asked, number, between, p, _, kind) in zip(
            verdict.findings, lines([verdict]), strict=True
        ):
            interval = _small(between) if finding.found else ""
            cells = [*map(escape_latex, (says, asked, number)), *map(escape_latex, (p, kind))]
            cells[2] = f"{cells[2]} {interval}".rstrip()
            rows.append(f"{source}{_row(cells)}")
            source = ""
    return rows


def _small(found: str) -> str:
    """What stands behind or below a number, in small letters."""
    return rf"{{\scriptsize {escape_latex(found)}}}" if found else ""


def _row(cells: Sequence[str]) -> str:
    return f"{' & '.join(cells)} \\\\"


def _floats(names: Sequence[str], rows: Sequence[str], columns: str, says: str, label: str) -> list[str]:
    """Tables of at most `LATEX_ROWS` rows: a float cannot be longer than a page."""
    found = []
    for begin in range(0, len(rows), LATEX_ROWS):
        more = f" ({begin // LATEX_ROWS + 1} of {math.ceil(len(rows) / LATEX_ROWS)})" if len(rows) > LATEX_ROWS else ""
        body = "\n".join(rows[begin : begin + LATEX_ROWS])
        name = f"tab:{label}{f'-rows-{begin + 1}' if begin else ''}"
        found.append(
            f"\\begin{{table*}}\n\\centering\\small\\setlength{{\\tabcolsep}}{{4pt}}\n"
            f"\\caption{{{escape_latex(says + more)}}}\n\\label{{{name}}}\n\\begin{{tabular}}{{{columns}}}\n\\toprule\n"
            f"{_row([escape_latex(name) for name in names])}\n\\midrule\n{body}\n\\bottomrule\n\\end{{tabular}}\n"
            "\\end{table*}"
        )
    return found


def claims(summary: Summary) -> list[list[str]]:
    """A line per test of each claim that was measured, with a head."""
    return [list(HEAD), *lines([each for each in summary.verdicts if each.verdict != NOT_MEASURED])]


def claims_caption(summary: Summary) -> str:
    """How many hold, and what that means."""
    counts = Counter(each.verdict for each in summary.verdicts)
    words = {HOLDS: "hold", FAILS: "fail", UNDECIDED: "are undecided", NOT_MEASURED: "were not measured"}
    said = ", ".join(f"{counts[kind]} {word}" for kind, word in words.items() if counts[kind])
    return (
        f"Of {len(summary.verdicts)} orderings {said}. By the 95 % interval of the paired difference, turned "
        "so that more is better, each by itself: not corrected for their number, and of few subjects too narrow (see "
        "the notes); p is the sign-flip test's. Judged by "
        f"{summary.measured.protocol}, which says nothing of other weights and judges."
    )


def claims_text(summary: Summary) -> list[str]:
    """The same for the terminal: a line per claim that was measured."""
    measured = [each for each in summary.verdicts if each.verdict != NOT_MEASURED]
    if not summary.verdicts:
        return []
    return [claims_caption(summary), *(f"  {each.verdict:9}  {each.claim.says}{margins(each)}" for each in measured)]


# ---- CSV and JSON ---------------------------------------------------------------------------------------------------


def rows(summary: Summary) -> list[Row]:
    """One line per method, metric and subject, then over all: `hiperlab.metric.rows.TableRow`s with more columns.

    Intervals of a subject are over its prompts, those over all over subjects (`unit` says which).
    """
    measured, found = summary.measured, []
    protocol, _, digest = measured.protocol.partition(" ")
    for c in summary.contenders:
        contender = measured.contenders[c]
        names = {"label": contender.name, "method": contender.method, **dict(contender.settings)}
        for m in summary.metrics:
            metric = measured.metrics[m]
            stamp = {"protocol": protocol, "protocol_hash": digest, "trained": measured.trained}
            stamp |= {"weights": metric.weights, "lower_is_better": metric.lower_is_better}
            subjects = [s for s in range(len(measured.subjects)) if (c, m, s) in summary.by_subject]
            ceilings = [measured.ceilings.get((m, s)) for s in subjects]
            known = [value for value in ceilings if value is not None]
            whole = sum(known) / len(known) if known and len(known) == len(subjects) else None
            places = [*zip(subjects, ceilings, strict=True), (None, whole)]
            for subject, ceiling in places:
                if (each := summary.estimate(c, m, subject)) is None:
                    continue
                data, concept = ("", "") if subject is None else measured.subjects[subject]
                of = {"kind": ALL if subject is None else CONCEPT, "data": data, "concept": concept}
                found.append({
                    **names, "variant": contender.variant, "metric": metric.name, **of, "mean": each.mean,
                    "low": each.low, "high": each.high, "n": each.num_values, "unit": each.unit,
                    "num_units": each.num_units, "missed": _missed(summary, c, m, subject), "ceiling": ceiling, **stamp,
                })  # fmt: skip
    return found


def _missed(summary: Summary, contender: int, metric: int, subject: int | None) -> int:
    """Pictures in which the judge found nothing."""
    if subject is None:
        return summary.missed[contender, metric]
    values = summary.measured.values(contender, metric)
    return int((values.value[values.subject == subject] != values.value[values.subject == subject]).sum())


def as_csv(summary: Summary) -> str:
    """`rows` with a head; empty cells for what is unknown."""
    found = rows(summary)
    names = list(dict.fromkeys(key for row in found for key in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return buffer.getvalue()


def document(summary: Summary) -> dict[str, Any]:
    """Everything that the page says, for programs: `table` holds `rows`."""
    measured, names = summary.measured, summary.measured.names
    metric = [each.name for each in measured.metrics]
    return {
        "format": FORMAT,
        "protocol": measured.protocol,
        "runs": [str(run.folder) for run in measured.runs],
        "left_out": measured.left_out,
        "notes": summary.notes,
        "table": rows(summary),
        "differences": [
            {"metric": metric[d.metric], "a": names[d.a], "b": names[d.b], **d.found._asdict(), "p_holm": d.holm}
            for d in summary.differences
        ],
        "ranks": [
            {"metric": metric[m], "method": names[c], **rank._asdict(), "unit": unit, "num_units": count}
            for m, found in summary.ranks.items()
            for unit, count in [summary.ranked_over[m]]
            for c, rank in found.items()
        ],
        "trade_off": {
            "x": None if summary.x is None else metric[summary.x],
            "y": None if summary.y is None else metric[summary.y],
            "pareto_front": [names[c] for c in summary.front],
        },
        "claims": plain(summary.verdicts),
        "cost": [{"method": names[c], **summary.costs[c]} for c in summary.contenders],
    }
