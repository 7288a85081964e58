"""The embedded cats: always the same pixels, told apart by identity, honest about what they are."""

import hashlib
from itertools import combinations

import numpy as np
import pytest

from hiperlab.data.cat_parts import CATS
from hiperlab.data.cat_scenes import NAMES, SCENES, draw
from hiperlab.data.cats import load
from hiperlab.data.dataset import DataSet
from hiperlab.errors import UserError

SETTINGS = {
    "placeholder": None,
    "word": "cat",
    "property": "object",
    "prompts": None,
    "class_noun": "none",
    "max_views": None,
    "resolution": 64,
    "center_crop": False,
    "flip": 0.5,
}


def cats(concepts: object = "cats", **changed: object) -> DataSet:
    return load(concepts=concepts, **{**SETTINGS, **changed})  # type: ignore[arg-type]


def test_one_cat_five_views() -> None:
    (cat,) = cats().concepts
    assert (cat.name, cat.placeholder, cat.word, cat.note) == (
        "cats",
        "<cats>",
        "cat",
        "drawn placeholder, not a photograph",
    )
    assert len(cat.views) == len(cat.sources) == len(SCENES) == len(NAMES) == 5
    assert all(v.size == (64, 64) and v.mode == "RGB" for v in cat.views)
    assert len({hashlib.sha256(v.tobytes()).digest() for v in cat.views}) == 5


def test_several_cats() -> None:
    data = cats(list(CATS), max_views=2)
    assert [c.name for c in data.concepts] == list(CATS) and len(CATS) >= 4
    assert {len(c.views) for c in data.concepts} == {2}
    assert [c.placeholder for c in cats(["tabby", "ginger"], placeholder=["<a>", "<b>"]).concepts] == ["<a>", "<b>"]


@pytest.mark.parametrize("side", [16, 61, 300])
def test_any_resolution_and_always_the_same(side: int) -> None:
    first, again = draw(CATS["cats"], 0, side), draw(CATS["cats"], 0, side)
    assert first.size == (side, side) and first.tobytes() == again.tobytes()


def test_identities_differ_but_places_do_not() -> None:
    """Two cats in the same view: the corners (the place) agree, the middle (the cat) does not."""
    for one, other in combinations(CATS.values(), 2):
        a, b = (np.asarray(draw(cat, 0, 64), dtype=float) for cat in (one, other))
        assert np.abs(a[:8, :8] - b[:8, :8]).max() == 0
        assert np.abs(a[20:60, 20:50] - b[20:60, 20:50]).mean() > 15


@pytest.mark.parametrize(
    ("concepts", "changed", "said"),
    [
        ("taby", {}, "Did you mean tabby"),
        ("cats", {"resolution": 4}, "resolution=4"),
        ("cats", {"max_views": 0}, "max_views=0"),
        (["cats", "cats"], {}, "the name 'cats'"),
        ([], {}, "no concept to learn"),
    ],
)
def test_mistakes(concepts: object, changed: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        cats(concepts, **changed)
