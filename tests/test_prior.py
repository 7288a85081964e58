"""Prior preservation: class pictures are drawn once, kept by content and found again; rows with draws of their own."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from hiperlab.base.prior_preservation import Prior, preserved
from hiperlab.errors import UserError
from hiperlab.model.tiny import tiny
from tests.composed import SUBJECTS, batch

CAT = SUBJECTS[0]


def prior(folder=None, **changes) -> Prior:
    settings = {
        "weight": 1.0, "count": 3, "prompt": "a photo of {}", "folder": folder and str(folder), "real": None,
        "steps": 1, "guidance": 7.5, "batch_size": 2,
    }  # fmt: skip
    return Prior(**{**settings, **changes})


@pytest.fixture(scope="module")
def small():
    return tiny(seed=0, size=64)


def test_loss_by_hand() -> None:
    prediction = torch.tensor([1.0, 2.0, 3.0, 5.0]).reshape(4, 1, 1, 1)
    losses = preserved(prediction, torch.zeros_like(prediction), 0.5)
    assert losses[""].tolist() == [1, 4] and losses["prior"].tolist() == [4.5, 12.5]


def test_pictures_are_kept_and_found(small, tmp_path, caplog) -> None:
    with caplog.at_level(logging.INFO):
        first = prior(tmp_path).pictures(small, "cat")
    assert "3 of 3 class pictures 'a photo of cat' are drawn" in caplog.text
    assert [path.name for path in first] == ["00000.png", "00001.png", "00002.png"]
    stamps = [path.stat().st_mtime_ns for path in first]
    caplog.clear()
    with caplog.at_level(logging.INFO):
        more = prior(tmp_path, count=4).pictures(small, "cat")
    assert "1 of 4 class pictures" in caplog.text and more[:3] == first
    assert [path.stat().st_mtime_ns for path in first] == stamps
    in_memory = prior(count=4, batch_size=4).pictures(small, "cat")
    for path, picture in zip(more, in_memory, strict=True):
        with Image.open(path) as kept:
            apart = np.abs(np.asarray(kept, dtype=int) - np.asarray(picture, dtype=int))
        assert apart.max() <= 1, "a picture depends on its number; on its batch by rounding only"
    with Image.open(more[0]) as one, Image.open(more[1]) as other:
        assert one.tobytes() != other.tobytes()


def test_content_names_the_folder(small, tmp_path) -> None:
    """Another caption, sampler or U-Net is another folder; another weight is not."""
    places = [
        prior(tmp_path, count=1, **changes).pictures(model, word)[0].parent.name
        for model, word, changes in (
            (small, "cat", {}), (small, "cat", {"weight": 0.5}), (small, "dog", {}), (small, "cat", {"steps": 2}),
            (small, "cat", {"guidance": 5.0}), (small, "cat", {"prompt": "a {}"}), (tiny(seed=1, size=64), "cat", {}),
        )
    ]  # fmt: skip
    assert places[0] == places[1] and len(set(places)) == 6
    assert all(place.startswith(("cat-", "dog-")) for place in places)


def test_rows_behind_the_batch(small) -> None:
    """The same class rows for the same samples, however the batch is cut; their draws are nobody else's."""
    mine = prior()
    whole = mine.extend(batch([CAT], [4, 5, 6, 7], size=64), small, ["cat"], seed=0)
    halves = [mine.extend(batch([CAT], part, size=64), small, ["cat"], seed=0) for part in ([4, 5], [6, 7])]
    assert whole.prompts[4:] == ["a photo of cat"] * 4 and len(whole.prompts) == 8
    assert whole.sample.tolist() == [4, 5, 6, 7, -5, -6, -7, -8]
    assert torch.equal(whole.pixels[4:], torch.cat([half.pixels[2:] for half in halves]))
    assert whole.view[4:].tolist() == [view for half in halves for view in half.view[2:].tolist()]
    assert whole.sizes is None, "nobody says what the instance pictures were"
    told = batch([CAT], [4], size=64)._replace(sizes=torch.tensor([[100.0, 200, 0, 9, 64, 64]]))
    sizes = mine.extend(told, small, ["cat"], seed=0).sizes
    assert sizes is not None and sizes.tolist() == [[100, 200, 0, 9, 64, 64], [64, 64, 0, 0, 64, 64]]
    assert max(whole.view[4:].tolist()) < 0 and not whole.flip[4:].any()
    assert float(whole.pixels[4:].min()) >= -1 and float(whole.pixels[4:].max()) <= 1


def test_weight_zero_changes_nothing(small) -> None:
    none, item = prior(weight=0.0), batch([CAT], [0], size=64)
    assert none.extend(item, small, ["cat"], seed=0) is item
    losses = none.losses(torch.ones(2, 4, 2, 2), torch.zeros(2, 4, 2, 2))
    assert losses.keys() == {""} and losses[""].tolist() == [1, 1]


def test_real_pictures(small, tmp_path, caplog) -> None:
    for number in range(4):
        Image.new("RGB", (80, 40), (number, 0, 0)).save(tmp_path / f"{number}.png")
    mine = prior(real=str(tmp_path))
    assert [path.name for path in mine.pictures(small, "cat")] == ["0.png", "1.png", "2.png"]
    few = prior(real=str(tmp_path), count=9)
    assert len(few.pictures(small, "cat")) == 4 and "holds 4 pictures, method.prior.count asks for 9" in caplog.text
    with pytest.raises(UserError, match="is no folder"):
        prior(real=str(tmp_path / "none")).pictures(small, "cat")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"weight": -1.0}, "is negative"), ({"count": 0}, "no class picture"), ({"prompt": "a cat"}, "lacks '{}'")],
)
def test_mistakes_are_named(changes, message) -> None:
    with pytest.raises(UserError, match=message):
        prior(**changes)


def test_broken_picture_is_named(small, tmp_path) -> None:
    mine = prior(tmp_path, count=1)
    (path,) = mine.pictures(small, "cat")
    path.write_bytes(b"no picture")
    with pytest.raises(UserError, match="Delete it"):
        mine.extend(batch([CAT], [0], size=64), small, ["cat"], seed=0)
