"""Embedded subjects, edits and the split of the seeds."""

import numpy as np
import pytest

from hiperlab.errors import UserError
from hiperlab.world import vocabulary as words
from hiperlab.world.caption import parse, true_scene
from hiperlab.world.identity import identity
from hiperlab.world.subjects import (
    EDITS,
    HELD_OUT,
    NAMED,
    PROMPTS,
    SEEDS,
    TEMPLATES,
    TRAINED,
    edit,
    held_out,
    subject,
    view_scenes,
    views,
)


def test_there_are_enough_subjects_over_the_classes():
    assert "cats" in SEEDS and len(SEEDS) >= 9
    assert {subject(name).word for name in SEEDS} == set(words.KINDS)
    assert len({subject(name).who for name in SEEDS}) == len(SEEDS)
    assert subject("cats").placeholder == "<cats>"


@pytest.mark.parametrize("name", SEEDS)
def test_views_are_different_photos(name):
    pictures = views(name, 64)
    assert len(pictures) == 5 and all(p.size == (64, 64) and p.mode == "RGB" for p in pictures)
    scenes = view_scenes(SEEDS[name][0])
    assert len({s.place for s in scenes}) == len({s.pose for s in scenes}) == 5
    np.testing.assert_array_equal(np.asarray(views(name, 64, 2)[1]), np.asarray(pictures[1]))


def test_prompts_are_of_the_grammar():
    for prompt in PROMPTS + TEMPLATES:
        said = parse(prompt.format("<cats>"), "<cats>")
        assert said["subject"] and said["unparsed"] == (), prompt


@pytest.mark.parametrize("name", EDITS)
def test_edits_have_a_source_and_true_targets(name):
    one = edit(name)
    for prompt in (one.source_prompt, *one.target_prompts):
        assert parse(prompt)["unparsed"] == (), prompt
    source, targets = np.asarray(one.source(64), int), [np.asarray(t, int) for t in one.targets(64)]
    assert len(targets) >= 2
    for target in targets:
        assert np.abs(source - target).mean() > 0.5
    cameras = {(s.x, s.y, s.zoom, s.rotation, s.mirror) for s in (true_scene(p, one.seed) for p in one.target_prompts)}
    assert len(cameras) == 1  # only what the prompt says changes


def test_held_out_identities_are_never_trained_on():
    assert TRAINED[-1] < HELD_OUT[0] and HELD_OUT[-1] < NAMED
    assert held_out(4, "bear") == identity(HELD_OUT.start + 4, "bear")
    with pytest.raises(UserError, match="identity_seed"):
        held_out(-1)


def test_unknown_names_list_the_choices():
    with pytest.raises(UserError, match="cats"):
        subject("cat")
    with pytest.raises(UserError, match="standing_dog"):
        edit("standing_dogs")
