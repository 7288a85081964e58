"""Told to stop, a real process saves, says how to go on and exits 143 or 130."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hiperlab.errors import StoppedError
from hiperlab.report import checkpoint
from hiperlab.report.loggers import read_metrics
from hiperlab.report.signals import StopSignals
from tests.report.toy import Toy, build

ROOT = Path(__file__).parents[2]


_started: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    yield
    for process in _started:
        if process.poll() is None:
            process.kill()
    _started.clear()


def start(folder, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.report.toy", str(folder), *map(str, arguments)],
        cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    _started.append(process)
    return process


def wait_for_steps(process, folder, steps=8):
    """Wait until the process has logged that many steps."""
    for _ in range(1800):
        if len(read_metrics(folder / "metrics.jsonl")) >= steps:
            return
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise AssertionError(process.communicate()[1])


def wait_for_line(process, text):
    """Wait until the process has printed that to stdout."""
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(process.communicate()[1])


def weight(folder, steps, resume=None):
    """The weight after so many steps, trained in this process."""
    toy = Toy()
    trainer, checkpoints, _ = build(folder, steps, accumulate_grad_batches=2)
    trainer.fit(toy, ckpt_path=checkpoint.resume_path(resume, checkpoints.folder), weights_only=True)
    return toy.weight


def test_sigterm_saves_exits_143_and_resumes_exactly(tmp_path):
    process = start(tmp_path, "--steps", 100000, "--sleep", 0.02, "--accumulate", 2)
    wait_for_steps(process, tmp_path)
    process.terminate()
    _, error = process.communicate(timeout=180)
    assert process.returncode == 143, error
    assert "Traceback" not in error
    saved = checkpoint.newest_valid(tmp_path / "checkpoints")
    assert saved is not None
    assert f"saved step {checkpoint.step_of(saved)}; resume with: resume me" in error
    steps = checkpoint.step_of(saved) + 10
    assert torch.equal(weight(tmp_path, steps, "auto"), weight(tmp_path / "whole", steps))
    logged = [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert logged == list(range(steps))


def test_interrupt_saves_and_exits_130(tmp_path):
    process = start(tmp_path, "--steps", 100000, "--sleep", 0.02)
    wait_for_steps(process, tmp_path)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=180)
    assert process.returncode == 130, error
    assert "Traceback" not in error and "saved step" in error


def test_second_interrupt_ends_at_once(tmp_path):
    process = start(tmp_path, "--sleep", 1000)  # a step that never ends
    wait_for_line(process, "training starts")
    process.send_signal(signal.SIGINT)
    time.sleep(1.5)
    assert process.poll() is None  # noted, waiting for the step
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == -signal.SIGINT
    process.communicate()


@pytest.mark.slow
def test_signal_to_one_rank_stops_both(tmp_path):
    process = start(tmp_path, "--steps", 100000, "--devices", 2)
    wait_for_steps(process, tmp_path)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    child = int(children.stdout.split()[0])
    os.kill(child, signal.SIGTERM)
    _, error = process.communicate(timeout=180)
    assert process.returncode == 143, error
    assert checkpoint.newest_valid(tmp_path / "checkpoints") is not None
    assert "saved step" in error
    for _ in range(50):  # the child ends too
        if not Path(f"/proc/{child}").exists():
            break
        time.sleep(0.1)
    else:
        raise AssertionError("the other rank still runs")


@pytest.mark.slow
def test_nan_on_one_rank_stops_both_and_is_named(tmp_path):
    process = start(tmp_path, "--steps", 100, "--devices", 2, "--bad-rank", 1)
    _, error = process.communicate(timeout=180)
    assert process.returncode == 1, error
    assert "step 6 on rank 1: loss is nan" in error


def test_outside_of_training_a_signal_raises_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignals() as stop:
        with pytest.raises(StoppedError, match="SIGTERM") as stopped:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        assert stopped.value.code == 143 and stop.received == signal.SIGTERM
        with pytest.raises(StoppedError):
            stop.check()
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
