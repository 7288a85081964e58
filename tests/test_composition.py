"""Several kept concepts in one picture: each part is what its method does alone, whatever is beside it."""

from __future__ import annotations

import pytest
import torch
from hydra.utils import get_class

from hiperlab.base.capability import Composable
from hiperlab.base.composition import Composition
from hiperlab.base.method import Subject
from hiperlab.errors import UserError
from hiperlab.model.offsets import Added, LowRank, Offsets
from hiperlab.model.tiny import tiny
from hiperlab.model.weight_changes import Materialised, Multiplied, Sum, sum_changes
from tests.composed import METHODS, SUBJECTS, build, config, kept

CAT, DOG = SUBJECTS[:2]
BOTH = "a <my-cat> next to a <my-dog>"
JOINABLE = [name for name in METHODS if issubclass(get_class(config(name).method._target_), Composable)]
PAIRS = [("ti", "lora"), ("ti", "dreambooth"), ("neti", "custom_diffusion"), ("hiper", "lora"), ("ti", "e4t")]


@pytest.fixture(scope="module")
def stack():
    """The twin at 64 px: nothing here depends on the size."""
    return tiny(seed=0, size=64)


def draw(painter, text: str) -> torch.Tensor:
    return painter.sample([text], [1], steps=2, guidance=7.5)


def close(one: torch.Tensor, two: torch.Tensor) -> None:
    torch.testing.assert_close(one, two, atol=2e-4, rtol=0)


def differ(one: torch.Tensor, two: torch.Tensor) -> None:
    assert (one - two).abs().max() > 2e-3


def test_these_can_be_joined() -> None:
    # Each alone among no others: tests/method/test_conformance.py.
    assert {"ti", "xti", "neti", "hiper", "lora", "dreambooth", "custom_diffusion", "e4t"} <= set(JOINABLE)


@pytest.mark.parametrize(("words", "weights"), PAIRS)
def test_weights_and_words_each_as_alone(stack, words, weights) -> None:
    """With untouched weights only the words count; in a text without the words' placeholder only the weights."""
    word = kept(words, stack, CAT)
    weight = kept(weights, stack, DOG)
    if weights in ("lora", "dreambooth"):
        idle = build(weights, stack, [DOG])  # B = 0, or no difference: the bare weights
        close(draw(Composition([word, idle]), "a <my-cat>"), draw(word, "a <my-cat>"))
    together = Composition([word, weight])
    if words != "hiper":
        close(draw(together, "a <my-dog>"), draw(weight, "a <my-dog>"))
    differ(draw(together, BOTH), draw(weight, "a cat next to a <my-dog>"))
    differ(draw(together, BOTH), draw(word, "a <my-cat> next to a dog"))


def test_two_words_in_one_text_are_one_run_of_two_concepts(stack) -> None:
    """Textual Inversion stacks concepts: two composed concepts are the method with both."""
    one, two = kept("ti", stack, CAT, 1), kept("ti", stack, DOG, 2)
    stacked = build("ti", stack, [CAT, DOG])
    stacked.load_artifact(0, one.artifact(0))
    stacked.load_artifact(1, two.artifact(0))
    close(draw(Composition([one, two]), BOTH), draw(stacked, BOTH))
    close(draw(Composition([two, one]), BOTH), draw(stacked, BOTH))


def test_words_of_different_lengths_layers_and_times(stack) -> None:
    """Several vectors, one per layer, and ones of time with a bypass stand beside one another."""
    one, two = kept("ti", stack, CAT, 1, num_vectors=3), kept("neti", stack, DOG, 2)
    three = kept("xti", stack, SUBJECTS[2], 3)
    together = Composition([one, two, three])
    close(draw(together, "a <my-cat> here"), draw(one, "a <my-cat> here"))
    close(draw(together, "a <my-dog> here"), draw(two, "a <my-dog> here"))
    close(draw(together, "a <my-toy> here"), draw(three, "a <my-toy> here"))
    every = draw(together, "a <my-cat>, a <my-dog>, a <my-toy>")
    differ(every, draw(Composition([one, two]), "a <my-cat>, a <my-dog>, a toy"))


def test_offsets_of_one_weight_add_up(stack) -> None:
    one, two = kept("lora", stack, CAT, 1, text_encoder=True), kept("lora", stack, DOG, 2, text_encoder=True)
    joined = Composition([one, two])
    joined.materialise_weights()
    name = next(iter(one.changed_weights("").unet.changes))
    frozen = stack.unet.get_parameter(name)
    deltas = [method.changed_weights("").unet.changes[name].apply(frozen) - frozen for method in (one, two)]
    torch.testing.assert_close(joined._unet.changes[name].apply(frozen), frozen + deltas[0] + deltas[1])
    key = next(iter(joined._text))
    whole = stack.text_module.get_parameter(key)
    deltas = [method.changed_weights("").text.changes[key].apply(whole) - whole for method in (one, two)]
    torch.testing.assert_close(joined._text[key], whole + deltas[0] + deltas[1])
    close(draw(Composition([one, two]), BOTH), draw(Composition([two, one]), BOTH))


def test_sum_of_changes_by_hand() -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    column, row = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.5], [1.0]])
    parts = (
        Added(torch.ones(2, 2)),
        LowRank(row.mT, column, 2.0),
        Multiplied(column, row),
        Materialised(torch.zeros(2, 2)),
    )
    # W + 1 + [[1, 2], [0, 0]] + W * [[0.5, 1], [0, 0]] - W
    torch.testing.assert_close(Sum(parts).apply(weight), torch.tensor([[2.5, 5.0], [1.0, 1.0]]))
    halves = Sum((Added(torch.full((1,), 1e-4)), Added(torch.full((1,), 9.9e-3)))).apply(torch.ones(1).bfloat16())
    assert halves.dtype == torch.bfloat16 and halves.item() == torch.tensor(1.01).bfloat16().item()
    assert sum_changes([None, Offsets({})]) is None
    assert isinstance(sum_changes([Offsets({"a": parts[0]}), Offsets({"a": parts[1]})]).changes["a"], Sum)
    assert sum_changes([Offsets({"a": parts[0]}), None]).changes["a"] is parts[0]


def test_pictures_do_not_depend_on_their_batch(stack) -> None:
    together = Composition([kept("neti", stack, CAT), kept("custom_diffusion", stack, DOG)])
    texts = [BOTH, "a <my-dog>", "a <my-cat>"]
    all_at_once = together.sample(texts, [1, 2, 3], steps=1, guidance=7.5)
    alone = together.sample(texts[1:2], [2], steps=1, guidance=7.5)
    torch.testing.assert_close(all_at_once[1:2], alone, atol=4e-3, rtol=0)


def test_the_stack_stays_as_it_is(stack) -> None:
    before = {name: value.clone() for name, value in stack.state_dict().items()}
    plain = kept("ti", stack, CAT)
    alone = draw(plain, "a <my-cat>")
    draw(Composition([plain, kept("lora", stack, DOG, text_encoder=True)]), BOTH)
    after = stack.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(draw(plain, "a <my-cat>"), alone)


def test_what_cannot_be_joined_is_refused(stack) -> None:
    ti = build("ti", stack, [CAT])
    with pytest.raises(UserError, match=r"Imagic \(my-dog\) cannot be drawn with others: what it learns is one whole"):
        Composition([ti, build("imagic", stack, [DOG])])
    with pytest.raises(UserError, match="placeholders <my-cat> and <my-cat>, which a text cannot tell apart"):
        Composition([ti, build("lora", stack, [Subject("tom", "<my-cat>", "cat")])])
    with pytest.raises(UserError, match="two artifacts are of a concept 'my-cat'"):
        Composition([ti, build("lora", stack, [Subject("my-cat", "<tom>", "cat")])])
    with pytest.raises(UserError, match="my-cat and my-dog both replace the last rows"):
        Composition([build("hiper", stack, [CAT]), build("hiper", stack, [DOG])])


def test_what_a_text_shows(stack) -> None:
    together = Composition([build("ti", stack, [CAT]), build("hiper", stack, [DOG])])
    assert together.shown("a <my-cat>") == [CAT, DOG] and together.shown("a plain text") == [DOG]
