"""Captions beside photographs become training prompts, each for its own picture."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from PIL import Image

from hiperlab.data.captions import captions_beside
from hiperlab.data.folder import load
from hiperlab.data.module import MicroBatches
from hiperlab.errors import UserError

SETTINGS = {
    "concepts": None, "name": "rex", "on_bad_image": "stop", "placeholder": None, "word": "dog", "property": "object",
    "prompts": None, "class_noun": "none", "max_views": None, "held_out": 0, "references": None,
    "center_crop": False, "masks": "off", "flip": 0.0,
}  # fmt: skip


@pytest.fixture
def photos(tmp_path) -> Path:
    for number in range(3):
        Image.new("RGB", (40, 40), (number, 0, 0)).save(tmp_path / f"{number}.png")
    return tmp_path


def test_kohyas_layout(photos, caplog) -> None:
    """The first class noun makes room for the placeholder; a caption without it gets it in front."""
    (photos / "0.txt").write_text("a small dog beside another dog\n")
    (photos / "1.txt").write_text("on a  red carpet, {so to say}")
    with caplog.at_level(logging.INFO):
        data = load(str(photos), **SETTINGS, captions="auto")
    (concept,) = data.concepts
    assert concept.captions == ("a small {} beside another dog", "{}, on a red carpet, (so to say)", "")
    assert "captions of 2 of 3 pictures are training prompts" in caplog.text
    stream = MicroBatches(data, 0, 16, 3, 0, 1)
    for m in range(2):
        batch = stream[m]
        said = dict(zip(batch.view.tolist(), batch.prompts, strict=True))
        assert said[0] == "a small <rex> beside another dog" and said[1].startswith("<rex>, on a red carpet")
        assert said[2] in [text.replace("{}", "<rex>") for text in concept.templates]
    (off,) = load(str(photos), **SETTINGS, captions="off").concepts
    assert off.captions == ()


def test_hugging_faces_tables(photos) -> None:
    rows = [{"file_name": f"{n}.png", "text": f"dog number {n}"} for n in range(2)]
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    paths = [photos / f"{n}.png" for n in range(3)]
    assert captions_beside(paths, "dog") == ("{} number 0", "{} number 1", "")
    (photos / "metadata.jsonl").unlink()
    (photos / "metadata.csv").write_text('file_name,text\n2.png,"a dog, alone"\n')
    assert captions_beside(paths, "dog") == ("", "", "a {}, alone")
    (photos / "metadata.csv").write_text("name,words\n2.png,a\n")
    with pytest.raises(UserError, match=r"metadata\.csv is no table of file_name and text"):
        captions_beside(paths, "dog")


def test_a_mistaken_choice(photos) -> None:
    with pytest.raises(UserError, match=r"data\.captions='on' is unknown"):
        load(str(photos), **SETTINGS, captions="on")
