"""Published orderings of methods, asked of measured runs: each one holds, fails, or cannot be told.

A claim is data: who says so and where, and one or several tests that must all pass. A test compares two methods under
one score by the paired difference over subjects (`statistics.paired`), turned so that more is better:

* greater: holds where the 95 % interval lies above 0, fails where it lies below;
* at_least: holds where it lies above -margin, fails where it lies below that;
* equal: holds where it lies within margin of 0, fails where it lies outside.

Everything else is undecided. A claim fails as soon as one of its tests does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from hiperlab.cli.process import config_dir
from hiperlab.compare import statistics
from hiperlab.compare.runs import LISTED, Measured
from hiperlab.compare.statistics import Paired, Values
from hiperlab.errors import UserError, near

PUBLISHED = Path(__file__).with_name("published_claims.yaml")
HOLDS, FAILS, UNDECIDED, NOT_MEASURED = "holds", "fails", "undecided", "not measured"
GREATER, AT_LEAST, EQUAL = "greater", "at_least", "equal"
# What a claim is about -> scores that say it. Of the lists the first that was measured counts; the scores of one list
# are averaged: those of the drawn world read one attribute each.
ABOUT: Mapping[str, Sequence[Sequence[str]]] = {
    "subject": (("identity",), ("face",), ("dino",), ("dinov2",), ("clip_image",)),
    "text": (("kind", "pose", "place", "style", "accessory", "light"), ("clip_text",)),
    "background": (("background_psnr",),),
    "structure": (("structure",),),
    "reconstruction": (("reconstruction_psnr",),),
    "pose": (("pose",),),
    "edit": (("edit_truth",), ("direction",)),
}


class Side(NamedTuple):
    """A method of a test, with the settings that make it another one."""

    method: str
    settings: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """As tables show it."""
        return " ".join([self.method, *(f"{key}={value}" for key, value in self.settings)])


@dataclass(frozen=True)
class Test:
    """What must be so.

    Attributes:
        about: key into `ABOUT`.
        better, worse: the two methods.
        relation: greater, at_least or equal.
        margin: in the unit of the score; 0 for greater.
    """

    about: str
    better: Side
    worse: Side
    relation: str
    margin: float


@dataclass(frozen=True)
class Claim:
    """A published ordering.

    Attributes:
        name: short, unique.
        says: the ordering, in a sentence.
        source: who says so and where, with the numbers where they were printed.
        tests: all of which must pass.
    """

    name: str
    says: str
    source: str
    tests: tuple[Test, ...]


class Finding(NamedTuple):
    """What a test found.

    Attributes:
        test: the test.
        verdict: holds, fails, undecided or not measured.
        found: the difference, turned so that more is better; None where it was not measured.
        why: why it was not measured, "" where it was.
        scores: names of those that it was measured by.
    """

    test: Test
    verdict: str
    found: Paired | None
    why: str = ""
    scores: tuple[str, ...] = ()


class Verdict(NamedTuple):
    """What became of a claim."""

    claim: Claim
    verdict: str
    findings: tuple[Finding, ...]


# ---- reading --------------------------------------------------------------------------------------------------------


def read_claims(path: Path) -> list[Claim]:
    """Claims of a YAML file.

    Raises:
        UserError: the file cannot be read, or a claim lacks something or has something unknown.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as claims: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(content, list) or not content:
        raise UserError(f"{path} is no list of claims, each with name, says, source and tests.")
    claims = [_claim(each, f"{path}: claim {number}") for number, each in enumerate(content, 1)]
    names = [claim.name for claim in claims]
    if double := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{path}: two claims are called {double[0]}.")
    return claims


def _claim(given: Any, where: str) -> Claim:
    known = ("name", "says", "source", "tests")
    if not isinstance(given, dict) or set(given) != set(known) or not isinstance(given["tests"], list):
        raise UserError(f"{where}: expected {', '.join(known)}, and no more.")
    where = f"{where} ({given['name']})"
    if not given["tests"]:
        raise UserError(f"{where}: no tests.")
    tests = tuple(_test(each, where) for each in given["tests"])
    return Claim(str(given["name"]), str(given["says"]), str(given["source"]), tests)


def _test(given: Any, where: str) -> Test:
    known = ("about", "better", "worse", "relation", "margin")
    if not isinstance(given, dict) or not {"about", "better", "worse"} <= set(given) <= set(known):
        raise UserError(f"{where}: a test has about, better, worse, and may have relation and margin.")
    relation, margin = given.get("relation", GREATER), given.get("margin", 0.0)
    if given["about"] not in ABOUT:
        score = str(given["about"])
        of = [about for about, lists in ABOUT.items() for scores in lists if score in scores]
        hint = f" That is a score: write about: {of[0]}." if of else near(score, ABOUT)
        raise UserError(f"{where}: about={score} is unknown.{hint}")
    if relation not in (GREATER, AT_LEAST, EQUAL):
        raise UserError(f"{where}: relation={relation} is unknown.{near(str(relation), (GREATER, AT_LEAST, EQUAL))}")
    number = isinstance(margin, int | float) and not isinstance(margin, bool)
    if not number or (margin != 0 if relation == GREATER else margin <= 0):
        raise UserError(f"{where}: margin={margin}: {'none' if relation == GREATER else 'above 0'} with {relation}.")
    better, worse = _side(given["better"], where), _side(given["worse"], where)
    if better == worse:
        raise UserError(f"{where}: better and worse are both {better.name}.")
    return Test(given["about"], better, worse, relation, float(margin))


def _side(given: Any, where: str) -> Side:
    """A method as tables name it, "peft method.tuner=oft"."""
    method, *settings = str(given).split()
    if odd := [each for each in settings if "=" not in each]:
        raise UserError(f"{where}: {given!r}: expected a method and key=value settings, {odd[0]} is none.")
    return Side(method, tuple(sorted((key, value) for key, _, value in (each.partition("=") for each in settings))))


def check_names(claims: Sequence[Claim], measured: Measured) -> None:
    """Refuse what is neither known nor measured: a misspelt side would be "not measured" for ever.

    Known are the members of conf/method with their settings; of a table of alternatives (`tuners`) the names in it
    are what its choice (`tuner`) takes.

    Raises:
        UserError: a method, a setting of one or a choice among alternatives that there is not, with the nearest one.
    """
    shipped = {path.stem: path for path in (config_dir() / "method").glob("*.yaml")}
    ran = {each.method for each in measured.contenders}
    asked: dict[Side, str] = {}
    for claim in claims:
        for test in claim.tests:
            asked.setdefault(test.better, claim.name)
            asked.setdefault(test.worse, claim.name)
    for side, name in asked.items():
        where = f"claim {name}: {side.name}"
        if side.method not in {*shipped, *ran}:
            known = sorted({*shipped, *ran})
            hint = near(side.method, known, listed=LISTED)
            raise UserError(f"{where}: no method {side.method} is known or among the runs.{hint}")
        if side.method in shipped and side.settings:
            _check_settings(side, yaml.safe_load(shipped[side.method].read_text(encoding="utf-8")), where)


def _check_settings(side: Side, found: Any, where: str) -> None:
    """Refuse settings that the method's file does not have; those of other groups are not looked at."""
    for key, value in side.settings:
        table, (first, *parts) = found, key.split(".")
        if first != "method":
            continue
        for part in ["method", *parts[:-1]]:
            table = table.get(part) if isinstance(table, dict) else None
        if not isinstance(table, dict):  # below what the file leaves to a reference
            continue
        last = parts[-1] if parts else ""
        if last not in table:
            raise UserError(f"{where}: {side.method} has no setting {key}.{near(last, map(str, table), listed=LISTED)}")
        choices = table.get(f"{last}s")
        if isinstance(choices, dict) and value not in choices:
            raise UserError(f"{where}: {key} cannot be {value}.{near(value, map(str, choices))}")


# ---- asking ---------------------------------------------------------------------------------------------------------


def judge(claims: Sequence[Claim], measured: Measured) -> list[Verdict]:
    """Ask every claim of the measured runs."""
    sides = {side for claim in claims for test in claim.tests for side in (test.better, test.worse)}
    verdicts = []
    for claim in claims:
        findings = tuple(_find(test, measured, sides) for test in claim.tests)
        kinds = [finding.verdict for finding in findings]
        # A conjunction: one that fails is enough, one that is missing leaves it open.
        verdict = next((kind for kind in (FAILS, NOT_MEASURED, UNDECIDED) if kind in kinds), HOLDS)
        verdicts.append(Verdict(claim, verdict, findings))
    return verdicts


def _find(test: Test, measured: Measured, sides: set[Side]) -> Finding:
    names = [each.name for each in measured.metrics]
    scores = next((each for each in ABOUT[test.about] if set(each) & set(names)), None)
    if scores is None:
        return Finding(test, NOT_MEASURED, None, f"no score about {test.about}")
    there = [names.index(name) for name in scores if name in names]
    places = []
    for side in (test.better, test.worse):
        meant = contenders_of(side, measured, sides)
        if len(meant) != 1:
            listed = "; ".join(measured.names[place] for place in meant[:4])
            why = f"{side.name} could be {listed}" if meant else f"no run of {side.name}"
            return Finding(test, NOT_MEASURED, None, why)
        places.append(meant[0])
    found = statistics.paired(*(scores_of(measured, place, there) for place in places))
    if found is None or found.low is None:
        return Finding(test, NOT_MEASURED, None, "no two subjects, prompts or pictures in common")
    return Finding(test, verdict_of(test, found), found, scores=tuple(names[place] for place in there))


def contenders_of(side: Side, measured: Measured, sides: set[Side]) -> list[int]:
    """Contenders that a test means: they have its settings, and none that makes them another side of some test."""
    others = {pair for each in sides if each.method == side.method for pair in each.settings} - set(side.settings)
    return [
        place
        for place, each in enumerate(measured.contenders)
        if each.method == side.method
        and not each.variant
        and not others & set(each.settings)
        and {key: measured_setting(measured, place, key) for key, _ in side.settings} == dict(side.settings)
    ]


def measured_setting(measured: Measured, contender: int, key: str) -> str | None:
    """A contender's setting: one that tells it from others, or that all its runs were asked."""
    settings = dict(measured.contenders[contender].settings)
    if key in settings:
        return settings[key]
    asked = {measured.runs[int(run)].asked.get(key) for run in measured.runs_of(contender)}
    return asked.pop() if len(asked) == 1 else None


def scores_of(measured: Measured, contender: int, metrics: Sequence[int]) -> Values:
    """A contender's scores under several metrics, one below the other, turned so that more is better.

    `statistics` averages what has the same subject, prompt and seed first.
    """
    parts = []
    for metric in metrics:
        values = measured.values(contender, metric).found()
        sign = -1.0 if measured.metrics[metric].lower_is_better else 1.0
        parts.append(values._replace(value=sign * values.value))
    return Values(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def verdict_of(test: Test, found: Paired) -> str:
    """What an interval says of a test."""
    assert found.low is not None and found.high is not None
    if test.relation == EQUAL:
        if -test.margin <= found.low and found.high <= test.margin:
            return HOLDS
        return FAILS if found.low > test.margin or found.high < -test.margin else UNDECIDED
    if found.low > -test.margin:
        return HOLDS
    return FAILS if found.high < -test.margin else UNDECIDED


# ---- showing --------------------------------------------------------------------------------------------------------

HEAD = ("claim", "source", "test", "difference", "95 % interval", "p", "over", "verdict")


def lines(verdicts: Sequence[Verdict]) -> list[list[str]]:
    """Cells of a table, a line per test, columns as in `HEAD`."""
    rows = []
    for verdict in verdicts:
        for number, finding in enumerate(verdict.findings):
            test, found = finding.test, finding.found
            by = f" ({', '.join(finding.scores)})" if finding.scores else ""
            asked = f"{test.better.name} {_sign(test)} {test.worse.name} in {test.about}{by}"
            numbers = ["–", "–", "–", finding.why]
            if found is not None:
                numbers = [
                    f"{found.difference:+.3f}".replace("-", "−"),
                    f"[{found.low:+.3f}, {found.high:+.3f}]".replace("-", "−"),
                    f"{found.p:.3f}",
                    f"{found.num_units} {found.unit}",
                ]
            own = f" ({told(finding)})" if len(verdict.findings) > 1 else ""
            whole = told(finding) if not own else verdict.verdict
            rows.append(
                [
                    verdict.claim.says if number == 0 else "",
                    verdict.claim.source if number == 0 else "",
                    asked,
                    *numbers,
                    (whole if number == 0 else "") + own,
                ]
            )
    return rows


def told(finding: Finding) -> str:
    """A verdict with what may be lost where the claim allows it: "holds, margin 0.05"."""
    return finding.verdict + (f", margin {finding.test.margin:g}" if finding.test.margin else "")


def margins(verdict: Verdict) -> str:
    """The margins of a claim's tests for a sentence, "" where it has none."""
    found = sorted({finding.test.margin for finding in verdict.findings if finding.test.margin})
    return f" (margin {', '.join(f'{margin:g}' for margin in found)})" if found else ""


def plain(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """The same for JSON."""
    return [
        {
            "name": verdict.claim.name,
            "says": verdict.claim.says,
            "source": verdict.claim.source,
            "verdict": verdict.verdict,
            "tests": [
                {
                    "about": finding.test.about,
                    "better": finding.test.better.name,
                    "worse": finding.test.worse.name,
                    "relation": finding.test.relation,
                    "margin": finding.test.margin,
                    "verdict": finding.verdict,
                    "why": finding.why,
                    "scores": list(finding.scores),
                    **({} if finding.found is None else finding.found._asdict()),
                }
                for finding in verdict.findings
            ],
        }
        for verdict in verdicts
    ]


def _sign(test: Test) -> str:
    return {GREATER: ">", AT_LEAST: f"≥ (margin −{test.margin:g})", EQUAL: f"= (margin ±{test.margin:g})"}[
        test.relation
    ]
