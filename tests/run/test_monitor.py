"""A score that chooses the step and may end training: alone, resumed, folded, of several concepts."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from hiperlab.metric.contract import EmbeddedPictures, Measurement
from hiperlab.metric.protocol import TextScore
from hiperlab.report.monitor import ScoreMonitor
from hiperlab.run.folded import run_folded
from hiperlab.run.main import main
from tests.composed import ROOT
from tests.run.test_early_stop import fitted
from tests.run.test_fold import learnt, losses

JOB = [
    "model=tiny", "model.size=64", "data.resolution=64", "logger=csv", "trainer=cpu", "method=ti", "data=cats",
    "fit.steps=8", "fit.batch_size=2", "fit.checkpoint_every=3", "fit.keep_checkpoints=true", "fit.sample_every=0",
    "sampler.steps=2", "sample.seeds=[0]", "stages=[fit]",
]  # fmt: skip
ON = ["monitor=clip_image", "fit.monitor.every=2", "fit.monitor.seeds=[7]", "fit.monitor.patience=null"]


def run(folder: Path, *more: str) -> Path:
    assert main([*JOB, *more, f"run_dir='{folder}'"]) == 0
    return folder


def logged(folder: Path, score: str = "clip_image") -> list[tuple[int, float]]:
    return [(row["step"], row[f"monitor/{score}"]) for row in losses(folder) if f"monitor/{score}" in row]


def rows(folder: Path) -> list[dict[str, float]]:
    """All lines of metrics; a score is logged right before or right behind the loss of the step that led to it."""
    return sorted(losses(folder), key=lambda row: (row["step"], *row))


def artifact_step(folder: Path, name: str = "cats") -> int:
    """The step that the run's artifact is of."""
    with safe_open(folder / "artifacts" / f"{name}.safetensors", "pt") as file:
        return int(file.metadata()["steps"])


def row_at(folder: Path, step: int) -> torch.Tensor:
    """The learnt row that a checkpoint holds."""
    state = torch.load(folder / "checkpoints" / f"step-{step:06d}.ckpt", weights_only=True)["state_dict"]
    return state["vectors"][0]


@pytest.fixture
def scripted(monkeypatch):
    """Give the scores of the evaluations, by step, instead of the judge's."""
    plain = ScoreMonitor._score

    def give(scores: dict[int, float]) -> None:
        def judged(self, trainer, method, best) -> None:
            self.judge = lambda pictures: scores[trainer.global_step]
            plain(self, trainer, method, best)

        monkeypatch.setattr(ScoreMonitor, "_score", judged)

    return give


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("monitor") / "watched", *ON)


def test_every_second_step_is_scored_and_the_best_is_kept(watched) -> None:
    scores, found = logged(watched), fitted(watched)
    assert [step for step, _ in scores] == [2, 4, 6, 8] and len({value for _, value in scores}) == 4
    step, best = max(scores, key=lambda pair: pair[1])
    told = found["monitor"]["cats"]
    assert found["monitor"]["score"] == "clip_image" and told["evaluations"] == 4 and told["seconds"] > 0
    assert (told["best"], told["best_step"], told["artifact_step"]) == (pytest.approx(best, abs=1e-7), step, step)
    assert found["steps_saved"] == {"cats": 0} and found["stopped_at"] == {} and found["steps"] == 8
    assert artifact_step(watched) == step
    assert {path.name for path in (watched / "monitor").iterdir()} == {f"step-00000{n}.png" for n in (2, 4, 6, 8)}


def test_drawing_changes_nothing_of_the_training(watched, tmp_path) -> None:
    plain = run(tmp_path / "plain")
    assert [row["loss"] for row in losses(plain)] == [row["loss"] for row in losses(watched) if "loss" in row]
    for step in (3, 6, 8):
        ours, theirs = (
            torch.load(folder / "checkpoints" / f"step-{step:06d}.ckpt", weights_only=True)
            for folder in (watched, plain)
        )
        assert ours["state_dict"].keys() == theirs["state_dict"].keys()
        assert all(torch.equal(value, theirs["state_dict"][key]) for key, value in ours["state_dict"].items())
        moments = [each["optimizer_states"][0]["state"][0] for each in (ours, theirs)]
        assert all(torch.equal(value, moments[1][key]) for key, value in moments[0].items())


def test_torch_random_state_is_left_alone(tmp_path) -> None:
    states = []
    for more in ([], ON):
        torch.manual_seed(5)
        run(tmp_path / f"random{len(more)}", *more)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_it_is_the_score_of_the_table(watched, tmp_path) -> None:
    """The same judge, mean and pictures as in the score stage, once the monitor's prompts are sampled."""
    folder = tmp_path / "again"
    shutil.copytree(watched, folder)
    prompts = 'data.prompts=["a photo of a {} in a garden","a photo of a {} on a kitchen table",' \
              '"a {} next to a bicycle","a pencil drawing of a {}"]'  # fmt: skip
    as_monitored = [prompts, "sample.seeds=[7]", "sample.prompts=null"]
    assert main([f"run_dir='{folder}'", "stages=[sample,score]", *as_monitored]) == 0
    (row,) = [
        row for row in json.loads((folder / "results.json").read_text())["scores"]
        if row["metric"] == "clip_image" and row["kind"] == "all"
    ]  # fmt: skip
    assert row["mean"] == pytest.approx(fitted(watched)["monitor"]["cats"]["best"], abs=1e-6)


@pytest.mark.parametrize("start", [3, 6])
def test_resumed_it_is_the_uninterrupted_run(watched, tmp_path, start) -> None:
    """From a checkpoint between two scores, and from one that stands behind a score."""
    folder = tmp_path / "resumed"
    shutil.copytree(watched, folder)
    shutil.rmtree(folder / "artifacts")
    results = json.loads((folder / "results.json").read_text())
    results["status"] = "running"
    del results["stages"]["fit"]
    (folder / "results.json").write_text(json.dumps(results))
    run(folder, *ON, f"resume='{folder / 'checkpoints' / f'step-{start:06d}.ckpt'}'")
    assert rows(folder) == rows(watched)
    ours, theirs = fitted(folder)["monitor"]["cats"], fitted(watched)["monitor"]["cats"]
    assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    assert all(torch.equal(value, learnt(watched)[key]) for key, value in learnt(folder).items())
    assert artifact_step(folder) == artifact_step(watched)
    kept = [sorted(path.name for path in (each / "checkpoints").glob("best-*")) for each in (folder, watched)]
    assert kept[0] == kept[1]


SCORES = {2: 0.3, 4: 0.5, 6: 0.4, 8: 0.45}


def test_the_first_best_is_kept_exactly(scripted, tmp_path) -> None:
    scripted(SCORES)
    folder = run(tmp_path / "best", *ON, "fit.checkpoint_every=1")
    assert artifact_step(folder) == 4
    assert torch.equal(learnt(folder)["vectors"], row_at(folder, 4))
    assert not torch.equal(learnt(folder)["vectors"], row_at(folder, 8))
    assert "the artifact is that of step 4" in (folder / "run.log").read_text()
    assert "Trained for 4 steps" in (folder / "artifacts" / "README.md").read_text()
    (exported,) = (folder / "artifacts" / "cats").glob("learned_embeds.safetensors")
    assert torch.equal(next(iter(load_file(exported).values())), row_at(folder, 4))
    last = run(tmp_path / "last", *ON, "fit.checkpoint_every=1", "fit.monitor.keep=last")
    assert artifact_step(last) == 8 and torch.equal(learnt(last)["vectors"], row_at(last, 8))
    assert fitted(last)["monitor"]["cats"]["best_step"] == 4


def test_patience_ends_it(scripted, tmp_path) -> None:
    """So many may be no better, the next one ends; the stop is in the last checkpoint, the steps saved are told."""
    scripted(SCORES)
    folder = run(tmp_path / "ended", *ON, "fit.monitor.patience=1", "fit.steps=20", "sampler.steps=1")
    found = fitted(folder)
    assert found["steps"] == 8 and found["ended_early"] and found["stopped_at"] == {"cats": 8}
    assert found["steps_saved"] == {"cats": 12} and artifact_step(folder) == 4
    assert (folder / "checkpoints" / "step-000008.ckpt").is_file()
    assert "training ends after step 8, 12 steps are saved" in (folder / "run.log").read_text()
    before = (folder / "artifacts" / "cats.safetensors").stat().st_mtime_ns
    more = [*ON, "fit.monitor.patience=1", "fit.steps=20", "sampler.steps=1", "resume=auto"]
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps({**results, "status": "running"}))
    run(folder, *more)  # killed behind the last checkpoint: no step is made again
    assert fitted(folder)["steps"] == 8 and artifact_step(folder) == 4
    assert (folder / "artifacts" / "cats.safetensors").stat().st_mtime_ns > before
    assert "12 steps are saved" in (folder / "run.log").read_text().split("resuming from")[0]


@pytest.mark.parametrize("drawn", [[], ["fit.sample_every=2"]], ids=["scored", "drawn, too"])
def test_scoring_is_no_training_time(drawn, scripted, monkeypatch, tmp_path) -> None:
    """What a table calls the cost of a training is free of what was looked at in between."""

    def slowly(*_: object) -> list[Image.Image]:
        time.sleep(1.5)
        return [Image.new("RGB", (8, 8))] * 8

    scripted(SCORES)
    monkeypatch.setattr("hiperlab.report.monitor.draw_between", slowly)
    monkeypatch.setattr("hiperlab.report.samples.draw_between", slowly)
    found = fitted(run(tmp_path / "slow", *ON, *drawn))
    waited = 4 * 1.5 + (5 * 1.5 if drawn else 0)
    assert found["monitor"]["cats"]["seconds"] >= 4 * 1.5
    assert found["train_seconds"] <= found["seconds"] - waited


def test_less_may_be_better(scripted, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("hiperlab.metric.protocol.ImageScore.lower", True)
    scripted(SCORES)
    assert artifact_step(run(tmp_path / "lower", *ON)) == 2


def test_nothing_found_is_never_the_best(scripted, tmp_path) -> None:
    scripted({2: math.nan, 4: 0.1, 6: math.nan, 8: math.nan})
    folder = run(tmp_path / "some", *ON, "fit.monitor.patience=1", "fit.steps=20", "sampler.steps=1")
    assert fitted(folder)["steps"] == 8 and artifact_step(folder) == 4, (
        "NaN is no better; before a number it is no wait"
    )
    assert [value for _, value in logged(folder)] == [None, 0.1, None, None]
    scripted(dict.fromkeys(SCORES, math.nan))
    folder = run(tmp_path / "none", *ON, "fit.monitor.patience=1")
    assert artifact_step(folder) == 8 and fitted(folder)["monitor"]["cats"]["best"] is None
    assert "found nothing at all: the last step is kept" in (folder / "run.log").read_text()


class Nothing(TextScore):
    """Finds something in no picture."""

    def measurements(self, pictures: EmbeddedPictures) -> Iterator[Measurement]:
        for record in pictures.records:
            yield Measurement("picture", math.nan, record["concept"], record)


def test_a_judge_that_finds_nothing(tmp_path) -> None:
    words = [
        "metric.members.clip_text._target_=tests.run.test_monitor.Nothing", "monitor=clip_text",
        "fit.monitor.every=4", "fit.monitor.patience=null", "allowed_targets=[tests.run.test_monitor]",
    ]  # fmt: skip
    folder = run(tmp_path / "nothing", *words)
    assert [value for _, value in logged(folder, "clip_text")] == [None, None] and artifact_step(folder) == 8


# ---- killed --------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.mark.parametrize("where", ["drawing", "scoring", "artifact", "checkpoint"])
def test_killed_at_any_point_it_goes_on_as_uninterrupted(watched, tmp_path, monkeypatch, where) -> None:
    """In the scoring of step 6, or in the checkpoint behind it: all that is on disk is what a kill leaves."""
    from hiperlab.report import monitor
    from hiperlab.report.checkpoint import StepCheckpoints

    step = []

    def killing(plain):
        def killed(*args, **how):
            if step and step[-1] >= 6:
                raise Killed
            return plain(*args, **how)

        return killed

    plain_score = ScoreMonitor._score

    def scored(self, trainer, method, best) -> None:
        step.append(trainer.global_step)
        if where == "scoring":
            self.judge = killing(self.judge)
        if where == "artifact":  # written, and then killed
            self._prune = killing(self._prune)
        plain_score(self, trainer, method, best)

    monkeypatch.setattr(ScoreMonitor, "_score", scored)
    if where == "drawing":
        monkeypatch.setattr(monitor, "draw_between", killing(monitor.draw_between))
    if where == "checkpoint":
        monkeypatch.setattr(StepCheckpoints, "save", killing(StepCheckpoints.save))
    folder = tmp_path / where
    assert main([*JOB, *ON, f"run_dir='{folder}'"]) != 0
    assert not (folder / "checkpoints" / "step-000006.ckpt").is_file()
    monkeypatch.undo()
    run(folder, *ON, "resume=auto")
    assert "resuming from step-000003" in (folder / "run.log").read_text()
    assert rows(folder) == rows(watched)
    assert all(torch.equal(value, learnt(watched)[key]) for key, value in learnt(folder).items())
    assert artifact_step(folder) == artifact_step(watched)


def test_told_to_stop_where_a_score_is_due_it_is_made_up_for(watched, tmp_path, monkeypatch) -> None:
    """A stop at step 6 comes before its score; the resumed run begins with it."""
    from hiperlab.report.signals import StopCallback

    plain = StopCallback.on_train_batch_end

    def told(self, trainer, *rest) -> None:
        if trainer.global_step == 6:
            self.signals.received = 15
        plain(self, trainer, *rest)

    monkeypatch.setattr(StopCallback, "on_train_batch_end", told)
    folder = tmp_path / "stopped"
    assert main([*JOB, *ON, f"run_dir='{folder}'"]) == 143
    assert [step for step, _ in logged(folder)] == [2, 4]
    monkeypatch.undo()
    run(folder, *ON, "resume=auto")
    assert rows(folder) == rows(watched)
    assert all(torch.equal(value, learnt(watched)[key]) for key, value in learnt(folder).items())


def test_a_lost_best_artifact_is_named(watched, tmp_path, capsys) -> None:
    folder = tmp_path / "lost"
    shutil.copytree(watched, folder)
    for path in (folder / "checkpoints").glob("best-*"):
        path.write_bytes(path.read_bytes()[:-1])
    start = folder / "checkpoints" / "step-000003.ckpt"
    assert main([*JOB, *ON, f"run_dir='{folder}'", f"resume='{start}'"]) == 1
    said = capsys.readouterr().err
    assert "the best artifact so far is lost: artifact" in said and "Traceback" not in said


# ---- several -------------------------------------------------------------------------------------------------------


def test_several_concepts_and_folded_jobs_choose_one_by_one(watched, tmp_path) -> None:
    """Each what it would be alone."""
    other = run(tmp_path / "other", *ON, "data=puppy", "seed=4")
    both = run(tmp_path / "both", *ON, "data.concepts=[cats,puppy]")
    assert fitted(both)["monitor"].keys() == {"score", "cats", "puppy"}
    assert artifact_step(both) == artifact_step(watched)
    assert [step for step, _ in logged(both / "concepts" / "puppy")] == [2, 4, 6, 8]
    asked = {"first": [], "second": ["data=puppy", "seed=4"]}
    request = tmp_path / "jobs.request"
    lines = {name: [*JOB, *ON, *more, f"run_dir='{tmp_path / name}'"] for name, more in asked.items()}
    request.write_text(json.dumps(lines))
    assert run_folded(request) == 0
    for alone, folded, name in ((watched, "first", "cats"), (other, "second", "puppy")):
        assert fitted(tmp_path / folded)["shared_by"] == 2
        assert artifact_step(tmp_path / folded, name) == artifact_step(alone, name)
        ours, theirs = logged(tmp_path / folded), logged(alone)
        assert [step for step, _ in ours] == [step for step, _ in theirs]
        values = [[value for _, value in each] for each in (ours, theirs)]
        assert values[0] == pytest.approx(values[1], abs=5e-3), "pictures of noise"
        for key, value in learnt(tmp_path / folded).items():
            assert torch.allclose(value, learnt(alone)[key], rtol=1e-3, atol=1e-5), key


def test_of_folded_jobs_one_may_end_first(scripted, tmp_path) -> None:
    scripted(SCORES)
    request = tmp_path / "jobs.request"
    asked: dict[str, Sequence[str]] = {"patient": [], "hasty": ["seed=4"]}
    short = {"patient": ["monitor=clip_image"], "hasty": ["monitor=dino"]}
    more = ["fit.monitor.patience=0", "fit.monitor.every=2", "fit.monitor.seeds=[7]", "fit.monitor.min_delta=0"]
    lines = {name: [*JOB, *words, *short[name], *more, f"run_dir='{tmp_path / name}'"] for name, words in asked.items()}
    request.write_text(json.dumps(lines))
    assert run_folded(request) == 0
    for name in asked:
        assert fitted(tmp_path / name)["steps"] == 6 and artifact_step(tmp_path / name) == 4


def test_the_loss_may_end_what_the_score_chooses(scripted, tmp_path) -> None:
    """The step at which DVAR ends it is scored, too."""
    scripted(dict.fromkeys(range(1, 9), 0.5) | {2: 0.1})
    stop = ["fit.stop=dvar", "fit.dvar.window=3", "fit.dvar.rows=2", "fit.dvar.threshold=0.9999"]
    folder = run(tmp_path / "dvar", *ON, *stop, "fit.monitor.every=2", "fit.steps=40", "sampler.steps=1")
    found = fitted(folder)
    assert found["steps"] < 8 and found["steps_saved"] == {"cats": 40 - found["steps"]}
    assert logged(folder)[-1][0] == found["steps"]


def test_two_processes_agree(tmp_path) -> None:
    """The first one scores, both end where it says."""
    words = ["trainer=ddp_cpu", "monitor=dino", "fit.monitor.every=2", "fit.monitor.patience=0"]
    command = [*JOB, *words, "fit.monitor.min_delta=1.0", f"run_dir='{tmp_path / 'ddp'}'"]
    done = subprocess.run([sys.executable, "-m", "hiperlab.run", *command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    found = fitted(tmp_path / "ddp")
    assert found["world_size"] == 2 and found["steps"] == 4 and found["monitor"]["cats"]["evaluations"] == 2


# ---- refused -------------------------------------------------------------------------------------------------------

REFUSED = {
    "no such score": (["monitor=clip_imag"], "monitor=clip_imag is no score of metric=twin. Did you mean clip_image"),
    "unread": (["fit.monitor.every=7"], "fit.monitor.every=7 is read with monitor=… only"),
    "phases": (["monitor=dino", "method=imagic"], "monitor=dino: an end in the embedding's phase"),
    "a path": (["monitor=dino", "method=null_text"], "monitor=dino: every step of the path ends by a loss of its own"),
    "untrained": (["monitor=dino", "method=ddim_inversion"], "monitor=dino: this method trains nothing"),
    "no steps": (["monitor=dino", "fit.steps=0"], "monitor=dino: fit.steps=0 trains nothing"),
    "reported prompts": (
        ["monitor=dino", "data.prompts=monitor"], "fit.monitor.prompts: 'a photo of a {} in a garden' is an evaluation",
    ),
    "reported seeds": (["monitor=dino", "fit.monitor.seeds=[5,0]"], "fit.monitor.seeds: 0 is among sample.seeds"),
    "no slot": (["monitor=dino", "fit.monitor.prompts=[a cat]"], "prompt 'a cat' in fit.monitor.prompts lacks '{}'"),
    "no list": (["monitor=dino", "fit.monitor.prompts=monitr"], "prompt list 'monitr' is neither a shipped list"),
    "edits": (["monitor=direction", "metric=edit_twin"], "monitor=direction judges edits only"),
    "weights": (
        ["monitor=clip_text", "metric=mini", "metric.encoders.clip.path=nowhere"], "metric.encoders.clip.path=nowhere",
    ),
    "two": (["monitor=[dino,clip_text]"], "monitor=['dino','clip_text']: expected a score"),
    "patience": (["monitor=dino", "fit.monitor.patience=-1"], "fit.monitor.patience=-1: expected a whole number"),
    "keep": (["monitor=dino", "fit.monitor.keep=all"], "fit.monitor.keep=all: expected one of best, last"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_training(case, tmp_path, capsys) -> None:
    words, message = REFUSED[case]
    data = ["data=world_edits"] if case in ("phases", "a path", "untrained") else []
    assert main([*JOB, *words, *data, f"run_dir='{tmp_path / 'refused'}'"]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert not (tmp_path / "refused" / "checkpoints").exists()


def test_resumed_under_another_score_is_refused(watched, tmp_path, capsys) -> None:
    folder = tmp_path / "other"
    shutil.copytree(watched, folder)
    start = f"resume='{folder / 'checkpoints' / 'step-000003.ckpt'}'"
    for changed in ("monitor=dino", "fit.monitor.seeds=[8]", "sampler.steps=3"):
        assert main([*JOB, *ON, changed, f"run_dir='{folder}'", start]) == 2
        key = changed.split("=")[0]
        assert f"under other settings: {key} (was" in capsys.readouterr().err
    record = folder / "checkpoints" / "config.yaml"
    record.write_text(record.read_text().replace("monitor: clip_image", "monitor: null"))
    assert main([*JOB, *ON, f"run_dir='{folder}'", start]) == 2
    assert "monitor (was None, now 'clip_image')" in capsys.readouterr().err
    shutil.copyfile(watched / "checkpoints" / "config.yaml", record)
    run(folder, *ON, "fit.monitor.patience=0", start)
