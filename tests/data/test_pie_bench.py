"""PIE-Bench's released layout: texts, masks, which edits are taken, what a broken folder says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hiperlab.data import pie_bench
from hiperlab.data.concept import EditSettings
from hiperlab.data.dataset import DataSet
from hiperlab.errors import UserError


def row(path: str, kind: int, **changed: Any) -> dict[str, Any]:
    return {
        "image_path": path,
        "original_prompt": "a slanted bicycle on the road",
        "editing_prompt": "a slanted [rusty] bicycle on the road",
        "editing_instruction": "Make the bicycle rusty",
        "editing_type_id": str(kind),
        "blended_word": "bicycle bicycle",
        "mask": [512 * 100 + 50, 20, 512 * 101 + 50, 20],
        **changed,
    }


@pytest.fixture
def rows() -> dict[str, dict[str, Any]]:
    return {
        "000000000000": row("0_random_140/000000000000.jpg", 0),
        "111000000001": row("1_change_object_80/1_artificial/1_animal/111000000001.jpg", 1,
                            original_prompt="a [cat], sitting", editing_prompt="a [dog], sitting", blended_word=""),
        "921000000002": row("9_change_style_80/2_natural/1_animal/921000000002.jpg", 9, blended_word="bike bicycle"),
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, rows: dict[str, dict[str, Any]]) -> Path:
    for each in rows.values():
        path = tmp_path / "annotation_images" / each["image_path"]
        path.parent.mkdir(parents=True)
        Image.new("RGB", (512, 512), (30, 90, 200)).save(path)
    return write(tmp_path, rows)


def write(folder: Path, rows: Any) -> Path:
    (folder / "mapping_file.json").write_text(json.dumps(rows))
    return folder


def load(folder: Path | str | None, item: Any = None, kinds: Any = None, placeholder: Any = None) -> DataSet:
    return pie_bench.load(folder and str(folder), item, kinds, placeholder=placeholder, flip=0.0)


def test_an_item_is_an_edit(folder: Path) -> None:
    (concept,) = load(folder, "000000000000").concepts
    assert (concept.name, concept.placeholder, concept.word) == ("000000000000", "<000000000000>", "bicycle")
    edit = concept.edit
    assert edit and edit.source == "a slanted bicycle on the road" and edit.mask
    assert edit.targets == ("a slanted rusty bicycle on the road",)
    assert edit.settings == EditSettings("refine", ("bicycle", "bicycle"), (("bicycle", 2.0),))
    assert concept.templates == ("a slanted {} on the road",) and concept.views[0].size == (512, 512)
    inside = np.asarray(edit.mask)[1:-1, 1:-1] > 0
    where = np.argwhere(inside) + 1
    assert edit.mask.size == (512, 512) and inside.sum() == 40
    assert where.min(0).tolist() == [100, 50] and where.max(0).tolist() == [101, 69]


def test_words_that_a_text_lacks_advise_nothing(folder: Path) -> None:
    first, second = load(folder, ["111000000001", 2]).concepts
    assert first.word == "sitting" and first.edit and first.edit.settings == EditSettings("refine")
    assert first.edit.source == "a cat, sitting" and first.edit.targets == ("a dog, sitting",)
    assert second.word == "road" and second.edit and second.edit.settings == EditSettings("refine"), (
        "no bike in the source"
    )


@pytest.mark.parametrize(
    ("kinds", "names"),
    [
        ("all", ["000000000000", "111000000001", "921000000002"]),
        ("style", ["921000000002"]),
        (["style", "random"], ["000000000000", "921000000002"]),
        (1, ["111000000001"]),
        (["1", 9], ["111000000001", "921000000002"]),
    ],
)
def test_kinds(folder: Path, kinds: Any, names: list[str]) -> None:
    data = load(folder, kinds=kinds)
    assert [concept.name for concept in data.concepts] == names and data.crop == "middle"


def test_items_by_number_and_by_name(folder: Path) -> None:
    assert [c.name for c in load(folder, [1, "000000000000"]).concepts] == ["111000000001", "000000000000"]
    assert load(folder, 111000000001).concepts[0].name == "111000000001"  # as the shell's digits arrive
    two = load(folder, [0, 1], placeholder=["<bike>", "<pet>"])
    assert [concept.placeholder for concept in two.concepts] == ["<bike>", "<pet>"]


@given(st.lists(st.tuples(st.integers(0, 63), st.integers(0, 80)), max_size=12))
def test_runs_are_pixels(runs: list[tuple[int, int]]) -> None:
    """A pixel is edited exactly if a run covers it or it lies on the border."""
    mask = pie_bench.decode_mask([number for run in runs for number in run], 8)
    for y in range(8):
        for x in range(8):
            covered = any(start <= 8 * y + x < start + length for start, length in runs)
            assert mask[y, x] == (covered or x in (0, 7) or y in (0, 7))


@given(st.integers(0, 2**36 - 1))
def test_every_mask_can_be_written_as_runs(bits: int) -> None:
    inner = np.array([bits >> n & 1 for n in range(36)], np.uint8).reshape(6, 6)
    whole = np.pad(inner, 1, constant_values=1)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], whole.ravel(), [0]])))
    runs = [int(n) for start, end in zip(edges[::2], edges[1::2], strict=True) for n in (start, end - start)]
    assert (pie_bench.decode_mask(runs, 8) == whole).all()


@pytest.mark.parametrize("runs", [[1], [-1, 2], [64, 1], [0.5, 1], ["0", "1"]])
def test_what_is_no_mask(runs: Any) -> None:
    with pytest.raises(UserError, match="pairs of start and length"):
        pie_bench.decode_mask(runs, 8)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "has 3 edits: name some.*000000000000.*data.kinds=all"),
        ({"item": 0, "kinds": "all"}, "not both"),
        ({"item": "00000000000"}, "did you mean 000000000000"),
        ({"item": 3}, "data.item=3 is not in"),
        ({"kinds": "styles"}, "did you mean style"),
        ({"kinds": ["pose"]}, "holds no edit of data.kinds="),
    ],
)
def test_mistakes_in_what_is_asked(folder: Path, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"(?i){message}"):
        load(folder, **asked)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mask": [1, 2, 3]}, "item 000000000000 of .*pairs of start and length"),
        ({"mask": None}, "item 000000000000 of"),
        ({"editing_prompt": "[]"}, "item 000000000000 of .*at least one target"),
        ({"image_path": "0_random_140/lost.jpg"}, r"lost\.jpg, the picture of item .* is not there"),
    ],
)
def test_broken_rows(folder: Path, rows: dict[str, Any], changed: dict[str, Any], message: str) -> None:
    write(folder, {"000000000000": {**rows["000000000000"], **changed}})
    with pytest.raises(UserError, match=message):
        load(folder, 0)


def test_another_layout_is_refused(folder: Path, rows: dict[str, Any], tmp_path: Path) -> None:
    del rows["000000000000"]["original_prompt"]
    with pytest.raises(UserError, match="lacks original_prompt"):
        load(write(folder, rows), 0)
    Image.new("RGB", (512, 300)).save(folder / "annotation_images" / rows["111000000001"]["image_path"])
    with pytest.raises(UserError, match="512 x 300 pixels, its mask 512 x 512"):
        load(folder, 1)
    with pytest.raises(UserError, match="not PIE-Bench's list"):
        load(write(folder, [1, 2]), 0)
    (folder / "mapping_file.json").write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        load(folder, 0)
    (folder / "mapping_file.json").unlink()
    with pytest.raises(UserError, match=r"mapping_file\.json is not there"):
        load(folder, 0)
    with pytest.raises(UserError, match=r"data\.dir is missing"):
        load(None, 0)
