"""Prompt-to-Prompt on the rows of one call: pairs are independent, mistakes are named."""

from __future__ import annotations

import pytest
import torch

from hiperlab.data.concept import EditSettings
from hiperlab.edit.prompt_to_prompt import PromptToPrompt, edit
from hiperlab.edit.token_alignment import bounds, replacement, word_indices, word_tokens
from hiperlab.errors import UserError
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.tiny import clip_tokenizer, tiny

TOKENS = clip_tokenizer()
SOURCE, REPLACED, REFINED = "a cat on a mat", "a tiger on a mat", "a fluffy cat on a mat"


def settings(**changes) -> PromptToPrompt:
    plain = {
        "mode": "auto", "tau_c": 0.6, "tau_s": 0.6, "tau_u": 0.4, "tau_words": {}, "equalizer": {}, "blend": None,
        "blend_except": None, "blend_threshold": 0.3, "align_tail": False, "map_pixels": None, "advice": True,
    }  # fmt: skip
    return PromptToPrompt(**{**plain, **changes})


@pytest.fixture(scope="module")
def stack():
    return tiny(seed=0, size=128).double()


def draw(stack, texts, how: PromptToPrompt | None, steps: int = 2) -> torch.Tensor:
    states = stack.encode_text(texts)
    empty = stack.encode_text([""]).expand_as(states)
    start = (
        torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1)).double().expand(len(texts), -1, -1, -1)
    )
    edits = how and how.edits(TOKENS, texts[0], texts[1:], steps, 16, guided=True)
    return edit(
        stack, start, steps, lambda _: Conditioning(states[None]), lambda _: Conditioning(empty[None]), 7.5, edits
    )


def test_targets_together_are_targets_alone(stack) -> None:
    how = settings(equalizer={"tiger": 2.0}, blend=["cat", "tiger"], blend_threshold=0.9)
    both = draw(stack, [SOURCE, REPLACED, REFINED], how)
    for row, text in ((1, REPLACED), (2, REFINED)):
        torch.testing.assert_close(both[[0, row]], draw(stack, [SOURCE, text], how), atol=1e-9, rtol=0)


def test_the_source_is_drawn_as_if_alone_and_windows_of_zero_do_nothing(stack) -> None:
    alone, target = draw(stack, [SOURCE], None), draw(stack, [REPLACED], None)
    edited = draw(stack, [SOURCE, REPLACED], settings())
    torch.testing.assert_close(edited[:1], alone, atol=1e-9, rtol=0)
    assert (edited[1:] - target).abs().max() > 1e-4, "the maps were taken over"
    nothing = draw(stack, [SOURCE, REPLACED], settings(tau_c=0, tau_s=0, tau_u=0))
    torch.testing.assert_close(nothing, torch.cat([alone, target]), atol=1e-9, rtol=0)


def test_the_tail_can_stay_in_place() -> None:
    """The authors' table reads "cheeseburger" for "eating" once a word has more tokens than before."""
    pair = ("a squirrel eating a cheeseburger", "a tyrannosaurus eating a cheeseburger")
    before, after = word_tokens(pair[0], TOKENS)[2][0], word_tokens(pair[1], TOKENS)[2][0]
    assert replacement(*pair, TOKENS)[before, after] == 0
    assert replacement(*pair, TOKENS, align_tail=True)[before, after] == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: word_indices("a dog, playing", "dog", TOKENS), "'dog' is not in 'a dog, playing'.*Did you mean dog,"),
        (lambda: word_indices("a #1 dog", "dog", TOKENS), "'#' or blanks in a row"),
        (lambda: word_indices("a  dog", "dog", TOKENS), "'#' or blanks in a row"),
        (lambda: replacement("a cat", "a big cat", TOKENS), "equally many words.*mode=refine"),
        (lambda: word_tokens("cat " * 80 + "cat", TOKENS), "tokens long"),
        (lambda: bounds(1.5), "no share"),
        (lambda: settings(mode="swap"), "mode='swap'"),
        (lambda: settings(blend=["cat"]), r"blend=\['cat'\]"),
        (lambda: settings(blend_except=["cat", "cat"]), "give both"),
        (lambda: settings(equalizer={"lion": 2}).check(TOKENS, SOURCE, [REPLACED, REFINED]), "'lion' is not in"),
        (lambda: settings(blend=["dog", "tiger"]).check(TOKENS, SOURCE, [REPLACED]), "'dog' is not in"),
        (lambda: settings(mode="replace").check(TOKENS, SOURCE, [REFINED]), "equally many words"),
    ],
)
def test_mistakes_are_named(make, message) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_the_data_authors_advice_wins_where_they_gave_it() -> None:
    advice = EditSettings("refine", ("cat", "tiger"), (("tiger", 2.0),), {"c": 0.2, "u": 0.5})
    found = settings().with_settings(advice)
    assert (found.mode, found.tau_c, found.tau_s, found.tau_u) == ("refine", 0.2, 0.6, 0.5)
    assert found.blend == ("cat", "tiger") and found.equalizer == {"tiger": 2.0}
    assert settings(advice=False).with_settings(advice).mode == "auto" and settings().with_settings(None).tau_c == 0.6
