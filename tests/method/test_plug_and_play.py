"""Plug-and-play features: what no injection is, whose rows change, levels of the path, settings that are refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from hiperlab.base import artifact
from hiperlab.base.editing_method import Drawing
from hiperlab.base.method import Subject
from hiperlab.edit.prompt_to_prompt import edit
from hiperlab.errors import UserError
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.inversion import invert
from hiperlab.model.shared_calls import alone, together
from tests.composed import UNetCalls, build, config

SUBJECT = Subject("cat", "<c>", "cat", "a cat on a mat", ("a dog on a mat",))
TEXTS = ["a cat on a mat", "a dog on a mat", "a red cat"]
STEPS = 4


@pytest.fixture
def double(stack) -> Any:
    return copy.deepcopy(stack).double()


def made(stack: Any, **changes: Any) -> Any:
    method = build("plug_and_play", stack, [SUBJECT], **{"steps": STEPS, "inversion_steps": STEPS, **changes})
    return method.to(next(stack.unet.parameters()).dtype)


def work(
    method: Any, texts: list[str], negative: str, seen: list[Tensor] | None = None, controlled: bool = True
) -> Any:
    start = alone(method.model, method.start_calls(0)).expand(len(texts), -1, -1, -1)
    edits = method.edits(texts, 16, guided=True, keep=False) if controlled else None
    watch = None if seen is None else lambda _, z: seen.append(z)
    return method.denoise_calls(Drawing(start, *method.edit_conditions(texts, negative), 7.5, edits, watch))


def drawn(method: Any, texts: list[str] = TEXTS, negative: str = "ugly", **how: Any) -> Tensor:
    """Latents of all rows after every step (T, B, C, H, W)."""
    seen: list[Tensor] = []
    alone(method.model, work(method, texts, negative, seen, **how))
    return torch.stack(seen)


def same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)


def test_without_injection_targets_are_drawn_plainly(double) -> None:
    """From the path's noisiest kept latent, with the negative text."""
    method = made(double, tau_f=0.0, tau_a=0.0)
    found = drawn(method)[-1]
    states, negative = (Conditioning(method.encode(texts)[None]) for texts in (TEXTS[1:], ["ugly"] * 2))
    start = method.path[-1:].expand(2, -1, -1, -1)
    same(found[1:], edit(double, start, STEPS, lambda i: states, lambda i: negative, 7.5))


def test_the_source_row_is_on_the_path_and_the_others_follow_it(double) -> None:
    method, plain = made(double), drawn(made(double, tau_f=0.0, tau_a=0.0))
    found = drawn(method)
    same(found[:, 0], method.path.flip(0)[1:])
    for one in ({"tau_a": 0.0}, {"tau_f": 0.0}):
        other = drawn(made(double, **one))
        for before in (plain, found):
            assert (other - before)[-1, 1:].abs().amax((1, 2, 3)).min() > 1e-4
    same(drawn(method, TEXTS[:2])[:, 1], found[:, 1])


def test_rows_of_one_text_agree_while_their_latents_do(double) -> None:
    """At the first step all rows start from one latent: with empty texts injection exchanges equals."""
    found = drawn(made(double), ["", "", ""], negative="")
    plain = drawn(made(double, tau_f=0.0, tau_a=0.0), ["", "", ""], negative="")
    same(found[0], plain[0])
    same(found[:, 1], found[:, 2])


@pytest.mark.parametrize("setting", ["tau_f", "tau_a"])
def test_shares_count_whole_steps(double, setting) -> None:
    """Of 4 steps, 0.7 is two; the third is the first without."""
    off = {"tau_f": 0.0, "tau_a": 0.0}
    half, more, three = (drawn(made(double, **{**off, setting: share})) for share in (0.5, 0.7, 0.75))
    same(half, more)
    same(half[:2], three[:2])
    assert (half[2] - three[2])[1:].abs().amax((1, 2, 3)).min() > 1e-6


def test_one_source_row_serves_all_and_passes_are_shared(double, monkeypatch) -> None:
    method, other = made(double), made(double, tau_f=1.0, feature_layer=7, attention_layer=8)
    expected = drawn(method)[-1], drawn(other, TEXTS[:2])[-1]
    asked = UNetCalls(double, monkeypatch)
    found = together(double, [work(method, TEXTS, "ugly"), work(other, TEXTS[:2], "ugly")])
    assert [call.rows for call in asked.taken()] == [5 + 3] * STEPS
    for ours, theirs in zip(found, expected, strict=True):
        same(ours, theirs)
    assert not any(module._forward_hooks for module in double.unet.modules()), "nothing stays on the U-Net"


def test_a_finer_path_keeps_the_levels_of_the_drawing(double) -> None:
    """Of 20 steps those that 4 make: every fifth from the lowest, which is not the path's end."""
    method = made(double, inversion_steps=20)
    drawn(method)
    states = Conditioning(method.encode([""])[None])
    path = invert(double, method.picture_latents(), states, 20).latents[:, 0]
    same(method.path, path[[0, 1, 6, 11, 16]])
    with pytest.raises(UserError, match=r"inversion_steps=6 does not pass all levels of 4 steps: use .*=4, or 999"):
        made(double, inversion_steps=6)
    assert made(double, inversion_steps=999).levels == [0, *(timestep for timestep in reversed(method.timesteps))]


def test_the_source_text_is_the_inversions_alone(double) -> None:
    plain, told = made(double), made(double, source_text=True)
    for method in (plain, told):
        drawn(method)
    assert (plain.path[-1] - told.path[-1]).abs().max() > 1e-4
    keys = [method.edit_conditions(TEXTS, "ugly")[0](0).keys for method in (plain, told)]
    assert torch.equal(*keys) and torch.equal(keys[0][0, 0], plain.encode([""])[0])


def test_an_artifact_edits_without_its_picture(stack, tmp_path) -> None:
    """And only under the settings of its path."""
    method = made(stack, inversion_steps=20)
    expected = method.sample(TEXTS[:2], [0, 0], steps=STEPS, guidance=7.5)
    artifact.write(tmp_path / "cat.safetensors", method, 0, {"inversion_steps": 20, "source_text": False}, steps=0)
    other = made(stack, inversion_steps=20)
    other._picture = None
    artifact.load_into(other, 0, tmp_path / "cat.safetensors")
    torch.testing.assert_close(other.sample(TEXTS[:2], [0, 0], steps=STEPS, guidance=7.5), expected, atol=1e-6, rtol=0)
    with pytest.raises(UserError, match="inversion_steps"):
        artifact.load_into(made(stack), 0, tmp_path / "cat.safetensors")
    with pytest.raises(UserError):
        artifact.load_into(made(stack, steps=5, inversion_steps=20), 0, tmp_path / "cat.safetensors")


def test_maps_of_words_are_shown_of_texts_that_are_read(stack) -> None:
    """Not of the source, whose row reads none."""
    found = made(stack).attention_maps(["a dog on a mat", "a cat on a mat"], 0, guidance=7.5)
    assert [(each.text, each.words) for each in found] == [("a dog on a mat", ("a", "dog", "on", "a", "mat"))]
    masactrl = [
        build("masactrl", stack, [SUBJECT], source_text=read).attention_maps(["a dog on a mat"], 0, guidance=7.5)
        for read in (False, True)
    ]
    assert [[each.text for each in maps] for maps in masactrl] == [["a dog on a mat"], TEXTS[:2]]


def test_the_authors_negative_text_is_the_default() -> None:
    assert config("plug_and_play").sample.negative == "ugly, blurry, black, low res, unrealistic"
    assert config("masactrl").sample.negative is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tau_f": 1.2}, "tau_f=1.2 is no share of the steps"),
        ({"tau_a": -0.1}, "tau_a=-0.1 is no share of the steps"),
        ({"feature_layer": 12}, "feature_layer=12 is no layer of the decoder. Choose 0 to 11"),
        ({"attention_layer": -1}, "attention_layer=-1 is no layer of the decoder"),
    ],
)
def test_settings_are_checked(stack, changes, message) -> None:
    with pytest.raises(UserError, match=message):
        made(stack, **changes)
