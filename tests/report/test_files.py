"""Whole or absent, checked, and one run per folder."""

import fcntl
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from hiperlab import files
from hiperlab.errors import DiskFullError, UserError

HOLD = """
import sys, time
from hiperlab.files import RunLock
with RunLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""
HOLD_ERROR = "raise OSError(37, 'No locks available')"


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "a" / "x.bin"
    files.atomic_write(path, b"good")

    def half(file):
        file.write(b"ba")
        raise OSError(28, "No space left on device")

    with pytest.raises(DiskFullError, match=rf"the disk is full: {path} needs more than \d bytes, .* are free"):
        files.atomic_write(path, half)
    assert path.read_bytes() == b"good"
    assert os.listdir(path.parent) == ["x.bin"]


WRITERS = {
    "bytes": bytes(2**19),
    "text": "x" * 2**19,
    "torch": lambda file: torch.save({"a": torch.zeros(2**17)}, file),  # says "unexpected pos" by itself
    "numpy": lambda file: np.save(file, np.zeros(2**16)),  # says how much was written, not why
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_named(name, tmp_path):
    """On a real file system of 300 kB."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(tmp_path)], check=False).returncode:
        pytest.skip("only root may mount a small file system")
    try:
        with pytest.raises(DiskFullError, match=rf"{tmp_path / 'x'} needs more than \d{{3}} kB, 307 kB are free"):
            files.atomic_write(tmp_path / "x", WRITERS[name])
        assert os.listdir(tmp_path) == []
        files.atomic_write(tmp_path / "x", b"small")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_free_bytes_of_a_folder_to_come(tmp_path):
    assert files.free_bytes(tmp_path / "a" / "b") == pytest.approx(files.free_bytes(tmp_path), rel=0.01)


def test_json_refuses_what_json_cannot_say(tmp_path):
    files.write_json(tmp_path / "x.json", {"é": [1, None]})
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "x.json", float("nan"))
    assert json.loads((tmp_path / "x.json").read_text()) == {"é": [1, None]}


def test_every_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "x.ckpt"
    good = os.urandom(64)
    path.write_bytes(good)
    files.write_sidecar(path)
    assert files.broken(path) is None
    for bit in range(len(good) * 8):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        assert files.broken(path), f"bit {bit}"
    path.write_bytes(good[:-1])
    assert files.broken(path)
    path.write_bytes(good)
    files.sidecar(path).unlink()
    assert "missing" in (files.broken(path) or "")
    assert "missing" in (files.broken(tmp_path / "none.ckpt") or "")


def test_second_run_is_refused_and_a_killed_one_is_not_in_the_way(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout and holder.stdout.readline().strip() == "held"
    with pytest.raises(UserError, match=f"process {holder.pid} on .*run_dir") as refusal:
        files.RunLock(tmp_path).acquire()
    assert "\n" not in str(refusal.value)
    files.RunLock(tmp_path, rank_zero=False).acquire()  # another rank of the same run
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with files.RunLock(tmp_path), pytest.raises(UserError):
        files.RunLock(tmp_path).acquire()  # the same process, as in a notebook
    with files.RunLock(tmp_path):
        pass


def test_without_locks_the_process_number_decides(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    without = f"import fcntl\ndef flock(*_):\n    {HOLD_ERROR}\nfcntl.flock = flock\n{HOLD}"
    holder = subprocess.Popen([sys.executable, "-c", without, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout and holder.stdout.readline().strip() == "held"
    with pytest.raises(UserError, match=f"process {holder.pid} on"):
        files.RunLock(tmp_path).acquire()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / files.MARKER_NAME).is_file(), "a killed run cannot clean up"
    files.RunLock(tmp_path).acquire().release()
    with files.RunLock(tmp_path), pytest.raises(UserError):
        files.RunLock(tmp_path).acquire()  # the same process, as in a notebook
    (tmp_path / files.MARKER_NAME).write_text(f"{holder.pid}\nelsewhere\n")
    files.write_json(tmp_path / files.OWNER_NAME, {"pid": holder.pid, "host": "elsewhere"})
    with pytest.raises(UserError, match="elsewhere"):
        files.RunLock(tmp_path).acquire()


@pytest.mark.parametrize(
    ("environment", "first"),
    [({}, True), ({"LOCAL_RANK": "1"}, False), ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, False), ({"RANK": "0"}, True),
     ({"SLURM_PROCID": "3"}, False)],
)  # fmt: skip
def test_rank_zero_from_the_environment(monkeypatch, environment, first):
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert files.is_rank_zero() is first
