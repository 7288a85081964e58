"""Edits and concepts become one another without losing a letter."""

import pytest
from PIL import Image

from hiperlab.data.concept import Concept, Edit, fill
from hiperlab.data.dataset import DataSet
from hiperlab.data.edit import as_edits, edit_concept, one_per_target, slotted
from hiperlab.data.images import to_pixels
from hiperlab.errors import UserError

PICTURE = Image.new("RGB", (80, 60), (10, 200, 30))


def dog(**changed: object) -> Concept:
    edit = Edit("a standing dog", ("a sitting dog", "a cat", "dogs and a dog"), **changed)  # type: ignore[arg-type]
    return edit_concept("rex", "<rex>", "dog", PICTURE, "rex.png", edit)


def test_texts_come_back_exactly() -> None:
    one = dog()
    assert one.templates == ("a standing {}",) and one.prompts == ("a sitting {}", "a cat", "dogs and a {}")
    assert [fill(prompt, one.placeholder).replace(one.placeholder, one.word) for prompt in one.prompts] == list(
        one.edit.targets  # type: ignore[union-attr]
    )
    assert slotted("A hotdog for my dog.", "dog") == "A hotdog for my {}."


def test_concepts_become_edits_of_their_first_view() -> None:
    concept = Concept("pig", "<pig>", "elephant", (PICTURE, PICTURE), ("a", "b"), ("a photo of {}",), ("{} on a boat",))
    made = as_edits(DataSet((concept, dog()), "squeeze", flip=0.5))
    assert made.flip == 0 and made.crop == "middle" and made.concepts[1] == dog()
    assert len(made.concepts[0].views) == 1 and made.concepts[0].templates == ("a photo of an {}",)
    assert made.concepts[0].edit == Edit("a photo of an elephant", ("elephant on a boat",))


def test_one_concept_per_target_keeps_truths_and_numbers() -> None:
    truths = tuple(Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (1, 2, 3))
    parts = one_per_target(DataSet((dog(truths=truths),), "squeeze", 0.0)).concepts
    assert [(p.name, p.placeholder, p.prompts) for p in parts] == [
        ("rex-0", "<rex-0>", ("a sitting {}",)),
        ("rex-1", "<rex-1>", ("a cat",)),
        ("rex-2", "<rex-2>", ("dogs and a {}",)),
    ]
    assert [p.edit.truths for p in parts if p.edit] == [(truth,) for truth in truths]


def test_mistakes() -> None:
    with pytest.raises(UserError, match="lacks the noun 'cat'"):
        edit_concept("rex", "<rex>", "cat", PICTURE, "rex.png", Edit("a standing dog", ("a cat",)))
    with pytest.raises(UserError, match="at least one target"):
        Edit("a dog", ())
    with pytest.raises(UserError, match="lacks"):  # an ordinary concept must name its subject
        Concept("pig", "<pig>", "pig", (PICTURE,), ("a",), ("a {}",), ("a boat",))


def test_the_short_side_is_resized_and_the_middle_kept() -> None:
    wide = Image.new("RGB", (300, 100), (0, 0, 0))
    wide.paste((255, 255, 255), (100, 0, 200, 100))
    assert float(to_pixels(wide, 64, "middle", False)[:, :, 2:-2].min()) > 0.99
    assert to_pixels(wide.rotate(90, expand=True), 64, "middle", False).shape == (3, 64, 64)
