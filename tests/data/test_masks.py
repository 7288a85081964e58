"""Masks as different tools write them, and side files beside photographs."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from hiperlab.data.folder import load
from hiperlab.data.images import picture_files, read_image
from hiperlab.data.masks import masks_beside, read_mask
from hiperlab.data.module import MicroBatches
from hiperlab.errors import UserError
from hiperlab.loss.diffusion import denoising_loss, weighted

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


SETTINGS: Any = {
    "concepts": None, "name": "rex", "on_bad_image": "stop", "placeholder": None, "word": "dog", "property": "object",
    "prompts": None, "class_noun": "none", "captions": "auto", "max_views": None, "held_out": 0, "references": None,
    "center_crop": False, "flip": 1.0,
}  # fmt: skip


@pytest.fixture
def masked(tmp_path) -> Path:
    """Three photographs of 30 x 20, masks in OneTrainer's layout beside two, and a caption."""
    for number in range(3):
        Image.new("RGB", (30, 20), "red").save(tmp_path / f"{number}.png")
    for number in range(2):
        Image.fromarray(LEFT * 255).save(tmp_path / f"{number}-masklabel.png")
    (tmp_path / "0.txt").write_text("a sks dog on a red carpet")
    (tmp_path / "notes.txt").write_text("no caption: no picture is called so")
    return tmp_path


def test_masks_beside_photographs_belong_to_them_and_are_named(masked, caplog) -> None:
    assert [path.name for path in picture_files(masked)] == ["0.png", "1.png", "2.png"]
    with caplog.at_level(logging.INFO):
        (concept,) = load(str(masked), **SETTINGS, masks="auto").concepts
    assert [mask and mask.name for mask in concept.masks] == ["0-masklabel.png", "1-masklabel.png", None]
    assert "the masks of 2 of 3 pictures weigh the loss" in caplog.text
    assert load(str(masked), **SETTINGS, masks="off").concepts[0].masks == ()
    with pytest.raises(UserError, match=r"data\.masks='on' is unknown"):
        load(str(masked), **SETTINGS, masks="on")


def test_a_mask_of_another_shape_is_refused_before_training(masked) -> None:
    Image.fromarray(LEFT * 255).resize((15, 10)).save(masked / "1-masklabel.png")
    with pytest.raises(UserError, match=r"1-masklabel\.png has 15 x 10 pixels, its picture 30 x 20"):
        load(str(masked), **SETTINGS, masks="auto")


def test_a_mask_belongs_to_the_upright_picture(tmp_path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # turned by a quarter
    Image.new("RGB", (20, 30), "red").save(tmp_path / "0.jpg", exif=exif)
    Image.fromarray(LEFT * 255).save(tmp_path / "0-masklabel.png")
    (mask,) = masks_beside([tmp_path / "0.jpg"])
    assert mask and read_image(tmp_path / "0.jpg").size == read_mask(mask, None).size == (30, 20)


def test_batches_carry_masks_cut_and_mirrored_as_their_pictures(masked) -> None:
    data = load(str(masked), **SETTINGS, masks="auto")
    for crop, left_third in (("squeeze", slice(0, 8)), ("middle", slice(0, 6))):
        batch = MicroBatches(replace(data, crop=crop), 0, 24, 3, 0, 1)[0]
        assert batch.mask is not None and batch.mask.shape == (3, 1, 24, 24)
        white = torch.zeros(24, 24)
        white[:, left_third] = 1
        for mask, view in zip(batch.mask, batch.view.tolist(), strict=True):
            wanted = torch.ones(24, 24) if view == 2 else white.flip(-1)  # every picture is mirrored, data.flip=1
            assert (mask[0] - wanted).abs().mean() < 0.03, (crop, view)
    assert MicroBatches(replace(data, concepts=(replace(data.concepts[0], masks=()),)), 0, 24, 3, 0, 1)[0].mask is None


def test_the_loss_is_kohyas() -> None:
    """Squared errors times the mask scaled by area, then the mean over everything (apply_masked_loss)."""
    prediction, target = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    mask = torch.rand(2, 1, 64, 64)
    area = mask.unflatten(-1, (8, 8)).unflatten(-3, (8, 8)).mean((-1, -3))
    expected = ((prediction - target).square() * area).mean((1, 2, 3))
    torch.testing.assert_close(denoising_loss(*weighted(prediction, target, mask)), expected)
