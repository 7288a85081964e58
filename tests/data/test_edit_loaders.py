"""Where edits come from: one's own picture, TEdBench's layout, the world."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hiperlab.data import edit_loaders
from hiperlab.data.dataset import DataSet
from hiperlab.errors import UserError
from hiperlab.world.subjects import EDITS


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "My dog.png"
    Image.new("RGB", (90, 60), (200, 120, 40)).save(path)
    return path


@pytest.fixture
def tedbench(tmp_path: Path) -> Path:
    (tmp_path / "originals").mkdir()
    for name in ("dog2.png", "tree.jpeg"):
        Image.new("RGB", (40, 30), (10, 20, 30)).save(tmp_path / "originals" / name)
    rows = [("dog2.png", "A photo of a sitting dog."), ("tree.jpeg", "A burning tree."), ("dog2.png", "A cat.")]
    listed = [{"img_name": name, "target_text": text} for name, text in rows]
    (tmp_path / "input_list.json").write_text(json.dumps(listed))
    return tmp_path


def own(image: Any, **changed: Any) -> DataSet:
    settings: dict[str, Any] = {
        "source": "a standing dog", "targets": ["a sitting dog", "a dog in the snow"], "word": None, "name": None,
        "placeholder": None, "mask": None, "flip": 0.5,
    }  # fmt: skip
    return edit_loaders.load(str(image) if image else None, **{**settings, **changed})


def ted(folder: Path, item: Any, **changed: Any) -> DataSet:
    settings: dict[str, Any] = {
        "source": "a photo of a standing dog", "word": None, "targets": None, "placeholder": None, "flip": 0.5,
    }  # fmt: skip
    return edit_loaders.load_tedbench(str(folder), item, **{**settings, **changed})


def test_own_picture(picture: Path) -> None:
    data = own(picture)
    (concept,) = data.concepts
    assert (concept.name, concept.placeholder, concept.word) == ("My-dog", "<my-dog>", "dog")
    assert concept.views[0].size == (90, 60) and data.crop == "middle" and data.flip == 0.5
    assert concept.templates == ("a standing {}",) and concept.prompts == ("a sitting {}", "a {} in the snow")
    assert concept.edit and concept.edit.source == "a standing dog" and concept.edit.mask is None
    assert concept.edit.targets == ("a sitting dog", "a dog in the snow")
    named = own(picture, source="a dog that stands", word="dog", name="rex", placeholder="<r>", targets="a sitting dog")
    assert (named.concepts[0].name, named.concepts[0].placeholder) == ("rex", "<r>")
    assert named.concepts[0].prompts == ("a sitting {}",)


def test_own_mask_is_black_and_white(picture: Path, tmp_path: Path) -> None:
    grey = Image.linear_gradient("L").resize((90, 60))
    grey.save(tmp_path / "mask.png")
    edit = own(picture, mask=str(tmp_path / "mask.png")).concepts[0].edit
    assert edit and edit.mask and set(np.unique(np.asarray(edit.mask))) == {0, 255}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image": None}, "data.image is missing"),
        ({"source": None}, "an edit needs data.source="),
        ({"targets": None}, "data.targets="),
        ({"image": "nowhere.png"}, r"nowhere\.png does not exist"),
        ({"source": "a standing dog", "word": "cat"}, "lacks the noun 'cat'"),
    ],
)
def test_mistakes_with_own_pictures(picture: Path, changed: dict[str, Any], message: str) -> None:
    settings = {"image": picture, **changed}
    with pytest.raises(UserError, match=message):
        own(settings.pop("image"), **settings)


def test_a_broken_picture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "torn.png"
    path.write_bytes(b"\x89PNG nothing")
    with pytest.raises(UserError, match=r"torn\.png"):
        own(path)


@pytest.mark.parametrize("item", ["dog2.png", "dog2", 0, "0"])
def test_tedbench_items(tedbench: Path, item: str | int) -> None:
    (concept,) = ted(tedbench, item).concepts
    assert concept.name == "dog2" and concept.edit
    assert concept.edit.targets == ("A photo of a sitting dog.", "A cat.")
    assert concept.prompts == ("A photo of a sitting {}.", "A cat.")


def test_tedbench_with_own_targets(tedbench: Path) -> None:
    concept = ted(tedbench, 1, source="a tree", targets=["a tree in spring"]).concepts[0]
    assert concept.edit and concept.edit.targets == ("a tree in spring",) and concept.views[0].size == (40, 30)


@pytest.mark.parametrize(
    ("item", "changed", "message"),
    [
        (None, {}, "data.item is missing: name one of 2 pictures"),
        (2, {}, "data.item=2 is out of range: 0 to 1"),
        ("dog3", {}, "did you mean"),
        ("dog2", {"source": None}, "TEdBench has no source texts.*A photo of a sitting dog"),
    ],
)
def test_mistakes_with_tedbench(tedbench: Path, item: Any, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"(?i){message}"):
        ted(tedbench, item, **changed)


def test_another_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"input_list\.json is not there"):
        ted(tmp_path, 0)
    (tmp_path / "input_list.json").write_text('[{"image": "a"}]')
    with pytest.raises(UserError, match="is not TEdBench's list"):
        ted(tmp_path, 0)


def test_the_world_knows_results_and_masks() -> None:
    data = edit_loaders.load_world(list(EDITS), 64, placeholder=None, flip=0.5)
    assert len(data.concepts) >= 7
    for concept in data.concepts:
        edit = concept.edit
        assert edit and len(edit.truths) == len(edit.targets) == len(concept.prompts)
        assert all(truth and truth.size == (64, 64) for truth in edit.truths)
        first, source = (np.asarray(image, float) for image in (edit.truths[0], concept.views[0]))
        assert np.abs(first - source).mean() > 1, concept.name  # a target is no copy of its source
        if edit.mask:
            outside = np.asarray(edit.mask) == 0
            assert outside.any() and np.abs(first - source)[outside].mean() <= edit_loaders.UNCHANGED
    kept = {concept.name for concept in data.concepts if concept.edit and concept.edit.mask}
    assert "standing_dog" in kept and "travelling_cat" not in kept  # another place leaves nothing to keep


def test_unknown_edits_of_the_world() -> None:
    with pytest.raises(UserError, match=r"(?i)no edit of the world.*standing_dog"):
        edit_loaders.load_world("standing_dogs", 64, placeholder=None, flip=0.5)
    with pytest.raises(UserError, match="two concepts have the name 'standing_dog'"):
        edit_loaders.load_world(["standing_dog", "standing_dog"], 64, placeholder=None, flip=0.5)
