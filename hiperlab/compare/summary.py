"""From columns of scores to what a comparison says: means, differences, ranks, the trade-off, cost, and its caveats."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations

import numpy as np

from hiperlab.compare import statistics
from hiperlab.compare.claims import Claim, Verdict, judge
from hiperlab.compare.runs import COSTS, Measured
from hiperlab.compare.statistics import PICTURES, SUBJECTS, Estimate, Paired, Rank
from hiperlab.errors import UserError, near
from hiperlab.metric.bootstrap import most_coverage

# Which score says how far the text was followed, and which how far the subject is itself: the first that was measured.
EDITABILITY = ("clip_text", "clip_edited", "direction")
IDENTITY = (  # held-out pictures first: likeness to those that were trained on rewards copies of them
    "identity_held_out", "dino_held_out", "identity", "face", "dino", "dinov2", "clip_image", "structure", "lpips",
    "ns_lpips", "background_psnr",
)  # fmt: skip
MOST_PAIRS = 300  # of methods, without a baseline: beyond, a table of all differences can be read by nobody
ENOUGH = 6  # subjects: the least of which p can be below 0.05
RANKED_BY = "likeness_in_context"  # the default order of methods: a copier is last by it, first by likeness alone
UNTRAINED = "UNTRAINED"  # as runs say it of their judges, too
BEST, SECOND = "best", "second"


@dataclass(frozen=True)
class Difference:
    """`a` minus `b` under a metric (places in `Measured`), and its p value adjusted within the metric (Holm 1979)."""

    metric: int
    a: int
    b: int
    found: Paired
    holm: float


@dataclass(frozen=True)
class Summary:
    """What tables, plots and the page show; contenders, metrics and subjects by their places in `measured`.

    Attributes:
        measured: what was read.
        metrics: those that are shown.
        baseline: the contender that all are compared with; None for all pairs.
        means: (contender, metric) -> over all subjects.
        by_subject: (contender, metric, subject) -> over its prompts.
        missed: (contender, metric) -> pictures in which the judge found nothing.
        differences: paired, grouped by metric.
        ranks: metric -> contender -> its place; over what all have in common.
        ranked_over: metric -> ("subjects", how many) that the ranks are over.
        x, y: metrics of the trade-off, None where it has none.
        front: contenders on its Pareto front.
        costs: per contender, mean over its runs.
        notes: what a reader must know before believing a number.
        verdicts: on published orderings, where they were asked for.
    """

    measured: Measured
    metrics: list[int]
    baseline: int | None
    means: dict[tuple[int, int], Estimate]
    by_subject: dict[tuple[int, int, int], Estimate]
    missed: dict[tuple[int, int], int]
    differences: list[Difference]
    ranks: dict[int, dict[int, Rank]]
    ranked_over: dict[int, tuple[str, int]]
    x: int | None
    y: int | None
    front: list[int]
    costs: list[dict[str, float | None]]
    notes: list[str]
    verdicts: list[Verdict] = field(default_factory=list)

    @cached_property
    def contenders(self) -> list[int]:
        """Those with a score that is shown: the best first by `ranked_by`, else as they were found."""
        found = [c for c in range(len(self.measured.contenders)) if any((c, m) in self.means for m in self.metrics)]
        if (metric := self.ranked_by) is None:
            return found
        means = {c: self.means[c, metric].mean for c in found if (c, metric) in self.means}
        return sorted(found, key=lambda c: -means.get(c, -math.inf))

    @cached_property
    def ranked_by(self) -> int | None:
        """The score that lines are in the order of: the one that copying does not win, where it is shown."""
        return next((m for m in self.metrics if self.measured.metrics[m].name == RANKED_BY), None)

    @cached_property
    def decimals(self) -> dict[int, int]:
        """Metric -> decimal places that show three digits of its largest mean."""
        found = {}
        for metric in self.metrics:
            largest = max((abs(each.mean) for (_, m), each in self.means.items() if m == metric), default=0.0)
            digits = 2 - math.floor(math.log10(largest)) if largest > 0 else 3
            found[metric] = min(7, max(2 if largest >= 10 else 3, digits))
        return found

    def number(self, metric: int, value: float | None, sign: bool = False) -> str:
        """A score as tables show it; a real minus sign, an en dash for none."""
        if value is None or not math.isfinite(value):
            return "–"
        value += 0.0  # -0.0 is nothing negative
        text = f"{value:+.{self.decimals[metric]}f}" if sign else f"{value:.{self.decimals[metric]}f}"
        return text.replace("-", "−")

    def marks(self, metric: int, subject: int | None = None) -> dict[int, str]:
        """Contender -> "best" or "second"; none where there is nothing to choose from.

        By its rank, which is over what all methods have in common; of one subject, and where there is nothing in
        common, by the mean. Neither is rounded to what tables show.
        """
        if (metric, subject) not in self._marks:
            ranked = self.ranks.get(metric, {}) if subject is None else {}
            found = {c: self.estimate(c, metric, subject) for c in self.contenders}
            sign = 1 if self.measured.metrics[metric].lower_is_better else -1
            places = {c: each.rank for c, each in ranked.items()} or {
                c: round(sign * each.mean, statistics.DIGITS) for c, each in found.items() if each
            }
            self._marks[metric, subject] = _first_two(places)
        return self._marks[metric, subject]

    @cached_property
    def _marks(self) -> dict[tuple[int, int | None], dict[int, str]]:
        """What `marks` found: tables of many lines ask again and again."""
        return {}

    @cached_property
    def units(self) -> list[str]:
        """What the shown means are over, each once: subjects, or prompts or pictures of one."""
        return sorted({each.unit for (_, m), each in self.means.items() if m in self.metrics})

    @cached_property
    def intervals(self) -> bool:
        """Whether any shown mean has an interval: a single unit has none."""
        return any(each.low is not None for (_, m), each in self.means.items() if m in self.metrics)

    def estimate(self, contender: int, metric: int, subject: int | None = None) -> Estimate | None:
        """The mean over all subjects, or over the prompts of one; None without a number."""
        if subject is None:
            return self.means.get((contender, metric))
        return self.by_subject.get((contender, metric, subject))


def _first_two(places: Mapping[int, float]) -> dict[int, str]:
    """The least is the best; two that are best together leave no second, and of equal ones alone none is."""
    order = sorted(set(places.values()))
    if len(order) < 2:
        return {}
    marks = {order[0]: BEST, order[1]: SECOND}
    if sum(place == order[0] for place in places.values()) > 1:
        del marks[order[1]]
    return {c: marks[place] for c, place in places.items() if place in marks}


def summarise(
    measured: Measured,
    metrics: Sequence[str] = (),
    baseline: str | None = None,
    x: str | None = None,
    y: str | None = None,
    claims: Sequence[Claim] = (),
) -> Summary:
    """Compare.

    Args:
        measured: what was read.
        metrics: names of those to show; none stands for all.
        baseline: name of a contender, or of a method that has only one.
        x: metric of the trade-off's horizontal axis, None for a score of the text.
        y: metric of its vertical axis, None for a score of the subject.
        claims: orderings to ask the runs.

    Raises:
        UserError: a name that is none of those measured.
    """
    names = [each.name for each in measured.metrics]
    chosen = [_metric(name, names) for name in dict.fromkeys(metrics)] or list(range(len(names)))
    against = None if baseline is None else _contender(measured, baseline)
    text, identity = _axis(x, EDITABILITY, names), _axis(y, IDENTITY, names)
    wanted = sorted({*chosen, *(m for m in (text, identity) if m is not None)}, key=lambda m: (m not in chosen, m))
    means, by_subject, missed = _means(measured, wanted)
    differences, skipped = _differences(measured, chosen, against, means)
    ranks, ranked_over = _ranks(measured, chosen, means)
    return Summary(
        measured=measured,
        metrics=chosen,
        baseline=against,
        means=means,
        by_subject=by_subject,
        missed=missed,
        differences=differences,
        ranks=ranks,
        ranked_over=ranked_over,
        x=text,
        y=identity,
        front=_front(measured, means, text, identity),
        costs=_costs(measured),
        notes=[
            *filter(None, [measured.unlike]),
            *_caveats(measured, chosen, means),
            *_too_many_tests(differences),
            *skipped,
            *measured.notes,
        ],
        verdicts=judge(claims, measured),
    )


# ---- names ----------------------------------------------------------------------------------------------------------


def _metric(name: str, names: Sequence[str]) -> int:
    if name not in names:
        raise UserError(f"{name} is no score of these runs.{near(name, names)}")
    return list(names).index(name)


def _axis(name: str | None, known: Iterable[str], names: Sequence[str]) -> int | None:
    """A metric for an axis: the one asked for, else the first of the known ones."""
    if name is not None:
        return _metric(name, names)
    return next((list(names).index(each) for each in known if each in names), None)


def _contender(measured: Measured, name: str) -> int:
    """A contender by its whole name, or by its method where that has only one."""
    if name in measured.names:
        return measured.names.index(name)
    found = [number for number, each in enumerate(measured.contenders) if each.method == name]
    if len(found) == 1:
        return found[0]
    if found:
        listed = "; ".join(measured.names[number] for number in found[:6])
        raise UserError(f"--baseline {name} could be {listed}{'; …' if len(found) > 6 else ''}: give one in full.")
    raise UserError(f"--baseline {name} is none of these runs' methods.{near(name, measured.names)}")


# ---- numbers --------------------------------------------------------------------------------------------------------


def _means(
    measured: Measured, metrics: Sequence[int]
) -> tuple[dict[tuple[int, int], Estimate], dict[tuple[int, int, int], Estimate], dict[tuple[int, int], int]]:
    """Means over all, per subject, and how many pictures gave no number."""
    means, by_subject, missed = {}, {}, {}
    for contender in range(len(measured.contenders)):
        for metric in metrics:
            values = measured.values(contender, metric)
            missed[contender, metric] = int(np.isnan(values.value).sum())
            if (found := statistics.mean(values)) is None:
                continue
            means[contender, metric] = found
            for subject in np.unique(values.subject):
                part = statistics.mean(statistics.Values(*(column[values.subject == subject] for column in values)))
                if part is not None:
                    by_subject[contender, metric, int(subject)] = part
    return means, by_subject, missed


def _differences(
    measured: Measured, metrics: Sequence[int], baseline: int | None, means: dict[tuple[int, int], Estimate]
) -> tuple[list[Difference], list[str]]:
    """All pairs, or all against the baseline; and a note where there are too many."""
    found: list[Difference] = []
    skipped: list[str] = []
    for metric in metrics:
        there = [c for c in range(len(measured.contenders)) if (c, metric) in means]
        pairs = list(combinations(there, 2)) if baseline is None else [(c, baseline) for c in there if c != baseline]
        if len(pairs) > MOST_PAIRS and baseline is None:
            skipped.append(
                f"{len(there)} methods make {len(pairs)} pairs: none was tested. "
                "--baseline METHOD tests all against that one."
            )
            continue
        values = {c: measured.values(c, metric).found() for c in {c for pair in pairs for c in pair}}
        tested = [(a, b, each) for a, b in pairs if (each := statistics.paired(values[a], values[b])) is not None]
        adjusted = statistics.holm([each.p for _, _, each in tested])
        found += [Difference(metric, a, b, each, p) for (a, b, each), p in zip(tested, adjusted, strict=True)]
    return found, list(dict.fromkeys(skipped))


def _ranks(
    measured: Measured, metrics: Sequence[int], means: dict[tuple[int, int], Estimate]
) -> tuple[dict[int, dict[int, Rank]], dict[int, tuple[str, int]]]:
    """Places over what all contenders of a metric have in common; nothing for those without."""
    ranks, over = {}, {}
    for metric in metrics:
        there = [c for c in range(len(measured.contenders)) if (c, metric) in means]
        if len(there) < 2:
            continue
        unit, table = statistics.common([measured.values(c, metric) for c in there])
        if not table.shape[1]:
            continue
        found = statistics.ranks(table, measured.metrics[metric].lower_is_better)
        ranks[metric] = dict(zip(there, found, strict=True))
        over[metric] = (unit, table.shape[1])
    return ranks, over


def _front(measured: Measured, means: dict[tuple[int, int], Estimate], x: int | None, y: int | None) -> list[int]:
    """Contenders that no other one beats in both scores of the trade-off."""
    if x is None or y is None:
        return []
    there = [c for c in range(len(measured.contenders)) if (c, x) in means and (c, y) in means]
    signs = [-1 if measured.metrics[m].lower_is_better else 1 for m in (x, y)]
    axes = [[sign * means[c, m].mean for c in there] for sign, m in zip(signs, (x, y), strict=True)]
    return [c for c, on in zip(there, statistics.pareto(*axes), strict=True) if on] if there else []


def _costs(measured: Measured) -> list[dict[str, float | None]]:
    """Mean cost of each contender's runs."""
    runs = [measured.runs_of(c) for c in range(len(measured.contenders))]
    costs = [run.cost for run in measured.runs]
    found: list[dict[str, float | None]] = []
    for mine in runs:
        columns = {key: [v for run in mine if (v := costs[run][key]) is not None] for key in COSTS}
        found.append({key: sum(values) / len(values) if values else None for key, values in columns.items()})
    return found


# ---- caveats --------------------------------------------------------------------------------------------------------


def _caveats(measured: Measured, metrics: Sequence[int], means: dict[tuple[int, int], Estimate]) -> list[str]:
    """What the numbers cannot say."""
    said = measured.trained or any(UNTRAINED in note for note in measured.notes)
    found = [] if said else [f"The judge is {UNTRAINED}: these numbers measure nothing."]
    units = {(each.unit, each.num_units) for (_, m), each in means.items() if m in metrics}
    alone = {unit for unit, _ in units if unit != SUBJECTS}
    if alone and len(measured.subjects) == 1:
        over = "pictures" if alone == {PICTURES} else "prompts"
        single = all(count == 1 for _, count in units)
        found.append(
            f"There is one subject ({' · '.join(measured.subjects[0])})"
            + (
                f" and one of its {over}, so that no interval exists and no test can tell anything."
                if single
                else f": intervals and tests are over its {over} and say nothing about other subjects."
            )
        )
    elif alone:
        found.append(
            "Some lines have one subject only: their intervals are over its prompts, the others' over subjects."
        )
    kinds = {unit for unit, count in units if count > 1}
    drawn = kinds.pop() if len(kinds) == 1 else "units"
    fewest: dict[int, list[str]] = {}
    for metric in metrics:
        counts = [each.num_units for (_, m), each in means.items() if m == metric and each.num_units > 1]
        if counts and min(counts) < ENOUGH:
            fewest.setdefault(min(counts), []).append(measured.metrics[metric].name)
    for few, names in sorted(fewest.items()):
        whose = "" if len(names) == len(metrics) else f" ({', '.join(names)})"
        found.append(
            f"With {few} {drawn}{whose} a bootstrap interval covers at most "
            f"{100 * most_coverage(few):.0f} %, and p is at least {2 / 2**few:.3g}: no difference can be "
            f"told from chance at 5 %. It takes {ENOUGH}."
        )
    if uneven := _uneven(measured, metrics, means):
        found.append(uneven)
    if any(run.shared_by > 1 for run in measured.runs):
        found.append(
            "Some runs trained in one process: their seconds are parts of its time, their memory is all of it."
        )
    return found


def _too_many_tests(differences: Sequence[Difference]) -> list[str]:
    """Sentences where no p could be below 0.05 after the correction, though subjects are enough for a single test."""
    tests: dict[int, list[Difference]] = {}
    for each in differences:
        tests.setdefault(each.metric, []).append(each)
    found = {}
    for mine in tests.values():
        count, few = len(mine), max(each.found.num_units for each in mine)
        least = count * min(each.found.smallest_p for each in mine)
        if few >= ENOUGH and least > 0.05:
            enough = math.ceil(1 + math.log2(count / 0.05))
            found[count, few] = (
                f"With {count} tests of a metric and {few} {mine[0].found.unit}, p after Holm's correction is at least "
                f"{least:.2g}: none can be below 0.05. It takes {enough} of them, or fewer tests (--baseline tests one "
                "method against the others)."
            )
    return list(found.values())


def _uneven(measured: Measured, metrics: Sequence[int], means: dict[tuple[int, int], Estimate]) -> str:
    """A sentence where lines of a table are of different subjects or prompts; "" where all have the same."""
    for metric in metrics:
        cells: dict[int, frozenset[tuple[int, int]]] = {}
        for contender in (c for c in range(len(measured.contenders)) if (c, metric) in means):
            values = measured.values(contender, metric).found()
            cells[contender] = frozenset(zip(values.subject.tolist(), values.prompt.tolist(), strict=True))
        every = frozenset().union(*cells.values())
        short = [c for c, mine in cells.items() if mine != every]
        if short:
            names = ", ".join(measured.names[c] for c in short[:3]) + (" and others" if len(short) > 3 else "")
            return (
                f"Not all methods have {measured.metrics[metric].name} of the same subjects and prompts ({names} lack "
                "some): means of different lines do not compare. Differences and ranks use what both, or all, have."
            )
    return ""
