"""A comparison as text: for the terminal, Markdown, LaTeX, CSV and JSON. Names from outside are escaped."""

from __future__ import annotations

import csv
import html
import io
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from hiperlab.compare.claims import FAILS, HEAD, HOLDS, NOT_MEASURED, UNDECIDED, lines, plain
from hiperlab.compare.runs import COSTS
from hiperlab.compare.statistics import Estimate
from hiperlab.compare.summary import BEST, SECOND, Summary
from hiperlab.errors import human_bytes
from hiperlab.metric.rows import ALL, CONCEPT, Row

FORMAT = 1
LATEX_METRICS = 5  # columns of a LaTeX table: more do not fit a page's width
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': "''", "−": "$-$", "–": "--", "↓": r"$\downarrow$", "↑": r"$\uparrow$", "·": r"$\cdot$",
    "≥": r"$\geq$", "±": r"$\pm$",
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
    return "\n".join([*shown, *summary.notes])


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
            "Rank, its 95 % bootstrap interval, and the probability of being the best.",
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


def caption(summary: Summary) -> str:
    """What the table of scores is."""
    measured = summary.measured
    units = {each.unit for (_, m), each in summary.means.items() if m in summary.metrics}
    over = (
        "subjects" if units == {"subjects"} else "prompts of one subject" if units == {"prompts"} else "/".join(units)
    )
    counts = [(len(measured.runs), "run"), (len(measured.subjects), "subject")]
    sizes = ", ".join(f"{count} {name}{'s' * (count != 1)}" for count, name in counts)
    return (
        f"Protocol {measured.protocol}; {sizes}. Means over {over} of means over prompts and seeds, with 95 % "
        f"bootstrap intervals over {over}. The best mean is bold, the second underlined."
    )


def test_caption(summary: Summary) -> str:
    """What the table of differences is."""
    whom = "all pairs" if summary.baseline is None else f"all against {summary.measured.names[summary.baseline]}"
    return (
        f"{whom[0].upper()}{whom[1:]}, on the same subjects, prompts and seeds: mean difference with its 95 % "
        "bootstrap interval, p of a two-sided sign-flip test over subjects, and p after Holm's correction within the "
        "metric."
    )


def rank_caption(summary: Summary) -> str:
    """What the table of ranks is."""
    over = sorted({f"{count} {unit}" for unit, count in summary.ranked_over.values()})
    return (
        f"Place by the mean over what all methods have in common ({', '.join(over)}), 1 is the best; in brackets where "
        "95 % of its bootstrap resamples lie, and the share of them in which the method is first."
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
    """Text that LaTeX prints as it is."""
    return "".join(_LATEX.get(letter, letter) for letter in " ".join(found.split()))


def latex(summary: Summary) -> str:
    """Tables for a paper with the package booktabs: scores, at most five metrics wide each, then differences."""

    def mark(number: str, place: str) -> str:
        number = escape_latex(number)
        return {BEST: rf"\textbf{{{number}}}", SECOND: rf"\underline{{{number}}}"}.get(place, number)

    parts = ["% \\usepackage{booktabs}", *(f"% {' '.join(note.split())}" for note in summary.notes)]
    for begin in range(0, len(summary.metrics), LATEX_METRICS):
        metrics = summary.metrics[begin : begin + LATEX_METRICS]
        names = ["Method", *(escape_latex(head(summary, m)) for m in metrics)]
        lines = []
        for line in _cells(summary, metrics, mark):
            cells = [re.sub(r" \[(.*)\]$", _small, cell) for cell in line[1:-1]]
            lines.append([escape_latex(line[0]), *cells])
        parts.append(_tabular(names, lines, "l" + "c" * len(metrics), caption(summary)))
    if summary.differences:
        names, *lines = differences(summary)
        escaped = [[escape_latex(cell) for cell in line] for line in lines]
        parts.append(_tabular([escape_latex(n) for n in names], escaped, "lllrcrrl", test_caption(summary)))
    if summary.verdicts:
        names, *lines = claims(summary)
        escaped = [[escape_latex(cell) for cell in line] for line in lines]
        wide = r"p{4cm}p{4cm}p{3cm}rccll"
        parts.append(_tabular([escape_latex(n) for n in names], escaped, wide, claims_caption(summary)))
    return "\n\n".join(parts) + "\n"


def _small(found: re.Match[str]) -> str:
    """An interval in small letters."""
    return rf" {{\scriptsize [{escape_latex(found[1])}]}}"


def _tabular(names: Sequence[str], lines: Sequence[Sequence[str]], columns: str, says: str) -> str:
    body = "\n".join(f"{' & '.join(line)} \\\\" for line in lines)
    return (
        f"\\begin{{table*}}\n\\centering\\small\n\\caption{{{escape_latex(says)}}}\n\\begin{{tabular}}{{{columns}}}\n"
        f"\\toprule\n{' & '.join(names)} \\\\\n\\midrule\n{body}\n\\bottomrule\n\\end{{tabular}}\n\\end{{table*}}"
    )


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
    return [claims_caption(summary), *(f"  {each.verdict:9}  {each.claim.says}" for each in measured)]


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
