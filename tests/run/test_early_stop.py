"""Training that ends by its loss on fixed inputs: where, alone, resumed, folded, and what it leaves alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hiperlab.run.folded import run_folded
from hiperlab.run.main import main
from tests.run.test_fold import assert_learnt_the_same, learnt, losses

JOB = [
    "model=tiny", "model.size=128", "data.resolution=128", "logger=csv", "trainer=cpu", "method=ti", "data=cats",
    "fit.steps=14", "fit.batch_size=2", "fit.checkpoint_every=3", "fit.keep_checkpoints=true", "fit.sample_every=0",
    "stages=[fit]",
]  # fmt: skip
STOP = ["fit.stop=dvar", "fit.dvar.window=3", "fit.dvar.rows=2", "fit.dvar.threshold=0.5"]


def run(folder: Path, *more: str) -> Path:
    assert main([*JOB, *more, f"run_dir='{folder}'"]) == 0
    return folder


def fitted(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())["stages"]["fit"]


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("early") / "ended", *STOP)


def test_it_ends_where_the_ratio_says(ended) -> None:
    found, rows = fitted(ended), losses(ended)
    last = found["steps"]
    assert 3 < last < 14 and found["ended_early"] and found["stopped_at"] == {"cats": last}
    ratios = [row["dvar/ratio"] for row in rows]
    assert len(rows) == last and ratios[:3] == [1.0] * 3
    assert ratios[-1] < 0.5 and all(ratio >= 0.5 for ratio in ratios[:-1])
    assert (ended / "checkpoints" / f"step-{last:06d}.ckpt").is_file()
    assert "steps are saved" in (ended / "run.log").read_text()


def test_a_finished_run_is_left_as_it_is(ended) -> None:
    before = learnt(ended)
    assert main([*JOB, *STOP, f"run_dir='{ended}'", "resume=auto"]) == 0
    assert fitted(ended)["steps"] == losses(ended)[-1]["step"] + 1
    assert all(value.equal(before[key]) for key, value in learnt(ended).items())


def test_watching_changes_nothing_until_the_end(ended, tmp_path) -> None:
    plain = losses(run(tmp_path / "plain"))
    watched = losses(ended)
    assert len(plain) == 14
    assert [row["loss"] for row in watched] == [row["loss"] for row in plain[: len(watched)]]


def test_resumed_it_ends_at_the_same_step_with_the_same_numbers(ended, tmp_path) -> None:
    resumed = tmp_path / "resumed"
    shutil.copytree(ended, resumed)
    shutil.rmtree(resumed / "artifacts")
    results = json.loads((resumed / "results.json").read_text())
    results["status"] = "running"
    del results["stages"]["fit"]
    (resumed / "results.json").write_text(json.dumps(results))
    start = resumed / "checkpoints" / "step-000003.ckpt"
    run(resumed, *STOP, f"resume='{start}'")
    assert losses(resumed) == losses(ended)
    assert all(value.equal(learnt(ended)[key]) for key, value in learnt(resumed).items())


def test_only_every_second_step_is_looked_at(tmp_path) -> None:
    folder = run(tmp_path / "every", *STOP, "fit.dvar.every=2", "fit.dvar.threshold=1e-9", "fit.steps=5")
    seen = [row["dvar/loss"] for row in losses(folder)]
    assert seen[0] == seen[1] != seen[2] == seen[3] != seen[4]
    assert "stopped_at" in fitted(folder) and not fitted(folder)["stopped_at"], "it made all its steps"


def test_in_parts_the_rows_have_other_timesteps(tmp_path) -> None:
    one, two = (
        losses(run(tmp_path / parts, *STOP, f"fit.dvar.parts={parts}", "fit.steps=1"))[0] for parts in ("1", "2")
    )
    assert one["loss"] == two["loss"] and one["dvar/loss"] != two["dvar/loss"]


def test_several_concepts_and_folded_jobs_end_one_by_one(ended, tmp_path) -> None:
    """Each where it would alone."""
    other = run(tmp_path / "other", *STOP, "data=puppy", "seed=4")
    both = run(tmp_path / "both", *STOP, "data.concepts=[cats,puppy]")
    assert fitted(both)["stopped_at"]["cats"] == fitted(ended)["steps"]
    asked = {"first": [], "second": ["data=puppy", "seed=4"]}
    request = tmp_path / "jobs.request"
    lines = {name: [*JOB, *STOP, *more, f"run_dir='{tmp_path / name}'"] for name, more in asked.items()}
    request.write_text(json.dumps(lines))
    assert run_folded(request) == 0
    for alone, folded in ((ended, "first"), (other, "second")):
        assert fitted(tmp_path / folded)["steps"] == fitted(alone)["steps"]
        assert_learnt_the_same(tmp_path / folded, alone)


@pytest.mark.parametrize("method", ["imagic", "null_text", "ddim_inversion"])
def test_methods_that_do_not_end_so_say_why(method, tmp_path, capsys) -> None:
    assert main([*JOB, f"method={method}", *STOP, "data=world_edits", f"run_dir='{tmp_path / method}'"]) == 2
    assert "fit.stop=dvar: " in capsys.readouterr().err


def test_its_settings_without_it_are_refused(tmp_path, capsys) -> None:
    assert main([*JOB, "fit.dvar.window=7", f"run_dir='{tmp_path / 'refused'}'"]) == 2
    assert "fit.dvar.window=7 is read with fit.stop=dvar only" in capsys.readouterr().err
