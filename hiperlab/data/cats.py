"""The embedded example: drawn cats, so that every command works without a single file."""

from __future__ import annotations

from collections.abc import Sequence

from hiperlab.data.cat_parts import CATS
from hiperlab.data.cat_scenes import NAMES, draw
from hiperlab.data.dataset import DataSet, Texts, default_placeholder, names_of, per_concept
from hiperlab.data.images import MIN_SIDE
from hiperlab.errors import UserError, near

PROMPTS = "neti"  # evaluation prompts where the user names none
NOTE = "drawn placeholder, not a photograph"


def load(
    concepts: str | Sequence[str],
    placeholder: str | Sequence[str] | None,
    word: str | Sequence[str],
    property: str,
    prompts: str | Sequence[str] | None,
    class_noun: str,
    max_views: int | None,
    resolution: int,
    center_crop: bool,
    flip: float,
) -> DataSet:
    """Draw five views each of one or several cats; the same pixels every time.

    Args:
        concepts: one or several of cats, tabby, tuxedo, ginger, siamese, calico.
        placeholder: the new word (None: "<cats>"), a list with several cats.
        word: class noun, for all or a list.
        property: "object" or "style".
        prompts: evaluation prompts, see `load_prompts` (None: neti).
        class_noun: see `Texts`.
        max_views: at most so many of the five views, or None.
        resolution: side of the pictures in pixels.
        center_crop: see `DataSet`.
        flip: see `DataSet`.

    Raises:
        UserError: unknown cat, resolution or number of views.
    """
    names = names_of(concepts)
    for name in names:
        if name not in CATS:
            raise UserError(f"there is no embedded cat {name!r}.{near(name, CATS)}")
    if resolution < MIN_SIDE:
        raise UserError(f"data.resolution={resolution} is too small: use {MIN_SIDE} pixels or more.")
    if max_views is not None and max_views < 1:
        raise UserError(f"data.max_views={max_views} leaves no picture: use 1 or more, or null for all.")
    words, placeholders = per_concept(word, names, "word"), per_concept(placeholder, names, "placeholder")
    texts = Texts(property, prompts, class_noun)
    made = []
    for name, given_word, given_placeholder in zip(names, words, placeholders, strict=True):
        sources = [f"{name}, {view}" for view in NAMES[:max_views]]
        views = [draw(CATS[name], view, resolution) for view in range(len(sources))]
        new_word = given_placeholder or default_placeholder(name)
        made.append(texts.concept(name, new_word, given_word or "", (views, sources), PROMPTS, NOTE))
    return DataSet(tuple(made), center_crop, flip)
