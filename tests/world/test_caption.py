"""Captions and their parser: what is said is recovered, what is unknown is reported."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiperlab.world import vocabulary as words
from hiperlab.world.caption import caption, caption_parts, parse, true_identity, true_picture, true_scene
from hiperlab.world.draw import render
from hiperlab.world.identity import identity
from hiperlab.world.scene import scene

seeds = st.integers(0, 2**40)


@settings(max_examples=400, deadline=None)
@given(seeds, seeds, seeds)
def test_parse_recovers_exactly_what_a_caption_names(who_seed, scene_seed, wording):
    who, now = identity(who_seed), scene(scene_seed)
    text, named = caption_parts(who, now, np.random.default_rng(wording))
    assert caption(who, now, np.random.default_rng(wording)) == text
    assert parse(text) == {**named, "subject": False, "unparsed": ()}
    for attribute, value in named.items():
        if attribute == "colours":
            assert value == (who.colour,)
        else:
            assert value == getattr(now, attribute, getattr(who, attribute, None))


@settings(max_examples=200, deadline=None)
@given(seeds, seeds, seeds)
def test_captions_with_a_placeholder_round_trip(who_seed, scene_seed, wording):
    who, now = identity(who_seed), scene(scene_seed)
    text, named = caption_parts(who, now, np.random.default_rng(wording), subject="<thing>")
    said = parse(text, "<thing>", who.kind)
    assert said == {**named, "kind": who.kind, "subject": True, "unparsed": ()}


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_text_parses_without_error_and_nothing_is_guessed(text):
    said = parse(text)
    known = "kind pose place style accessory accessory_colour light close pattern colours subject unparsed"
    assert set(said) <= set(known.split())


@pytest.mark.parametrize("attribute, table", [("pose", words.POSES), ("place", words.PLACES), ("style", words.STYLES),
                                              ("accessory", words.ACCESSORIES), ("light", words.LIGHTS)])  # fmt: skip
def test_every_phrase_is_understood(attribute, table):
    for value, phrases in table.items():
        for phrase in phrases:
            said = parse(f"a <cat> {phrase}", "<cat>")
            assert said[attribute] == value and said["unparsed"] == (), phrase


def test_prompts_of_the_papers():
    said = parse("An oil painting of <cat>", "<cat>", "cat")
    assert said == {"subject": True, "style": "oil painting", "kind": "cat", "unparsed": ()}
    said = parse("<cat> wearing a santa hat on the beach", "<cat>")
    assert (said["accessory"], said["place"], said["unparsed"]) == ("santa hat", "beach", ())
    said = parse("a photo of a sks dog jumping in the snow.", "sks dog", "dog")
    assert (said["kind"], said["pose"], said["place"], said["unparsed"]) == ("dog", "jumping", "snow", ())
    said = parse("a {} wearing a red hat with a city in the background", "{}")
    assert (said["accessory"], said["accessory_colour"], said["place"]) == ("hat", "red", "city")
    assert parse("a purple <car>", "<car>")["colours"] == ("purple",)


def test_unknown_words_are_reported_not_guessed():
    said = parse("a painting of <cat> riding a bicycle in paris", "<cat>")
    assert said == {"subject": True, "unparsed": ("painting", "riding", "bicycle", "paris")}
    assert parse("a cat and a dog")["unparsed"] == ("dog",)
    assert parse("a cat on the beach in the snow")["unparsed"] == ("in", "the", "snow")
    assert parse("something red")["unparsed"] == ("something", "red")


def test_the_truth_follows_the_prompt_and_keeps_the_subject():
    who = identity(77, "cat")
    prompt = "a watercolor painting of <cat> sitting in the snow wearing a red scarf at sunset"
    now = true_scene(prompt, seed=5, placeholder="<cat>")
    assert (now.style, now.pose, now.place, now.accessory, now.accessory_colour, now.light) == (
        "watercolor", "sitting", "snow", "scarf", "red", "sunset")  # fmt: skip
    picture = true_picture(who, prompt, 5, 64, "<cat>")
    np.testing.assert_array_equal(picture.rgb, render(who, now, 64).rgb)
    assert true_scene("<cat>", 5, "<cat>").style == "photo"  # a silent prompt means the plain picture
    assert true_identity(who, "a photo of a dog").kind == "dog"
    assert true_identity(who, "a photo of <cat>", "<cat>") == who
