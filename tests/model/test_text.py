"""Prompts to text states: equality with transformers' own forward, slots, and what is refused."""

from __future__ import annotations

import copy
import functools
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiperlab.errors import UserError
from hiperlab.model.text import check_placeholder, numbered_slots, single_token, tokenize
from hiperlab.model.tiny import clip_tokenizer

PROMPTS = ["a photo of a cat", "It's NAÏVE, don't!! 123 日本", "", "a " * 60]


def test_states_equal_transformers_own(stack) -> None:
    ids = stack.tokenize(PROMPTS).ids
    theirs = clip_tokenizer()(PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ids, theirs)
    with torch.no_grad():
        torch.testing.assert_close(stack.encode_text(PROMPTS), stack.text(ids).last_hidden_state, atol=1e-5, rtol=0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["a", "photo", "of", "<x>", "<x>s", "'s", ",", "CAT", "in-the", " "]), max_size=12))
def test_slots_are_what_an_added_token_would_be(words) -> None:
    """Splitting at the placeholder gives the ids that a tokenizer with the placeholder added gives."""
    prompt = " ".join(words)
    expected = _with_added_token()(prompt, padding="max_length", return_tensors="pt").input_ids
    tokens = tokenize(clip_tokenizer(), [prompt], {"<x>": [0]})
    assert torch.equal(torch.where(tokens.slots >= 0, 49408, tokens.ids), expected)


@functools.cache
def _with_added_token():
    tokenizer = copy.deepcopy(clip_tokenizer())
    tokenizer.add_tokens("<x>")
    return tokenizer


def test_several_vectors_take_several_tokens() -> None:
    slots = numbered_slots(["<a>", "<ab>"], num_vectors=2)
    assert slots == {"<a>": [0, 1], "<ab>": [2, 3]}
    tokens = tokenize(clip_tokenizer(), ["<ab> and <a>"], slots)
    rows, positions, found = tokens.occurrences()
    assert found.tolist() == [2, 3, 0, 1] and positions.tolist() == [1, 2, 4, 5] and rows.tolist() == [0] * 4


def test_long_prompts(caplog) -> None:
    words = "red " * 80
    with caplog.at_level(logging.WARNING):
        tokens = tokenize(clip_tokenizer(), ["<x> " + words], {"<x>": [0]})
    assert tokens.ids.shape == (1, 77) and tokens.slots[0, 1] == 0 and "not read" in caplog.text
    with pytest.raises(UserError, match="its placeholder falls off"):
        tokenize(clip_tokenizer(), [words + "<x>"], {"<x>": [0]})


@pytest.mark.parametrize("bad", ["cat", "CAT", "two words", "", "{}", "photo"])
def test_placeholders_that_cannot_be(bad) -> None:
    with pytest.raises(UserError, match="Try <"):
        check_placeholder(clip_tokenizer(), bad)


def test_class_noun_must_be_one_token(caplog) -> None:
    tokenizer = clip_tokenizer()
    assert single_token(tokenizer, "cat") == 2368
    with caplog.at_level(logging.WARNING):
        assert single_token(tokenizer, "stuffed animal") == single_token(tokenizer, "animal")
    assert "stuffed animal" in caplog.text
    with pytest.raises(UserError, match="tokens"):
        single_token(tokenizer, "floccinaucinihilipilification")


def test_vectors_go_where_the_slots_are(stack) -> None:
    from hiperlab.model import text as clip

    tokens = stack.tokenize(["a <x> here", "no slot", "<x> <x>"], {"<x>": [0]})
    rows, positions, _ = tokens.occurrences()
    vectors = torch.randn(16, len(rows), 32, generator=torch.Generator().manual_seed(0))
    embedded = clip.embed(stack.text, tokens.ids, vectors, (rows, positions))
    place = clip.inner(stack.text).embeddings.position_embedding.weight
    assert torch.equal(embedded[3, 2, 2], vectors[3, 2] + place[2])
    plain = clip.embed(stack.text, tokens.ids)
    assert torch.equal(embedded[:, 1], plain[:, 1].expand(16, -1, -1))
