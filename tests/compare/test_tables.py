"""Tables: what is best, what cannot be said, and names from outside that stay text in every form."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest

from hiperlab.compare import tables
from hiperlab.compare.claims import PUBLISHED, read_claims
from hiperlab.compare.runs import find, read
from hiperlab.compare.summary import MOST_PAIRS, summarise
from hiperlab.errors import UserError
from hiperlab.metric.rows import TableRow, columns
from tests.compare.folders import PROMPTS, run

KNOWN_COMMANDS = {
    "begin", "end", "centering", "small", "setlength", "tabcolsep", "caption", "label", "toprule", "midrule",
    "bottomrule", "textbf", "underline", "scriptsize", "uparrow", "downarrow", "geq", "pm", "times", "cdot", "ldots",
    "textless", "textgreater", "textbar", "textasciitilde", "textasciicircum", "textbackslash",
}  # fmt: skip
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


def test_marks_follow_means_as_they_are_and_agree_with_ranks(tmp_path) -> None:
    """Two means that look alike in a table are not; equal ones are, up to their last bits."""
    values = {"ti": 0.50004, "neti": 0.50001, "lora": 0.1 + 0.2, "hiper": 0.3}
    for method, value in values.items():
        concepts = [f"c{k}" for k in range(3)]
        run(tmp_path / method, method, {"clip_text": value}, concepts=concepts, spread=0.0, pictures=False)
    found = summarise(read(find([tmp_path])))
    names = found.measured.names
    assert {names[c]: mark for c, mark in found.marks(0).items()} == {"ti": "best", "neti": "second"}
    assert found.number(0, values["ti"]) == found.number(0, values["neti"])
    for subject in (None, 0):
        places = {names[c]: found.marks(0, subject).get(c) for c in found.contenders}
        assert places == {"ti": "best", "neti": "second", "lora": None, "hiper": None}
    best = summarise(read(find([tmp_path / "lora", tmp_path / "hiper"])))
    assert best.marks(0) == {}
    for method in ("lora", "hiper"):  # more prompts, on which these two are better than all: nobody else has them
        run(tmp_path / f"more_{method}", method, {"clip_text": 9.0}, concepts=["c0"], prompts=["{} more"])
    uneven = summarise(read(find([tmp_path])))
    best = {name for c, mark in uneven.marks(0).items() if mark == "best" for name in [uneven.measured.names[c]]}
    assert best == {uneven.measured.names[c] for c, rank in uneven.ranks[0].items() if rank.rank == 1} == {"ti"}


def test_marks_are_found_once_per_score_and_subject(methods, monkeypatch) -> None:
    from hiperlab.compare import page, summary

    calls = []
    first_two = summary._first_two
    monkeypatch.setattr(summary, "_first_two", lambda places: calls.append(1) or first_two(places))
    page.write(summarise(read(find([methods]))), [], methods, "none")
    assert len(calls) == 3 * (1 + 6)  # scores, and subjects with all together


@pytest.mark.parametrize(("prompts", "seeds", "unit"), [(3, 1, "prompts"), (1, 3, "pictures"), (1, 1, "")])
def test_captions_say_what_there_is_an_interval_over(tmp_path, prompts: int, seeds: int, unit: str) -> None:
    from hiperlab.compare.plots import draw

    for method in ("ti", "neti"):
        run(tmp_path / method, method, {"clip_text": 0.5, "identity": 0.1}, prompts=PROMPTS[:prompts],
            seeds=range(seeds), pictures=False)  # fmt: skip
    found = summarise(read(find([tmp_path])))
    figures = [plot.caption for plot in draw(found, tmp_path / "plots") if plot.name in ("trade_off", "scores")]
    said = [tables.caption(found), tables.test_caption(found), tables.rank_caption(found), tables._against(found)]
    for text in (*said, *figures):
        assert "subjects" not in text.replace("same subjects", ""), text
        assert ("interval over" not in text and "intervals over" not in text) or unit, text
    if unit:
        assert f"bootstrap intervals over {unit} of one" in said[0] and f"test over {unit}" in said[1]
        assert f"bootstrap intervals over {unit}" in figures[0] and f"bootstrap intervals over {unit}" in figures[1]
    else:
        assert "without intervals, as there is one picture of one prompt only" in said[0]
        assert "neither an interval nor a test" in said[1] and "no interval exists" in said[2] and "no test" in said[3]
        assert "interval" not in figures[0] and "without intervals" in figures[1]
        assert any("no interval exists" in note for note in found.notes)
        assert "p=" not in tables.latex(found)
    several = [run(tmp_path / m / "s", m, {"clip_text": 0.5}, concepts="ab", pictures=False) for m in ("xti", "dti")]
    assert "intervals over subjects." in tables.caption(summarise(read(several)))


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


def checked(latex: str) -> list[tuple[str, list[list[str]]]]:
    """Tables as (columns, rows of cells) of LaTeX that is whole: braces, environments, columns, all escaped."""
    lines = [line for line in latex.splitlines() if not line.startswith("%")]
    open_, found = [], []
    for line in lines:
        plain = re.sub(r"\\[\\{}&%$#_]", "", line)  # without what is escaped
        assert plain.count("{") == plain.count("}"), line
        assert not set('#_^~%|<>"') & set(plain.replace("\\begin{tabular}", "")), line
        assert re.sub(r"\$[-a-z\\]+\$", "", plain).count("$") == 0, line
        assert set(re.findall(r"\\([a-z]+)", plain)) <= KNOWN_COMMANDS, line
        for what, name in re.findall(r"\\(begin|end)\{([a-z*]+)\}", plain):
            if what == "begin":
                open_.append(name)
            else:
                assert open_.pop() == name
            if (what, name) == ("begin", "tabular"):
                spec = line.partition("{tabular}{")[2][:-1]
                found.append((re.sub(r"p\{[^}]*\}", "p", spec), []))
        if open_[-1:] == ["tabular"] and line.endswith("\\\\"):
            assert not re.match(r"\s*[\[*]", line)  # after a row's end or a rule they would be read as an option
            cells = re.split(r"(?<!\\)&", line[:-2])
            assert len(cells) == len(found[-1][0]), line
            found[-1][1].append([cell.strip() for cell in cells])
    assert not open_ and found
    assert latex.count("\\toprule") == latex.count("\\midrule") == latex.count("\\bottomrule") == len(found)
    labels = re.findall(r"\\label\{(.*?)\}", latex)
    assert len(labels) == len(set(labels)) == latex.count("\\caption{") == len(found)
    return found


def test_latex_is_whole_and_as_a_paper_needs_it(methods) -> None:
    """Scores with intervals below them, the best bold; differences to the best of each score, not of all pairs."""
    found = summarise(read(find([methods])), claims=read_claims(PUBLISHED))
    scores, differences, orderings = checked(tables.latex(found))
    assert scores[0] == differences[0] == "lccc" and orderings[0] == "ppccl"
    _, *rows = scores[1]
    assert [row[0] for row in rows] == ["dreambooth", "", "neti", "", "ti", ""]
    text, identity, distance = (
        found.means[found.measured.names.index(m), k].mean for m, k in (("ti", 0), ("neti", 1), ("neti", 2))
    )
    assert rows[4][1] == rf"\textbf{{{text:.3f}}}" and rows[2][2] == rf"\textbf{{{identity:.3f}}}"
    assert rows[2][3] == rf"\textbf{{{distance:.3f}}}" and r"\scriptsize {[}" in rows[3][3]
    assert [row[1].partition(" ")[0] for row in differences[1][1:]] == ["$-$0.300", "$-$0.600", "0"]
    assert [row[3].partition(" ")[0] for row in differences[1][1:]] == ["+0.300", "0", "+0.600"]
    assert all("p=" in row[1] for row in differences[1][1:3])
    assert len(orderings[1]) > 2
    against = checked(tables.latex(summarise(found.measured, baseline="ti")))
    assert [row[0] for row in against[1][1][1:]] == ["dreambooth", "neti"]
    assert against[1][1][1][1].startswith("$-$0.300") and against[1][1][1][2].startswith("+0.300")
    alone = checked(tables.latex(summarise(found.measured, ["identity"])))
    assert alone[0][0] == "lc"


def test_latex_of_many_methods_and_scores_is_several_tables(tmp_path) -> None:
    names = [f"m{number}" for number in range(tables.LATEX_ROWS + 2)]
    for number, name in enumerate(names):
        scores = {f"score{k}": 0.01 * number + k for k in range(tables.LATEX_METRICS + 1)}
        run(tmp_path / name, name, scores, pictures=False)
    found = checked(tables.latex(summarise(read(find([tmp_path])), baseline="m0")))
    assert [spec for spec, _ in found] == 2 * (["lcccc"] * 2 + ["lccc"] * 2)
    assert [len(rows) - 1 for _, rows in found] == [50, 4, 50, 4, 25, 1, 25, 1]


@pytest.mark.parametrize("name", [EVIL, "[3pt] a", "*", "\\input{/etc/passwd}", "a\x00b\u2028c", "…×·−–≥±"])
def test_latex_of_names_from_outside_is_whole(tmp_path, name: str) -> None:
    for number, method in enumerate((name, "ti")):
        run(tmp_path / str(number), method, {"clip_text": 0.5, name: 0.1}, concepts="ab", pictures=False)
        (tmp_path / str(number) / "overrides.yaml").unlink()
    assert len(checked(tables.latex(summarise(read(find([tmp_path])))))) == 2


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


def test_methods_are_in_the_order_of_the_score_that_a_copier_cannot_win(tmp_path) -> None:
    scores = {"copier": (0.9, 0.0), "ti": (0.5, 0.2), "lora": (0.6, 0.3)}
    folders = [
        run(tmp_path / method, method, {"identity": likeness, "likeness_in_context": product})
        for method, (likeness, product) in scores.items()
    ]
    summary = summarise(read(folders))
    assert [summary.measured.names[c] for c in summary.contenders] == ["lora", "ti", "copier"]
    lines = [line for line in tables.markdown(summary).splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines[1:4]] == ["| lora", "| ti", "| copier"]
    assert "in the order of likeness" in tables.caption(summary)
    found = summarise(read(folders), ["identity"])
    assert found.contenders == [0, 1, 2] and "in the order of" not in tables.caption(found)
