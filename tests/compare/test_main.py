"""The door of the comparison, and what a sweep does with it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hiperlab.compare.main import main
from hiperlab.compare.runs import find
from tests.compare.folders import run

FILES = {f"comparison.{ending}" for ending in ("html", "md", "tex", "csv", "json")}


@pytest.fixture
def sweep(tmp_path) -> Path:
    for method, value in (("ti", 0.25), ("neti", 0.75)):
        run(tmp_path / "sweeps" / "s" / method, method, {"clip_text": value, "identity": 0.5})
    return tmp_path / "sweeps" / "s"


def test_a_sweep_is_written_into_its_folder(sweep, capsys) -> None:
    assert main([str(sweep), "--pictures", "2"]) == 0
    assert {path.name for path in sweep.iterdir()} == {*FILES, "plots", "ti", "neti"}
    out = capsys.readouterr().out
    assert out.splitlines()[0].split()[:3] == ["method", "clip_text", "↑"]
    assert out.rstrip().endswith("comparison.html")
    assert [path.name for path in find([sweep])] == ["neti", "ti"]  # its own files are no runs


def test_several_folders_get_a_new_one_here(sweep, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(sweep / "ti"), str(sweep / "neti"), "--metrics", "identity", "--pictures", "none"]) == 0
    made = list(tmp_path.glob("comparison-ti-neti-*"))
    assert len(made) == 1 and {path.name for path in made[0].iterdir()} == {*FILES, "plots"}
    document = json.loads((made[0] / "comparison.json").read_text())
    assert {row["metric"] for row in document["table"]} == {"identity"}


def test_published_orderings_are_asked_and_shown_everywhere(tmp_path, capsys) -> None:
    subjects = ("a", "b", "c", "d", "e", "f")
    for method, value in (("ti", 0.25), ("neti", 0.75)):
        run(tmp_path / "s" / method, method, {"identity": value}, concepts=subjects, pictures=False)
    assert main([str(tmp_path / "s"), "--claims", "published", "--pictures", "none"]) == 0
    says = "NeTI keeps the subject better than Textual Inversion"
    out = capsys.readouterr().out
    assert f"  holds      {says}" in out and "1 hold, " in out
    for ending in ("html", "md", "tex"):
        assert says in (tmp_path / "s" / f"comparison.{ending}").read_text()
    claims = json.loads((tmp_path / "s" / "comparison.json").read_text())["claims"]
    assert [each["verdict"] for each in claims].count("holds") == 1
    assert {each["verdict"] for each in claims} == {"holds", "not measured"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--metrcs", "a"], "Did you mean --metrics"),
        (["--baseline=dreambooth"], "none of these runs' methods"),
        (["--metrics", "identty"], "Did you mean identity"),
        (["--x", "clip"], "is no score"),
        (["--pictures", "some"], "expected a number, all, none or link"),
        (["--out"], "expected one argument"),
        (["--claims", "nowhere.yaml"], "nowhere.yaml cannot be read as claims"),
        (["--wandb", "hiperlab"], "expected entity/project"),
    ],
)
def test_mistakes_are_one_line(sweep, capsys, words: list[str], message: str) -> None:
    assert main([str(sweep), *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("hiperlab: ") and message in err and err.count("\n") == 1
    assert not (sweep / "comparison.html").exists()


def test_nothing_to_compare(sweep, tmp_path, capsys) -> None:
    assert main([]) == 2 and main([str(tmp_path / "sweps")]) == 2
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty")]) == 2
    assert main([str(sweep / "samples")]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 4 and "Did you mean sweeps" in err[1] and "no run folder in" in err[2]


def test_of_many_neighbours_the_closest_five_are_named(tmp_path, capsys) -> None:
    for number in range(40):
        (tmp_path / f"sweep_{number:02}").mkdir()
    (tmp_path / "sweeps_99").write_text("no folder")
    assert main([str(tmp_path / "sweep_7")]) == 2
    said = capsys.readouterr().err
    assert len(re.findall(r"sweep_\d\d", said.partition("Choices: ")[2])) == 5 and "sweep_07" in said
    assert "sweeps_99" not in said


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs a folder that may not be written into")
def test_a_folder_that_cannot_be_written(sweep, capsys) -> None:
    sweep.chmod(0o500)
    try:
        assert main([str(sweep)]) == 2
    finally:
        sweep.chmod(0o700)
    assert "--out" in capsys.readouterr().err


def test_a_closed_pipe_is_no_folder_that_cannot_be_written(sweep, monkeypatch, capsys) -> None:
    def closed(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    assert main([str(sweep), "--pictures", "none"]) == 0 and (sweep / "comparison.html").is_file()
    assert capsys.readouterr().err == ""


def test_an_output_that_is_a_file(sweep, tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert main([str(sweep), "--out", str(tmp_path / "file")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_help_is_quick_and_nothing_heavy_is_needed(sweep) -> None:
    """Neither torch nor a method; --help not even numpy."""
    code = (
        "import sys; from hiperlab.compare.main import main; main(['--help']); assert 'numpy' not in sys.modules; "
        f"assert main([{str(sweep)!r}, '--pictures', '1']) == 0; "
        "assert not {name for name in sys.modules if name == 'torch' or name.startswith('hiperlab.method')}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--baseline" in done.stdout and "examples:" in done.stdout


def test_a_sweep_ends_with_it_and_never_fails_by_it(sweep, capsys, monkeypatch) -> None:
    from hiperlab.compare import plots
    from hiperlab.sweep.main import _sum_up
    from hiperlab.sweep.outcome import Outcome

    rows = [Outcome(name, [f"method={name}"], "finished", 1.0, str(sweep / name)) for name in ("ti", "neti")]
    _sum_up(sweep, rows, [], 2.0)
    out = capsys.readouterr().out
    assert "clip_text ↑" in out and f"{sweep}/comparison.html" in out and "no comparison" not in out
    assert {path.name for path in sweep.iterdir()} == {*FILES, "plots", "ti", "neti", "sweep.json"}
    failed = Outcome("lora", ["method=lora"], "failed", 1.0, str(sweep / "lora"), "hiperlab: no such file")
    _sum_up(sweep, [*rows, failed], [], 2.0)
    assert f"left out: {sweep}/lora: there is no such folder (its sweep says failed" in capsys.readouterr().out

    def broken(*_: object) -> None:
        raise RuntimeError("no\nfont")

    monkeypatch.setattr(plots, "draw", broken)
    _sum_up(sweep, rows, [], 2.0)
    out = capsys.readouterr().out
    assert "no comparison: RuntimeError: no font (python -m hiperlab.compare" in out and "Traceback" not in out
    (sweep / "ti" / "scores.jsonl").write_text("{")
    (sweep / "neti" / "scores.jsonl").write_text("{")
    _sum_up(sweep, rows, [], 2.0)
    assert "no comparison: no finished run with scores" in capsys.readouterr().out
