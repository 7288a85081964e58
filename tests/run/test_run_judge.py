"""`metric=judge` through the door."""

from __future__ import annotations

import sys

from hiperlab import files
from tests.run.test_run import run

PROGRAM = "import sys\nfor line in sys.stdin: print(0.25)\n"


def test_a_program_judges_a_run(tmp_path, capsys) -> None:
    path = tmp_path / "judge.py"
    path.write_text(PROGRAM)
    asked = [
        "method=ti", "metric=judge", "metric.encoders.judge.version='mine, 1'",
        f"metric.encoders.judge.command=['{sys.executable}','{path}']",
    ]  # fmt: skip
    folder = tmp_path / "run"
    assert run(folder, *asked) == 2
    assert "would run `" in capsys.readouterr().err and not folder.exists()
    assert run(folder, *asked, f"allowed_targets=['{sys.executable} {path}']") == 0
    rows = files.read_jsonl(folder / "scores.jsonl")
    assert {row["value"] for row in rows} == {0.25} and {row["metric"] for row in rows} == {"judge"}
    path.unlink()
    assert run(folder, *asked, "stages=[score]") == 2, "trust counts on the command line only"


def test_a_function_judges_a_run(tmp_path, monkeypatch) -> None:
    (tmp_path / "my_judge_module.py").write_text("def likeness(prompt, pictures):\n    return len(pictures)\n")
    monkeypatch.syspath_prepend(tmp_path)
    asked = [
        "method=ti", "metric=judge", "metric.encoders.judge.version=1", "metric.members.judge.references=2",
        "metric.encoders.judge.call={_target_: my_judge_module.likeness, _partial_: true}",
    ]  # fmt: skip
    assert run(tmp_path / "run", *asked) == 2
    assert run(tmp_path / "run", *asked, "allowed_targets=[my_judge_module]") == 0
    assert {row["value"] for row in files.read_jsonl(tmp_path / "run" / "scores.jsonl")} == {3}
