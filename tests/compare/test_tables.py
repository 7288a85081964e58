"""Tables: what is best, what cannot be said, and names from outside that stay text in every form."""

from __future__ import annotations

import csv
import io
import json

import pytest

from hiperlab.compare import tables
from hiperlab.compare.runs import find, read
from hiperlab.compare.summary import MOST_PAIRS, summarise
from hiperlab.errors import UserError
from hiperlab.metric.rows import TableRow, columns
from tests.compare.folders import PROMPTS, run

EVIL = "<script>alert(1)</script> & 100% $x_1$ {y} | ^~ \\end{tabular}"


@pytest.fixture
def methods(tmp_path):
    """Three methods on six subjects; ti is the best in text, neti in identity, dreambooth between in both."""
    concepts = [f"cat{k}" for k in range(6)]
    for method, text, identity in (("ti", 0.9, 0.2), ("dreambooth", 0.6, 0.5), ("neti", 0.3, 0.8)):
        scores = {"clip_text": text, "identity": identity, "truth_distance": 1 - identity}
        run(tmp_path / method, method, scores, concepts=concepts, seeds=(0, 1))
    return tmp_path


def test_best_second_and_front(methods) -> None:
    found = summarise(read(find([methods])))
    names = found.measured.names
    marks = {
        name: {names[c]: mark for c, mark in found.marks(m).items()} for m, name in enumerate(("text", "identity"))
    }
    assert marks == {
        "text": {"ti": "best", "dreambooth": "second"},
        "identity": {"neti": "best", "dreambooth": "second"},
    }
    assert {names[c]: mark for c, mark in found.marks(2).items()} == {"neti": "best", "dreambooth": "second"}  # lower
    assert [found.measured.metrics[m].name for m in (found.x, found.y)] == ["clip_text", "identity"]
    assert sorted(names[c] for c in found.front) == ["dreambooth", "neti", "ti"]
    assert not any("told from chance" in note for note in found.notes)  # six subjects are enough
    one = next(d for d in found.differences if (names[d.a], names[d.b], d.metric) == ("dreambooth", "ti", 0))
    assert one.found.difference == pytest.approx(-0.3) and one.found.p == 2 / 2**6 and one.holm == pytest.approx(6 / 64)
    assert found.ranks[2][names.index("neti")].rank == 1


def test_what_the_numbers_cannot_say_is_said(tmp_path) -> None:
    run(tmp_path / "a", "ti", {"clip_text": 0.5}, trained=False)
    run(tmp_path / "b", "neti", {"clip_text": 0.6}, prompts=PROMPTS[:2], trained=False)
    found = summarise(read(find([tmp_path])))
    text = tables.text(found)
    assert "UNTRAINED" in text
    assert "one subject (cats · cats)" in text and "say nothing about other subjects" in text
    assert "With 2 prompts a bootstrap interval covers at most 50 %, and p is at least 0.5" in text
    assert "Not all methods have clip_text of the same subjects and prompts (neti lack some)" in text
    assert {d.found.unit for d in found.differences} == {"prompts"} and found.differences[0].found.num_units == 2


def test_too_many_tests_for_so_few_subjects_are_named(methods) -> None:
    """Of six subjects p is at least 1/32; three tests make that 3/32, of seven subjects 3/64."""
    measured = read(find([methods]))
    notes = summarise(measured).notes
    assert any("With 3 tests of a metric and 6 subjects" in note and "0.094" in note for note in notes)
    assert any("It takes 7 of them" in note for note in notes)
    more = [f"cat{k}" for k in range(7)]
    for method in ("ti", "dreambooth", "neti"):
        run(methods / "seven" / method, method, {"clip_text": 0.5}, concepts=more)
    assert not any("tests of a metric" in note for note in summarise(read(find([methods / "seven"]))).notes)


def test_baseline_metrics_and_axes(methods) -> None:
    measured = read(find([methods]))
    found = summarise(measured, ["identity"], baseline="ti", x="truth_distance", y="identity")
    assert {d.b for d in found.differences} == {measured.names.index("ti")} and len(found.differences) == 2
    assert [measured.metrics[m].name for m in found.metrics] == ["identity"]
    assert [measured.names[c] for c in found.front] == ["neti"]  # the least distance and the best identity
    for wrong in ({"metrics": ["identiy"]}, {"x": "identiy"}, {"y": "identiy"}):
        with pytest.raises(UserError, match="Did you mean identity"):
            summarise(measured, **wrong)
    with pytest.raises(UserError, match="Did you mean dreambooth"):
        summarise(measured, baseline="dreamboth")


def test_too_many_pairs_are_not_tested_without_a_baseline(tmp_path) -> None:
    count = 26
    assert count * (count - 1) / 2 > MOST_PAIRS
    for number in range(count):
        run(tmp_path / str(number), f"m{number}", {"clip_text": 0.01 * number}, pictures=False)
    measured = read(find([tmp_path]))
    found = summarise(measured)
    assert not found.differences and any("325 pairs" in note and "--baseline" in note for note in found.notes)
    assert len(summarise(measured, baseline="m3").differences) == count - 1


def test_forms_agree(methods) -> None:
    found = summarise(read(find([methods])))
    lines = list(csv.DictReader(io.StringIO(tables.as_csv(found))))
    assert len(lines) == 3 * 3 * 7  # methods, metrics, six subjects and all
    assert set(columns(TableRow)) <= set(lines[0])
    whole = next(r for r in lines if (r["method"], r["metric"], r["kind"]) == ("ti", "clip_text", "all"))
    mean = found.means[found.measured.names.index("ti"), 0].mean
    assert float(whole["mean"]) == pytest.approx(mean) and whole["unit"] == "subjects" and whole["num_units"] == "6"
    document = json.loads(json.dumps(tables.document(found), allow_nan=False))
    assert {row["kind"] for row in document["table"]} == {"concept", "all"}
    assert document["trade_off"]["x"] == "clip_text" and len(document["differences"]) == 9
    assert f"**{mean:.3f}**" in tables.markdown(found)
    assert rf"\textbf{{{mean:.3f}}}" in tables.latex(found)


def test_missing_numbers_are_dashes_and_json_has_no_nan(tmp_path) -> None:
    run(tmp_path / "a", "ti", {"clip_text": 0.5})
    run(tmp_path / "b", "neti", {"identity": float("nan")})
    found = summarise(read(find([tmp_path])))
    json.dumps(tables.document(found), allow_nan=False)
    assert [found.measured.names[c] for c in found.contenders] == ["ti"]


def test_names_from_outside_stay_text(tmp_path) -> None:
    run(
        tmp_path / "a",
        EVIL,
        {"clip_text": 0.5, EVIL: 0.1},
        concepts=[EVIL],
        prompts=[f"{{}} {EVIL}", "b {}"],
        pictures=False,
    )
    run(
        tmp_path / "b",
        "ti",
        {"clip_text": 0.4, EVIL: 0.2},
        concepts=[EVIL],
        prompts=[f"{{}} {EVIL}", "b {}"],
        pictures=False,
    )
    for folder in (tmp_path / "a", tmp_path / "b"):
        (folder / "overrides.yaml").unlink()
    found = summarise(read(find([tmp_path])))
    latex = tables.latex(found)
    assert r"\textless{}script\textgreater{}" in latex and r"100\% \$x\_1\$ \{y\} \textbar{}" in latex
    body = "\n".join(line for line in latex.splitlines() if not line.startswith("%"))
    assert body.count(r"\end{tabular}") == body.count(r"\begin{tabular}")
    assert all(line.startswith("%") for line in latex.splitlines() if "<" in line)
    markdown = tables.markdown(found)
    assert "<script" not in markdown and "&lt;script&gt;" in markdown and r"\|" in markdown
    assert tables.escape_markdown("a\n|b`") == r"a \|b\`"
