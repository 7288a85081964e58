"""Null-text inversion: its files, its schedule, resuming, what is fitted and what is not."""

from __future__ import annotations

import pytest
import torch

from hiperlab.errors import UserError
from hiperlab.formats import null_text as files
from tests.composed import SUBJECTS, build


def test_files_go_there_and_back(tmp_path) -> None:
    rows = torch.randn(3, 4, 5)
    path = files.write(tmp_path / "embeddings.pt", rows)
    content = torch.load(path, weights_only=True)
    assert isinstance(content, list) and [tuple(each.shape) for each in content] == [(1, 4, 5)] * 3
    assert torch.equal(files.read(path), rows)
    for other in (rows, rows[:, None]):
        torch.save(other, tmp_path / "tensor.pt")
        assert torch.equal(files.read(tmp_path / "tensor.pt"), rows)


@pytest.mark.parametrize("what", ["numbers", "ragged", "nan", "flat", "dict"])
def test_other_files_are_refused(what, tmp_path) -> None:
    rows = torch.randn(3, 4, 5)
    content = {
        "numbers": [1, 2],
        "ragged": [rows[:1], rows[:2]],
        "nan": rows * torch.nan,
        "flat": rows[0],
        "dict": {"a": rows},
    }[what]
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(UserError, match={"ragged": "different shapes", "nan": "NaN"}.get(what, "no list")):
        files.read(tmp_path / "file.pt")


TEXTS = ["a photo of a cat", "a photo of a cat on a sofa"]


def test_who_reads_what(stack) -> None:
    """Null: all unconditional rows; text: the source row; negative prompt: the source text in the empty one's place."""
    plain, empty = stack.encode_text(TEXTS), stack.encode_text([""])
    for optimise in (None, "text", "negative_prompt"):
        method = build("null_text", stack, SUBJECTS[:1], optimise=optimise)
        with torch.no_grad():
            method.embeddings += 1
        method.path_step.fill_(1)
        conditional, unconditional = method.edit_conditions([method.source, TEXTS[1]], "")
        first, negative = conditional(1).keys[0], unconditional(1).keys[0]
        start = empty if optimise is None else plain[:1]
        if optimise == "text":
            torch.testing.assert_close(first[:1], plain[:1] + 1)
            torch.testing.assert_close(negative, empty.expand(2, -1, -1))
        else:
            torch.testing.assert_close(first[:1], plain[:1])
            torch.testing.assert_close(negative, (start + 1).expand(2, -1, -1))
        torch.testing.assert_close(first[1:], plain[1:])
        assert method.finished == (optimise == "negative_prompt")


def test_mistakes_are_named(stack, tmp_path) -> None:
    with pytest.raises(UserError, match="Choices: None, negative_prompt, text"):
        build("null_text", stack, SUBJECTS[:1], optimise="nul")
    method = build("null_text", stack, SUBJECTS[:1])
    with pytest.raises(UserError, match="fits the unconditional text itself"):
        method.edit_conditions(TEXTS, "blurry")
    path = files.write(tmp_path / "embeddings.pt", torch.zeros(3, 77, 32))
    with pytest.raises(UserError, match=r"set sampler\.steps=3"):
        method.load_foreign(0, path)


def test_a_checkpoint_with_earlier_names_is_read(stack) -> None:
    """In November 2026 the buffers were called `place` and `made`."""
    method = build("null_text", stack, SUBJECTS[:1])
    method.path_step.fill_(1)
    method.num_updates.fill_(3)
    checkpoint = {"state_dict": method.state_dict()}
    method.on_save_checkpoint(checkpoint)
    earlier = {"path_step": "place", "num_updates": "made"}
    checkpoint["state_dict"] = {earlier.get(name, name): value for name, value in checkpoint["state_dict"].items()}
    again = build("null_text", stack, SUBJECTS[:1])
    again.on_load_checkpoint(checkpoint)
    again.load_state_dict(checkpoint["state_dict"])
    assert int(again.path_step) == 1 and int(again.num_updates) == 3
