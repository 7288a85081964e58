"""Claims: what an interval says of an ordering, which runs a claim means, and that every published one can be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from hiperlab.compare.claims import (
    FAILS,
    HOLDS,
    NOT_MEASURED,
    PUBLISHED,
    UNDECIDED,
    Side,
    Test,
    check_names,
    judge,
    lines,
    margins,
    plain,
    read_claims,
    verdict_of,
)  # fmt: skip
from hiperlab.compare.runs import read
from hiperlab.compare.statistics import Paired
from hiperlab.errors import UserError
from tests.compare.folders import run, write_lines

METHODS = Path("conf/method")
Test.__test__ = False  # type: ignore[attr-defined] - pytest would collect it
SUBJECTS = ("a", "b", "c", "d", "e", "f")


def claims(folder: Path, *tests: dict, name: str = "one") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump([{"name": name, "says": "x", "source": "y", "tests": list(tests)}]))
    return path


def asked(folder: Path, folders: list[Path], *tests: dict):
    (verdict,) = judge(read_claims(claims(folder, *tests)), read(folders))
    return verdict


@pytest.mark.parametrize(
    "relation, margin, low, high, expected",
    [
        ("greater", 0.0, 0.01, 0.2, HOLDS), ("greater", 0.0, -0.2, -0.01, FAILS),
        ("greater", 0.0, -0.1, 0.1, UNDECIDED),
        ("at_least", 0.05, -0.04, 0.2, HOLDS), ("at_least", 0.05, -0.2, -0.06, FAILS),
        ("at_least", 0.05, -0.06, 0.2, UNDECIDED), ("equal", 0.05, -0.04, 0.05, HOLDS),
        ("equal", 0.05, 0.06, 0.2, FAILS), ("equal", 0.05, -0.2, -0.06, FAILS), ("equal", 0.05, -0.04, 0.06, UNDECIDED),
    ],
)  # fmt: skip
def test_verdicts_are_of_the_interval(relation, margin, low, high, expected) -> None:
    test = Test("subject", Side("a"), Side("b"), relation, margin)
    assert verdict_of(test, Paired((low + high) / 2, low, high, 0.5, 0.03, True, "subjects", 6, 6)) == expected


def test_less_is_better_where_it_is(tmp_path) -> None:
    """The method with the smaller distance is the better one, and the difference is turned."""
    folders = [
        run(tmp_path / "a", "ti", {"structure": 0.2}, concepts=SUBJECTS),
        run(tmp_path / "b", "neti", {"structure": 0.5}, concepts=SUBJECTS),
    ]
    for folder in folders:
        rows = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
        write_lines(folder / "scores.jsonl", [{**row, "lower_is_better": True} for row in rows])
    found = asked(tmp_path, folders, {"about": "structure", "better": "ti", "worse": "neti"})
    assert found.verdict == HOLDS and found.findings[0].found.difference == pytest.approx(0.3)
    assert asked(tmp_path, folders, {"about": "structure", "better": "neti", "worse": "ti"}).verdict == FAILS


def test_scores_about_one_thing_are_averaged(tmp_path) -> None:
    folders = [
        run(tmp_path / "a", "ti", {"pose": 1.0, "place": 0.5, "clip_text": 0.0}, concepts=SUBJECTS),
        run(tmp_path / "b", "neti", {"pose": 0.6, "place": 0.7, "clip_text": 1.0}, concepts=SUBJECTS),
    ]
    found = asked(tmp_path, folders, {"about": "text", "better": "ti", "worse": "neti"})
    assert found.findings[0].found.difference == pytest.approx(
        0.1
    )  # (0.4 - 0.2) / 2; CLIP only where nothing is better


def test_all_tests_of_a_claim_must_pass(tmp_path) -> None:
    folders = [
        run(tmp_path / "a", "ti", {"identity": 0.5, "pose": 0.5}, concepts=SUBJECTS),
        run(tmp_path / "b", "neti", {"identity": 0.9, "pose": 0.2}, concepts=SUBJECTS),
    ]
    subject = {"about": "subject", "better": "neti", "worse": "ti"}
    text = {"about": "text", "better": "neti", "worse": "ti", "relation": "at_least", "margin": 0.05}
    assert asked(tmp_path, folders, subject).verdict == HOLDS
    assert asked(tmp_path, folders, subject, text).verdict == FAILS
    unknown = {"about": "subject", "better": "neti", "worse": "xti"}
    found = asked(tmp_path, folders, subject, unknown)
    assert found.verdict == NOT_MEASURED and found.findings[1].why == "no run of xti"


def test_a_side_means_its_settings_and_not_another_sides(tmp_path) -> None:
    scores = [("lora", (), 0.3), ("lora", ("method.loss=dco",), 0.6), ("peft", ("method.tuner=oft",), 0.5)]
    folders = [
        run(tmp_path / str(number), method, {"identity": value}, concepts=SUBJECTS, asked=settings)
        for number, (method, settings, value) in enumerate(scores)
    ]
    (folders[0] / "config.yaml").write_text("method: {loss: diffusion}\n")
    path = tmp_path / "two.yaml"
    test = {"about": "subject", "better": "lora method.loss=dco", "worse": "lora"}
    other = {"about": "subject", "better": "peft method.tuner=oft", "worse": "lora"}
    path.write_text(
        yaml.safe_dump([{"name": str(n), "says": "", "source": "", "tests": [t]} for n, t in enumerate([test, other])])
    )
    found = judge(read_claims(path), read(folders))
    assert [each.findings[0].found.difference for each in found] == pytest.approx([0.3, 0.2])
    folders.append(run(tmp_path / "3", "lora", {"identity": 0.1}, concepts=SUBJECTS, asked=["method.rank=64"]))
    (folders[-1] / "config.yaml").write_text("method: {loss: diffusion, rank: 64}\n")
    (folders[0] / "config.yaml").write_text("method: {loss: diffusion, rank: 4}\n")
    (folders[1] / "config.yaml").write_text("method: {loss: dco, rank: 4}\n")
    assert "lora could be" in judge(read_claims(path), read(folders))[0].findings[0].why


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"about": "beauty"}, "about=beauty is unknown"),
        ({"about": "clip_text"}, "That is a score: write about: text"),
        ({"relation": "above"}, "relation=above is unknown"),
        ({"relation": "equal"}, "margin=0.0: above 0 with equal"), ({"margin": 0.1}, "margin=0.1: none with greater"),
        ({"better": "peft oft"}, "expected a method and key=value settings, oft is none"), ({"extra": 1}, "a test has"),
        ({"better": "xti"}, "better and worse are both xti"),
    ],
)  # fmt: skip
def test_mistakes_in_a_claim_are_named(tmp_path, change, expected) -> None:
    path = claims(tmp_path, {"about": "subject", "better": "ti", "worse": "xti", **change})
    with pytest.raises(UserError, match=expected):
        read_claims(path)
    path.write_text("claims: [")
    with pytest.raises(UserError, match="cannot be read as claims"):
        read_claims(path)


def test_published_claims_name_methods_that_there_are() -> None:
    found = read_claims(PUBLISHED)
    assert len(found) >= 15 and all(each.source and each.says for each in found)
    methods = {path.stem for path in METHODS.glob("*.yaml")}
    for claim in found:
        for test in claim.tests:
            assert {test.better.method, test.worse.method} <= methods, claim.name
            assert test.better != test.worse


@pytest.mark.parametrize(
    "better, expected",
    [
        ("netti", "claim one: netti: no method netti is known or among the runs. Did you mean neti"),
        ("peft method.tuner=otf", "method.tuner cannot be otf. Did you mean oft"),
        ("peft method.tunr=oft", "peft has no setting method.tunr. Did you mean tuner"),
        ("peft method.tuners.oft.rate=1", "peft has no setting method.tuners.oft.rate"),
    ],
)
def test_misspelt_names_are_refused_with_the_nearest(tmp_path, better, expected) -> None:
    run(tmp_path / "a", "ti", {"identity": 0.5}, pictures=False)
    measured = read([tmp_path / "a"])
    with pytest.raises(UserError, match=expected):
        check_names(read_claims(claims(tmp_path, {"about": "subject", "better": better, "worse": "ti"})), measured)


def test_known_but_absent_methods_and_those_of_the_runs_are_no_mistake(tmp_path) -> None:
    run(tmp_path / "a", "own_method", {"identity": 0.5}, concepts=SUBJECTS, pictures=False)
    measured = read([tmp_path / "a"])
    tests = [
        {"about": "subject", "better": "own_method method.any=1", "worse": "ti method.optimizer.lr=1e-3"},
        {"about": "subject", "better": "peft method.tuner=boft method.tuners.boft.lr=1", "worse": "xti fit.steps=9"},
    ]
    found = read_claims(claims(tmp_path, *tests))
    check_names(found, measured)
    check_names(read_claims(PUBLISHED), measured)
    assert {finding.verdict for finding in judge(found, measured)[0].findings} == {NOT_MEASURED}


def test_a_margin_is_part_of_what_is_said(tmp_path) -> None:
    folders = [run(tmp_path / m, m, {"identity": 0.5}, concepts=SUBJECTS, pictures=False) for m in ("ti", "xti")]
    shared = {"about": "subject", "better": "xti", "worse": "ti", "margin": 0.05}
    for relation, sign in (("at_least", "≥ (margin −0.05)"), ("equal", "= (margin ±0.05)")):
        verdict = asked(tmp_path, folders, {**shared, "relation": relation})
        (line,) = lines([verdict])
        assert line[-1] == "holds, margin 0.05" and f"xti {sign} ti" in line[2] and margins(verdict) == " (margin 0.05)"
    plainly = {"about": "subject", "better": "xti", "worse": "ti"}
    verdict = asked(tmp_path, folders, plainly, {**shared, "relation": "at_least"})
    assert [line[-1] for line in lines([verdict])] == ["undecided (undecided)", " (holds, margin 0.05)"]
    assert margins(asked(tmp_path, folders, plainly)) == ""


def test_what_is_shown_has_every_test(tmp_path) -> None:
    folders = [
        run(tmp_path / name, name, {"identity": value}, concepts=SUBJECTS)
        for name, value in (("ti", 0.2), ("xti", 0.6))
    ]
    verdicts = judge(read_claims(PUBLISHED), read(folders))
    rows, values = lines(verdicts), plain(verdicts)
    assert len(rows) == sum(len(each.claim.tests) for each in verdicts)
    (row,) = [row for row in rows if row[2] == "xti > ti in subject (identity)"]
    assert row[3:] == ["+0.400", "[+0.400, +0.400]", "0.031", "6 subjects", HOLDS]
    assert json.loads(json.dumps(values))[3]["tests"][0]["difference"] == pytest.approx(0.4)
