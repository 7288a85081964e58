"""Null-text inversion: its files, its schedule, resuming, what is fitted and what is not."""

from __future__ import annotations

import pytest
import torch

from hiperlab.errors import UserError
from hiperlab.formats import null_text as files


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
