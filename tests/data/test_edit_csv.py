"""StyleDiffusion's CSV of edits: texts, pictures, the authors' settings, what a broken row says."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hiperlab.data import edit_csv
from hiperlab.data.concept import EditSettings
from hiperlab.data.dataset import DataSet
from hiperlab.errors import UserError

COLUMNS = ["", "case_number", "prompt", "image_path", "url", "target", "blend_word", "eq_params", "tau_v", "tau_c",
           "tau_s", "tau_u", "edit_type"]  # fmt: skip
CAT: dict[str, Any] = {
    "": 0, "case_number": 0, "prompt": "a cat sitting next to a mirror", "image_path": "./pictures/my cat.png",
    "target": "a tiger sitting next to a mirror", "blend_word": "[('cat',),('tiger',)]",
    "eq_params": "[('tiger',),(2,)]", "tau_v": "[.5,]", "tau_c": "[.6,]", "tau_s": "[.8,]", "tau_u": "[.5,]",
    "edit_type": "Replacement",
}  # fmt: skip
DOG = {"": 1, "case_number": 7, "prompt": "dog", "image_path": "./pictures/dog.png", "target": "a sitting dog"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for name in ("my cat", "dog"):
        Image.new("RGB", (40, 30), (10, 20, 30)).save(tmp_path / "pictures" / f"{name}.png")
    return tmp_path


def write(folder: Path, *rows: dict[str, Any], columns: list[str] = COLUMNS) -> Path:
    with (folder / "edits.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, columns, extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
    return folder / "edits.csv"


def load(file: Path | None, **changed: Any) -> DataSet:
    settings: dict[str, Any] = {"dir": None, "item": None, "masks": None, "placeholder": None, "flip": 0.0}
    return edit_csv.load(file and str(file), **{**settings, **changed})


def test_rows_are_edits_with_their_settings(folder: Path) -> None:
    cat, dog = load(write(folder, CAT, DOG)).concepts
    assert (cat.name, cat.placeholder, cat.word) == ("0-my-cat", "<0-my-cat>", "cat")
    assert cat.edit and cat.edit.source == CAT["prompt"] and cat.edit.targets == (CAT["target"],)
    assert cat.edit.settings == EditSettings(
        "replace", ("cat", "tiger"), (("tiger", 2.0),), {"v": 0.5, "c": 0.6, "s": 0.8, "u": 0.5}
    )
    assert cat.views[0].size == (40, 30) and cat.edit.mask is None
    assert (dog.name, dog.word, dog.templates, dog.prompts) == ("7-dog", "dog", ("{}",), ("a sitting {}",))
    assert dog.edit and dog.edit.settings == EditSettings(), "empty cells say nothing"


def test_pictures_are_found_from_the_repository_or_by_name(folder: Path) -> None:
    (folder / "data").mkdir()
    path = write(folder / "data", CAT)
    for place in (folder, folder / "pictures"):
        assert load(path, dir=str(place)).concepts[0].sources == ("my cat.png",)
    with pytest.raises(UserError, match=r"row 0 of edits\.csv: neither .* is there"):
        load(path)


def test_items_masks_and_plain_numbers(folder: Path) -> None:
    path = write(
        folder, CAT, {**DOG, "tau_v": ".1", "tau_u": "0", "edit_type": "Refinement", "eq_params": "['dog', 8]"}
    )
    Image.linear_gradient("L").save(folder / "7 dog.png")
    (dog,) = load(path, item=7, masks=str(folder)).concepts
    assert dog.edit and dog.edit.settings == EditSettings("refine", None, (("dog", 8.0),), {"v": 0.1, "u": 0.0})
    assert dog.edit.mask and dog.edit.mask.getextrema() == (0, 255) and dog.edit.mask.getpixel((0, 128)) == 128
    assert [c.name for c in load(path, item=["7", 0]).concepts] == ["7-dog", "0-my-cat"]
    with pytest.raises(UserError, match=r"data\.item=8 is no case number"):
        load(path, item=8)
    with pytest.raises(UserError, match=r"0 a cat .*\.png does not exist"):
        load(path, item=0, masks=str(folder))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tau_v": "[.5, .6]"}, "row 0 of .*tau_v must be one number from 0 to 1"),
        ({"tau_c": "[1.5]"}, "tau_c must be one number"),
        ({"tau_s": "open('x')"}, "tau_s .* cannot be read"),
        ({"eq_params": "[('tiger',),(2,3)]"}, "eq_params must hold two groups"),
        ({"blend_word": "[('big','cat'),('big','tiger')]"}, "blend_word must name one word of each"),
        ({"edit_type": "Replace"}, "(?i)edit_type 'Replace' is no edit.*did you mean Replacement"),
        ({"target": " "}, "has an empty target"),
        ({"blend_word": "[('cow',),('tiger',)]"}, "lacks the noun 'cow'"),
    ],
)
def test_broken_cells(folder: Path, changed: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(write(folder, {**CAT, **changed}))


def test_other_files_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"lacks the columns target: .*prompts\.csv has no targets"):
        load(write(folder, CAT, columns=["case_number", "prompt", "image_path", "url"]))
    with pytest.raises(UserError, match="2 rows and 1 case numbers"):
        load(write(folder, CAT, CAT))
    with pytest.raises(UserError, match="0 rows"):
        load(write(folder))
    with pytest.raises(UserError, match=r"nowhere\.csv does not exist"):
        load(folder / "nowhere.csv")
    with pytest.raises(UserError, match=r"data\.file is missing"):
        load(None)
