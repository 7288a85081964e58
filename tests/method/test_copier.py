"""The copier: the training picture, bit for bit, and no other."""

from __future__ import annotations

import pytest
import torch

from hiperlab.base.artifact import load_into, write
from hiperlab.errors import UserError
from tests.composed import SUBJECTS, UNetCalls, build, picture
from tests.run.test_run import results, run

HOW = {"steps": 2, "guidance": 7.5}


def test_it_pastes_each_concepts_own_picture_whatever_is_asked(stack, monkeypatch, tmp_path) -> None:
    method = build("copier", stack, SUBJECTS[:1])
    calls = UNetCalls(stack, monkeypatch)
    texts = ["a <my-cat> on the moon", "a photo of a train"]
    drawn = method.sample(texts, [0, 1], **HOW)
    torch.testing.assert_close(drawn, torch.stack([(picture(SUBJECTS[0], 0, stack.size) + 1) / 2] * 2))
    assert not calls.taken(), "the model is not asked"
    write(tmp_path / "a.safetensors", method, 0, {}, steps=0)
    other = build("copier", stack, SUBJECTS[:1])
    other.pictures.zero_()
    load_into(other, 0, tmp_path / "a.safetensors")
    assert torch.equal(other.sample(texts[1:], [5], **HOW)[0], drawn[1])


def test_it_must_have_a_picture(stack) -> None:
    method = build("copier", stack, SUBJECTS[:1])
    method.pictures.fill_(torch.nan)
    with pytest.raises(UserError, match="Copier has no picture"):
        method.sample(["a"], [0], **HOW)


def test_its_run_copies_and_says_so(tmp_path) -> None:
    """Nearly: a PNG keeps levels."""
    members = "+metric.members.copied={_target_: hiperlab.metric.held_out.CopiedScore, encoder: clip}"
    assert run(tmp_path / "run", "method=copier", "fit.steps=0", "data.max_views=3", members) == 0
    (mean,) = (
        row["mean"] for row in results(tmp_path / "run")["scores"] if row["metric"] == "copied" and row["concept"]
    )
    assert mean == 1
