"""Killed at random moments, resumed, and bit-identical; told to stop, saved; two processes like one.

`HIPERLAB_KILLS=20 python -m pytest tests/run/test_resume.py` measures with more kills.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hiperlab import files
from hiperlab.run.main import main

KILLS = int(os.environ.get("HIPERLAB_KILLS", "3"))
STEPS = 12
JOB = [
    "method=neti", "model=tiny", "model.size=64", "data.resolution=64", "logger=csv", "trainer=cpu", "stages=[fit]",
    f"fit.steps={STEPS}", "fit.batch_size=4", "fit.micro_batch_size=2", "fit.checkpoint_every=2", "fit.sample_every=5",
    "fit.sample_prompts=1", "sampler.steps=2", "fit.gradient_clip=1.0",
]  # fmt: skip


def _job(arguments: list[str], log: str) -> None:
    """In a forked child: a real process, without paying for the imports again."""
    os.setsid()
    with open(log, "a", buffering=1) as file:
        sys.stdout = sys.stderr = file
        code = main(arguments)
    os._exit(code)


def start(folder: Path, *more: str) -> multiprocessing.Process:
    folder.mkdir(exist_ok=True)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_job, args=([*JOB, f"run_dir='{folder}'", *more], str(folder / "log.txt")))
    process.start()
    return process


def steps_logged(folder: Path) -> list[int]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}") and '"loss"' in line]


def wait_for_step(folder: Path, step: int, process: multiprocessing.Process) -> None:
    deadline = time.monotonic() + 240
    while len(steps_logged(folder)) < step and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.005)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main([*JOB, f"run_dir='{folder}'"]) == 0
    return {**load_file(folder / "artifacts" / "cats.safetensors"), **_adam(folder)}


def _adam(folder: Path) -> dict[str, torch.Tensor]:
    """Adam's moments too: equal weights with other moments would part at the next step."""
    checkpoint = torch.load(folder / "checkpoints" / f"step-{STEPS:06d}.ckpt", weights_only=True)
    states = checkpoint["optimizer_states"][0]["state"]
    return {f"adam/{index}/{key}": value for index, state in states.items() for key, value in state.items()}


@pytest.mark.parametrize("attempt", range(KILLS))
def test_killed_and_resumed_is_bit_identical(attempt, uninterrupted, tmp_path) -> None:
    """SIGKILL once or twice at a random moment of random steps; then `resume=auto` to the end."""
    chance = random.Random(attempt)
    folder = tmp_path / "run"
    for _ in range(chance.choice([1, 2])):
        process = start(folder, "resume=auto")
        wait_for_step(folder, chance.randrange(1, STEPS), process)
        time.sleep(chance.random() * 0.1)  # anywhere in a step, also while a checkpoint is being written
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    last = start(folder, "resume=auto")
    last.join(240)
    assert last.exitcode == 0, (folder / "log.txt").read_text()[-2000:]
    resumed = {**load_file(folder / "artifacts" / "cats.safetensors"), **_adam(folder)}
    assert resumed.keys() == uninterrupted.keys()
    for name, value in uninterrupted.items():
        assert torch.equal(value, resumed[name]), name
    assert steps_logged(folder) == list(range(STEPS)), "each step logged once"


def test_told_to_stop_it_saves_and_says_how_to_go_on(uninterrupted, tmp_path) -> None:
    folder = tmp_path / "run"
    process = start(folder)
    wait_for_step(folder, 3, process)
    os.kill(process.pid, signal.SIGTERM)
    process.join(240)
    log = (folder / "log.txt").read_text()
    assert process.exitcode == 143, log[-2000:]
    assert "resume with: python -m hiperlab.run" in log and "resume=auto" in log
    saved = int(log.split("saved step ")[1].split(";")[0])
    assert (folder / "checkpoints" / f"step-{saved:06d}.ckpt").is_file()
    assert json.loads((folder / "results.json").read_text())["status"] == "stopped"
    last = start(folder, "resume=auto")
    last.join(240)
    assert last.exitcode == 0
    resumed = load_file(folder / "artifacts" / "cats.safetensors")
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in resumed)


@pytest.mark.slow
def test_two_processes_are_like_one(tmp_path) -> None:
    """gloo, the same global batch: the same weights up to float32 through Adam; pictures are shared out."""
    job = [
        "method=ti", "model=tiny", "data.max_views=2", "logger=csv", "fit.steps=3", "fit.batch_size=4",
        "fit.sample_every=0", "fit.checkpoint_every=0", "sampler.steps=2", "sample.prompts=1", "sample.seeds=[0,1,2]",
    ]  # fmt: skip
    assert main([*job, "trainer=cpu", f"run_dir='{tmp_path / 'one'}'"]) == 0
    command = [sys.executable, "-m", "hiperlab.run", *job, "trainer=ddp_cpu", f"run_dir='{tmp_path / 'two'}'"]
    environment = {key: value for key, value in os.environ.items() if "RANK" not in key} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / each / "results.json").read_text()) for each in ("one", "two"))
    assert two["stages"]["fit"]["world_size"] == 2 and two["stages"]["fit"]["micro_batch_size"] == 2
    assert one["stages"]["fit"]["loss"] == pytest.approx(two["stages"]["fit"]["loss"], rel=1e-5)
    vectors = [load_file(tmp_path / each / "artifacts" / "cats.safetensors")["vectors"] for each in ("one", "two")]
    torch.testing.assert_close(*vectors, atol=2e-4, rtol=0)
    assert two["status"] == "finished" and two["stages"]["sample"]["pictures"] == 3
    assert len(list((tmp_path / "two" / "samples" / "cats").glob("*.png"))) == 3


def test_stopped_while_drawing_keeps_what_is_drawn(tmp_path) -> None:
    folder = tmp_path / "run"
    job = ["stages=[fit,sample]", "fit.steps=2", "sampler.steps=10", "sample.batch_size=1", "sample.prompts=13"]
    process = start(folder, *job)
    drawn = folder / "samples" / "cats"
    deadline = time.monotonic() + 120
    while len(list(drawn.glob("*.png"))) < 3 and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    process.join(120)
    log = (folder / "log.txt").read_text()
    assert process.exitcode == 143 and "resume with: python -m hiperlab.run" in log, log[-2000:]
    times = {path.name: path.stat().st_mtime_ns for path in drawn.glob("*.png")}
    assert 3 <= len(times) < 26
    last = start(folder, *job, "resume=auto")
    last.join(240)
    assert last.exitcode == 0
    assert len(list(drawn.glob("*.png"))) == 26
    kept = [name for name, when in times.items() if (drawn / name).stat().st_mtime_ns == when]
    assert sorted(kept) == sorted(times), "drawn before, kept"


SHORT = [
    *JOB[:6],
    "method=ti",
    "stages=[fit]",
    "fit.batch_size=1",
    "fit.sample_every=0",
    "data=folder",
    "data.word=cat",
    "data.name=x",
]


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (64, 64), colour).save(folder / f"{number}.png")
    return folder


def train(folder: Path, photos: Path, steps: int, *more: str) -> int:
    words = [word for word in SHORT if not word.startswith(("method=neti", "data.resolution"))]
    return main([*words, f"data.dir='{photos}'", f"fit.steps={steps}", f"run_dir='{folder}'", *more])


def test_a_checkpoint_from_elsewhere_is_compared_with_its_own_record(tmp_path, photos, capsys) -> None:
    assert train(tmp_path / "a", photos, 1) == 0
    checkpoint = tmp_path / "a" / "checkpoints" / "step-000001.ckpt"
    for change in ("method.optimizer.lr=0.5", "seed=3", "fit.batch_size=2", "data.word=dog"):
        assert train(tmp_path / "b", photos, 2, f"resume='{checkpoint}'", change) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert "under other settings" in said and change.split("=")[0] in said
    assert train(tmp_path / "b", photos, 2, f"resume='{checkpoint}'") == 0
    assert (tmp_path / "b" / "checkpoints" / "step-000002.ckpt").is_file()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("another method", "is not of this TextualInversion: alpha, down.unet/"),
        ("another program", "lacks optimizer_states, loops, pytorch-lightning_version: another program wrote it"),
    ],
)
def test_a_checkpoint_without_a_record_that_cannot_be_gone_on_from(tmp_path, photos, capsys, change, said) -> None:
    """One line, no traceback."""
    checkpoint = tmp_path / "elsewhere" / "step-000001.ckpt"
    if change == "another method":
        assert train(tmp_path / "a", photos, 1, "method=lora") == 0
        shutil.copytree(tmp_path / "a" / "checkpoints", checkpoint.parent)
        (checkpoint.parent / "config.yaml").unlink()
    else:
        checkpoint.parent.mkdir()
        torch.save({"state_dict": {}, "global_step": 1}, checkpoint)
        files.write_sidecar(checkpoint)
    capsys.readouterr()
    assert train(tmp_path / "b", photos, 2, "method=ti", f"resume='{checkpoint}'") == 2
    err = capsys.readouterr().err
    assert said in err.strip().splitlines()[-1] and "Traceback" not in err


def test_other_pictures_are_refused_by_name_or_accepted(tmp_path, photos, capsys) -> None:
    folder = tmp_path / "run"
    assert train(folder, photos, 1) == 0
    photos.rename(moved := tmp_path / "moved")
    (moved / "0.png").rename(moved / "00.png")
    assert train(folder, moved, 2, "resume=auto") == 0, "the same pictures under other names in another place"
    Image.new("RGB", (64, 64), "white").save(moved / "1.png")
    (moved / "2.png").unlink()
    assert train(folder, moved, 3, "resume=auto") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "1.png is missing or changed" in said and "2.png is missing" in said and "resume_data=accept" in said
    assert train(folder, moved, 3, "resume=auto", "resume_data=accept") == 0
    assert json.loads((folder / "results.json").read_text())["resumed_with_other_pictures"]


def test_settings_that_an_earlier_version_did_not_know(tmp_path, photos) -> None:
    folder = tmp_path / "run"
    assert train(folder, photos, 1) == 0
    record = folder / "checkpoints" / "config.yaml"
    kept = [line for line in record.read_text().splitlines() if "num_vectors" not in line]
    record.write_text("\n".join(kept))
    assert train(folder, photos, 2, "resume=auto") == 0
