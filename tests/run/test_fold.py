"""Jobs of a sweep in one process: shared passes, and each run is what it would be in a process of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file

from hiperlab.errors import UserError
from hiperlab.model.stack import FrozenStack
from hiperlab.run import fit
from hiperlab.run.folded import run_folded
from hiperlab.run.main import main
from hiperlab.sweep import outcome as sweep
from hiperlab.sweep.fold import folded, most_jobs
from hiperlab.sweep.job import Job
from hiperlab.sweep.job import fold as fold_process
from hiperlab.sweep.launcher import Devices, run_jobs

SMALL = [
    "model=tiny", "model.size=128", "data.resolution=128", "logger=csv", "trainer=cpu", "fit.steps=4",
    "fit.batch_size=2", "fit.micro_batch_size=1", "fit.checkpoint_every=2", "fit.gradient_clip=1.0",
    "fit.sample_every=4", "fit.sample_prompts=1", "sampler.steps=2", "sample.seeds=[0]", "sample.prompts=1",
    "stages=[fit,sample]",
]  # fmt: skip
JOBS = {
    "ti": ["method=ti", "data=cats"],
    "other": ["method=ti", "data=puppy", "seed=3", "method.optimizer.lr=0.5"],
    "lora": ["method=lora", "data=cats", "method.prior.weight=0"],
    "neti": ["method=neti", "data=cats", "method.nested_dropout=0.9"],
}


def fold(folder: Path, names: list[str], *more: str) -> tuple[int, dict[str, int]]:
    """Exit codes of the process and of each job."""
    folder.mkdir(exist_ok=True)
    request = folder / "jobs.request"
    asked = {name: [*SMALL, *JOBS[name], *more, f"run_dir='{folder / name}'"] for name in names}
    request.write_text(json.dumps(asked))
    code = run_folded(request)
    return code, json.loads(request.with_suffix(".codes").read_text())


def alone(folder: Path, name: str, *more: str) -> int:
    return main([*SMALL, *JOBS[name], *more, f"run_dir='{folder / name}'"])


def losses(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "time"} for row in rows]


def learnt(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = (folder / "artifacts").glob("*.safetensors")
    return load_file(path)


def assert_learnt_the_same(mine: Path, other: Path) -> None:
    """But for rounding, which Adam makes larger where a gradient is almost zero: hence the norm of each tensor."""
    ours, theirs = learnt(mine), learnt(other)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        apart = (value.double() - theirs[key].double()).norm() / theirs[key].double().norm().clamp(min=1e-6)
        assert apart < 5e-5, (key, float(apart))


def assert_equal_runs(mine: Path, other: Path, folder: str) -> None:
    """Files, metrics, what was learnt, checkpoints and settings of two runs."""
    names = [
        {str(path.relative_to(root / folder)) for path in (root / folder).rglob("*") if path.is_file()}
        for root in (mine, other)
    ]
    assert names[0] == names[1]
    ours, theirs = losses(mine / folder), losses(other / folder)
    assert len(ours) == len(theirs) and [row["step"] for row in ours] == [row["step"] for row in theirs]
    for one, two in zip(ours, theirs, strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    assert_learnt_the_same(mine / folder, other / folder)
    checkpoints = [
        torch.load(root / folder / "checkpoints" / "step-000004.ckpt", weights_only=True) for root in (mine, other)
    ]
    assert checkpoints[0].keys() == checkpoints[1].keys()
    for key in ("global_step", "epoch", "loops"):
        assert checkpoints[0][key] == checkpoints[1][key], key
    assert checkpoints[0]["state_dict"].keys() == checkpoints[1]["state_dict"].keys()
    settings = [OmegaConf.load(root / folder / "config.yaml") for root in (mine, other)]
    for each in settings:
        del each["run_dir"]
    assert settings[0] == settings[1]


@pytest.fixture(scope="module")
def lone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    for name in JOBS:
        assert alone(folder, name) == 0
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("folded")
    assert fold(folder, list(JOBS)) == (0, dict.fromkeys(JOBS, 0))
    return folder


@pytest.mark.parametrize("name", JOBS)
def test_each_is_what_it_would_be_alone(lone, together, name) -> None:
    assert_equal_runs(together, lone, name)
    results = json.loads((together / name / "results.json").read_text())
    assert results["status"] == "finished" and results["stages"]["fit"]["shared_by"] == len(JOBS)
    before = json.loads((lone / name / "results.json").read_text())
    assert results["steps"] == before["steps"] and results["stages"].keys() == before["stages"].keys()
    assert results["stages"]["fit"]["loss"] == pytest.approx(before["stages"]["fit"]["loss"], rel=1e-4)
    assert "--folded" not in results["command"].split() and str(together / name) in results["command"]
    said = (together / name / "run.log").read_text()
    assert said.count("stage sample\n") == said.count("stage fit\n") == 1 and "share their passes" in said
    card = (together / name / "artifacts" / "README.md").read_text()
    assert "--folded" not in card and str(together / name) in card
    seconds = [json.loads((together / each / "results.json").read_text())["seconds"]["fit"] for each in JOBS]
    assert len(set(seconds)) == 1 or max(seconds) < sum(seconds), "parts of the whole"


def test_stopped_half_way_each_goes_on_together_or_alone(together, tmp_path) -> None:
    assert fold(tmp_path, ["ti", "lora"], "fit.steps=2", "stages=[fit]")[0] == 0
    shutil.copytree(tmp_path / "ti", tmp_path / "apart" / "ti")
    assert fold(tmp_path, ["ti", "lora"], "resume=auto") == (0, {"ti": 0, "lora": 0})
    assert alone(tmp_path / "apart", "ti", "resume=auto") == 0
    for folder in (tmp_path / "ti", tmp_path / "lora", tmp_path / "apart" / "ti"):
        assert "resuming from step-000002 of 4" in (folder / "run.log").read_text()
        assert_learnt_the_same(folder, together / folder.name)
        assert [row["step"] for row in losses(folder) if "loss" in row] == [0, 1, 2, 3]


def test_trainings_at_different_steps_go_on_apart(together, tmp_path) -> None:
    assert fold(tmp_path, ["ti"], "fit.steps=2", "stages=[fit]")[0] == 0
    assert fold(tmp_path, ["ti", "neti"], "resume=auto")[0] == 0
    assert "shared_by" not in json.loads((tmp_path / "ti" / "results.json").read_text())["stages"]["fit"]
    for name in ("ti", "neti"):
        assert_learnt_the_same(tmp_path / name, together / name)


def test_one_that_breaks_is_named_and_the_others_go_on(together, tmp_path, monkeypatch) -> None:
    """Its weights become infinite in the first step; nothing of the others changes."""
    monkeypatch.setitem(JOBS, "wild", ["method=ti", "data=puppy", "method.optimizer.lr=1e30"])
    code, codes = fold(tmp_path, ["wild", "ti", "lora"])
    assert code == 1 and codes == {"wild": 1, "ti": 0, "lora": 0}
    said = (tmp_path / "wild" / "job.log").read_text()
    assert "step 2: loss is nan, nan (puppy views" in said and "Traceback" not in said
    results = json.loads((tmp_path / "wild" / "results.json").read_text())
    assert results["status"] == "failed" and "loss is nan" in results["error"]
    assert not (tmp_path / "wild" / "samples").exists()
    for name in ("ti", "lora"):
        assert_learnt_the_same(tmp_path / name, together / name)
        assert "loss is nan" not in (tmp_path / name / "run.log").read_text()


def test_a_mistake_in_one_job_stops_that_one(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(JOBS, "wrong", ["method=ti", "data=cats", "method.nonsense=1"])
    monkeypatch.setitem(JOBS, "late", ["method=ti", "data=cats", "fit.batch_size=2", "data.placeholder='a b'"])
    code, codes = fold(tmp_path, ["wrong", "ti", "late"], "fit.steps=1", "stages=[fit]")
    assert code == 1 and codes == {"wrong": 2, "ti": 0, "late": 2}
    assert "nonsense" in (tmp_path / "wrong" / "job.log").read_text()


def test_what_ends_the_process_is_written_into_every_run(tmp_path, monkeypatch) -> None:
    def breaks(*_: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(fit, "train_together", breaks)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        fold(tmp_path, ["ti", "lora"], "stages=[fit]")
    assert json.loads((tmp_path / "jobs.codes").read_text()) == {"ti": 1, "lora": 1}
    for name in ("ti", "lora"):
        results = json.loads((tmp_path / name / "results.json").read_text())
        assert results["status"] == "failed" and "illegal memory access" in results["error"]
        assert "illegal memory access" in (tmp_path / name / "job.log").read_text()


def test_out_of_memory_halves_the_passes(together, tmp_path, monkeypatch) -> None:
    sizes: list[int] = []
    whole = fit.train_together

    def small(trainees: Any, *how: Any) -> Any:
        sizes.append(len(trainees))
        if len(trainees) > 2:
            raise torch.OutOfMemoryError("no room")
        return whole(trainees, *how)

    monkeypatch.setattr(fit, "train_together", small)
    assert fold(tmp_path, list(JOBS), "stages=[fit]")[0] == 0
    assert sizes == [4, 2, 2]
    for name in JOBS:
        assert_learnt_the_same(tmp_path / name, together / name)


def test_kept_concepts_are_drawn_in_shared_calls(lone, tmp_path, monkeypatch) -> None:
    """A grid of artifacts, prompts and seeds: the U-Net is asked as often as for one of them."""
    sizes: list[int] = []
    predict = FrozenStack.predict

    def counted(self: FrozenStack, latents: torch.Tensor, *how: Any) -> torch.Tensor:
        sizes.append(len(latents))
        return predict(self, latents, *how)

    monkeypatch.setattr(FrozenStack, "predict", counted)
    kept = {name: next((lone / name / "artifacts").glob("*.safetensors")) for name in ("ti", "neti")}
    for name, path in kept.items():
        monkeypatch.setitem(JOBS, name, [*JOBS[name], f"artifact='{path}'"])
    asked = ["stages=[sample]", "sample.prompts=2", "sample.seeds=[0,1]"]
    assert fold(tmp_path / "both", list(kept), *asked)[0] == 0
    assert sizes == [16, 16], "two steps: guidance's 2 x 2 artifacts x 2 prompts x 2 seeds"
    for name in kept:
        assert alone(tmp_path / "apart", name, *asked) == 0
        drawn = sorted((tmp_path / "both" / name / "samples").rglob("*.png"))
        assert len(drawn) == 4
        for path in drawn:
            other = tmp_path / "apart" / path.relative_to(tmp_path / "both")
            one, two = (np.asarray(Image.open(each)).astype(int) for each in (path, other))
            assert np.abs(one - two).max() <= 1


def test_jobs_of_a_process_that_dies_go_on_in_one_each(tmp_path, monkeypatch) -> None:
    """The first process kills itself; what it had ended counts, the others are started anew."""
    monkeypatch.setenv(sweep.INVOCATION, "test")
    dies = (
        "import json, os, sys; json.dump({'a': 0}, open(sys.argv[1].replace('request', 'codes'), 'w')); "
        "sys.stdout.flush(); os.kill(os.getpid(), 9)"
    )
    lives = "import json, sys; json.dump({'status': 'finished'}, open(sys.argv[1], 'w'))"
    jobs = []
    for name in ("a", "b", "c"):
        results = tmp_path / name / "results.json"
        jobs.append(Job(name, [], tmp_path / name, [sys.executable, "-c", lives, str(results), "hiperlab.run"], []))
    (tmp_path / "a").mkdir()
    folded_command = fold_process

    def dying(given: list[Job]) -> Any:
        command, codes, log = folded_command(given)
        (tmp_path / "a" / "results.json").write_text(json.dumps({"status": "finished"}))
        return [sys.executable, "-c", dies, command[-1]], codes, log

    monkeypatch.setattr("hiperlab.sweep.job.fold", dying)
    ended = run_jobs([jobs], tmp_path, Devices([], None))
    assert [(each.job, each.status) for each in ended] == [("a", "finished"), ("b", "finished"), ("c", "finished")]


# ---- which jobs go together ------------------------------------------------------------------------------------------


def job(name: str) -> Job:
    return Job(name, [], Path(name), [], ["fit"])


def config(**changes: Any) -> Any:
    plain = {
        "method": {"_target_": "hiperlab.method.ti.TextualInversion"},
        "model": {"size": 64},
        "precision": {"grad_scaler": False},
        "trainer": {"devices": 1, "num_nodes": 1},
        "fit": {"batch_size": 8},
        "stages": ["fit"],
        "resume": None,
        "fold": "auto",
    }
    return OmegaConf.create({**plain, **changes})


def names(configs: list[Any], devices: int = 1) -> list[str]:
    jobs = [job(str(number)) for number in range(len(configs))]
    return ["".join(each.name for each in group) for group in folded(jobs, configs, devices)]


def test_jobs_fold_that_ask_for_the_same_training() -> None:
    same = config()
    assert names([same, config(seed=3), config(method={**same.method, "lr": 1.0}), same]) == ["0123"]
    assert names([same] * 6) == ["0123", "45"], "32 images a pass"
    assert names([same] * 4, devices=2) == ["01", "23"], "every device gets work"
    assert names([same, config(fit={"batch_size": 4}), same]) == ["02", "1"]
    assert names([config(data={"concepts": ["cats", "puppy"]})] * 4) == ["01", "23"], "two concepts of 8 pictures each"
    assert names([same, config(model={"size": 128})]) == ["0", "1"]
    for apart in (
        config(stages=["score"]),
        config(artifacts=["a.safetensors"]),
        config(trainer={"devices": 2, "num_nodes": 1}),
        config(precision={"grad_scaler": True}),
        config(resume="step-000001.ckpt"),
        config(fold="off"),
        config(method={"_target_": "hiperlab.method.dreambooth.DreamBooth"}),
    ):
        assert names([apart, apart]) == ["0", "1"]
    assert names([config(fold=3)] * 4) == ["012", "3"]


@pytest.mark.parametrize("value", [0, -1, True, "some", 1.5])
def test_fold_is_auto_off_or_a_number(value, capsys) -> None:
    with pytest.raises(UserError, match="fold="):
        most_jobs(config(fold=value))
    assert main([f"fold={value}", "model=tiny"]) == 2
    assert "expected auto, off, or the most jobs of one process" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["auto", "off", "8"])
def test_the_door_takes_what_fold_may_be(value, capsys) -> None:
    assert main([f"fold={value}", "model=tiny", "--cfg", "job"]) == 0
    assert f"fold: {value}\n" in capsys.readouterr().out.replace("'", "")


@pytest.mark.parametrize("launcher", ["process", "submitit_local"])
def test_a_sweep_folds_by_itself(tmp_path, launcher) -> None:
    """Through `-m`: one process, three run folders; the second command has nothing to do."""
    if launcher != "process":
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    command = [
        "-m", *SMALL, f"hydra/launcher={launcher}", "method=ti", "data=cats", "seed=0,1,2", "fit.steps=1",
        "sweep=seeds", f"outputs_dir='{tmp_path}'",
    ]  # fmt: skip
    sweep_it = partial(subprocess.run, [sys.executable, "-m", "hiperlab.run", *command], check=True)
    sweep_it()
    folder = tmp_path / "sweeps" / "seeds"
    rows = json.loads((folder / "sweep.json").read_text())["jobs"]
    assert [row["status"] for row in rows] == ["finished"] * 3
    assert len(list(folder.glob(".jobs/*/folded-*.log"))) == 1
    seeds = set()
    for row in rows:
        settings = OmegaConf.load(Path(row["folder"]) / "config.yaml")
        seeds.add(settings.seed)
        assert "one process with 2 others" in (Path(row["folder"]) / "job.log").read_text()
    assert seeds == {0, 1, 2}
    sweep_it()
    rows = json.loads((folder / "sweep.json").read_text())["jobs"]
    assert [row["status"] for row in rows] == ["skipped"] * 3


def test_a_failed_run_is_failed_in_wandb_too(tmp_path, monkeypatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr("hiperlab.report.tracker.Trackers.finish", lambda self, exit_code=0: ended.append(exit_code))
    monkeypatch.setitem(JOBS, "wild", ["method=ti", "data=puppy", "method.optimizer.lr=1e30"])
    assert alone(tmp_path, "wild", "stages=[fit]") == 1
    assert ended == [1]
