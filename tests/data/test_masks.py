"""Masks as different tools write them, and side files beside photographs."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from PIL import Image

from hiperlab.data.images import picture_files, read_folder
from hiperlab.data.masks import read_mask
from hiperlab.errors import UserError

LEFT = np.zeros((20, 30), np.uint8)
LEFT[:, :10] = 1


@pytest.fixture
def expected() -> np.ndarray:
    return LEFT * 255


def test_black_and_white_labels_bits_and_transparency_are_one_mask(tmp_path, expected) -> None:
    written = {
        "plain": Image.fromarray(expected),
        "labels": Image.fromarray(LEFT),
        "bit": Image.fromarray(expected).convert("1"),
        "colour": Image.fromarray(expected).convert("RGB"),
        "alpha": Image.merge("RGBA", [Image.new("L", (30, 20), 7)] * 3 + [Image.fromarray(expected)]),
        "grey": Image.fromarray(np.where(LEFT == 1, 200, 90).astype(np.uint8)),
    }
    palette = Image.fromarray(LEFT).convert("P")
    palette.putdata(list(LEFT.flatten()))
    written["palette"] = palette
    for name, image in written.items():
        image.save(tmp_path / f"{name}.png")
        found = read_mask(tmp_path / f"{name}.png", (30, 20))
        assert found.mode == "L" and np.array_equal(np.asarray(found), expected), name


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("L", (20, 30), 255), "has 20 x 30 pixels, its picture 30 x 20"),
        (Image.new("L", (30, 20), 0), "black everywhere"),
        (Image.new("L", (30, 20), 255), "white everywhere"),
        (Image.new("L", (30, 20), 1), "white everywhere"),
        (None, "does not exist"),
    ],
)
def test_masks_that_mark_nothing_are_refused_by_name(tmp_path, image, message) -> None:
    path = tmp_path / "mask.png"
    if image:
        image.save(path)
    with pytest.raises(UserError, match=message) as caught:
        read_mask(path, (30, 20))
    assert "mask.png" in str(caught.value)


def test_what_other_trainers_keep_beside_photographs_is_named(tmp_path, caplog) -> None:
    for number in range(2):
        Image.new("RGB", (30, 20), "red").save(tmp_path / f"{number}.png")
        Image.fromarray(LEFT * 255).save(tmp_path / f"{number}-masklabel.png")
        (tmp_path / f"{number}.txt").write_text("a sks dog on a red carpet")
    (tmp_path / "notes.txt").write_text("no caption: no picture is called so")
    (tmp_path / "metadata.jsonl").write_text("{}")
    assert [path.name for path in picture_files(tmp_path)] == ["0.png", "1.png"]
    with caplog.at_level(logging.WARNING):
        views, _ = read_folder(tmp_path, "stop", None)
    assert len(views) == 2
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and "2 masks" in said[0]
