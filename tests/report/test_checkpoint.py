"""Checkpoints: whole or absent, the newest valid one found, training continued exactly."""

import logging
import os
import random

import pytest
import torch

from hiperlab import files
from hiperlab.errors import StoppedError, UserError
from hiperlab.report import checkpoint
from tests.report.toy import Toy, build


def fit(folder, steps, resume=None, **options):
    toy = Toy()
    trainer, checkpoints, _ = build(folder, steps, **options)
    trainer.fit(toy, ckpt_path=checkpoint.resume_path(resume, checkpoints.folder), weights_only=True)
    return toy, checkpoints


def test_cadence_end_and_the_newest_two(tmp_path):
    _, checkpoints = fit(tmp_path, 25)
    assert checkpoint.steps_in(checkpoints.folder) == [20, 25]
    assert checkpoints.last_good.name == "step-000025.ckpt"
    assert sorted(os.listdir(checkpoints.folder)) == [
        "step-000020.ckpt", "step-000020.ckpt.sha256", "step-000025.ckpt", "step-000025.ckpt.sha256",
    ]  # fmt: skip
    assert checkpoint.step_of(checkpoints.last_good) == 25


@pytest.mark.parametrize("accumulate", [1, 3])
def test_resumed_equals_uninterrupted(tmp_path, accumulate):
    whole, _ = fit(tmp_path / "whole", 30, accumulate_grad_batches=accumulate)
    fit(tmp_path / "parts", 10, every=5, accumulate_grad_batches=accumulate)
    parts, _ = fit(tmp_path / "parts", 20, "auto", every=1, accumulate_grad_batches=accumulate)
    parts, _ = fit(tmp_path / "parts", 30, "auto", accumulate_grad_batches=accumulate)
    assert torch.equal(whole.weight, parts.weight)
    lines = (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines())


def test_auto_falls_back_and_says_so_but_an_explicit_path_does_not(tmp_path, caplog):
    _, checkpoints = fit(tmp_path, 20)
    newest = checkpoint.path_of(checkpoints.folder, 20)
    content = bytearray(newest.read_bytes())
    bit = random.Random(0).randrange(len(content) * 8)
    content[bit // 8] ^= 1 << bit % 8
    newest.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.resume_path("auto", checkpoints.folder) == checkpoint.path_of(checkpoints.folder, 10)
    assert "step-000020.ckpt is passed over" in caplog.text
    with pytest.raises(UserError, match=r"do not match.*step-000010\.ckpt.*resume=auto"):
        checkpoint.resume_path(str(newest), checkpoints.folder)
    with pytest.raises(UserError, match="cannot be used"):
        checkpoint.AtomicCheckpointIO().load_checkpoint(newest)
    _, again = fit(tmp_path, 20, "auto")  # the broken one is set aside, then written anew
    assert checkpoint.steps_in(again.folder) == [10, 20]
    assert files.broken(newest) is None
    assert (again.folder / "step-000020.ckpt.replaced").is_file()


def test_nothing_to_resume(tmp_path):
    assert checkpoint.resume_path("auto", tmp_path / "none") is None
    assert checkpoint.resume_path(None, tmp_path) is None
    with pytest.raises(UserError, match="missing"):
        checkpoint.resume_path(str(tmp_path / "step-000001.ckpt"), tmp_path)


def test_a_pickled_object_is_refused(tmp_path):
    path = tmp_path / "step-000001.ckpt"
    writer = checkpoint.AtomicCheckpointIO()
    writer.save_checkpoint({"thing": Toy}, path)
    with pytest.raises(UserError, match="more than tensors"):
        writer.load_checkpoint(path, weights_only=False)


def full_disk(monkeypatch, from_step):
    """From that step on every checkpoint write fails half way, as on a full disk."""
    save = torch.save

    def half(value, file):
        if value["global_step"] >= from_step:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        save(value, file)

    monkeypatch.setattr(torch, "save", half)


def test_full_disk_keeps_the_good_one_and_trains_on(tmp_path, monkeypatch, caplog):
    full_disk(monkeypatch, 20)
    with pytest.raises(
        StoppedError, match=r"step-000025.*the disk is full: .*step-000025.ckpt needs.*last good.*step-000010"
    ) as stopped:
        fit(tmp_path, 25)
    assert stopped.value.code == 1
    assert "Training goes on" in caplog.text
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-000010.ckpt", "step-000010.ckpt.sha256"]


def test_keep_all_and_wrong_settings(tmp_path):
    keeper = checkpoint.StepCheckpoints(tmp_path, 5, keep_all=True)
    assert keeper.last_good is None
    with pytest.raises(UserError, match="every=-1"):
        checkpoint.StepCheckpoints(tmp_path, -1)
    with pytest.raises(UserError, match="not named like"):
        checkpoint.step_of(tmp_path / "last.ckpt")
