"""DDIM inversion and Prompt-to-Prompt as methods: the path is kept on disk, and only its own sampler follows it."""

from __future__ import annotations

import logging

import pytest
import torch

from hiperlab.base import editing_method as trajectory
from hiperlab.base.method import Subject
from hiperlab.errors import UserError
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.sampler import Sampler, ddim, denoise, initial_noise
from tests.composed import build, picture

SUBJECT = Subject("cat", "<c>", "cat", "a cat on a mat", ("a dog on a mat",))
HOW = {"steps": 2, "guidance": 7.5}


def test_the_inversion_is_made_once_and_read_by_the_next_run(stack, tmp_path, monkeypatch, caplog) -> None:
    calls = []
    made = trajectory.inversion_calls
    monkeypatch.setattr(trajectory, "inversion_calls", lambda *args: calls.append(1) or made(*args))
    first = build("ddim_inversion", stack, [SUBJECT], cache=str(tmp_path)).artifact(0)["noise"]
    again = build("ddim_inversion", stack, [SUBJECT], cache=str(tmp_path)).artifact(0)["noise"]
    assert len(calls) == 1 and torch.equal(first, again)
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(kept.read_bytes()[:100])
    with caplog.at_level(logging.WARNING, "hiperlab"):
        broken = build("ddim_inversion", stack, [SUBJECT], cache=str(tmp_path)).artifact(0)["noise"]
    assert len(calls) == 2 and torch.equal(first, broken) and "made anew" in caplog.text
    other = build("ddim_inversion", stack, [SUBJECT], cache=str(tmp_path), steps=1)
    other.prepare()
    assert len(calls) == 3 and len(list(tmp_path.iterdir())) == 2


def test_a_held_source_is_the_picture_of_its_latents(stack) -> None:
    method = build("ddim_inversion", stack, [SUBJECT], inject_source_latents=True)
    found = method.sample(["a <c> on a mat", "a dog on a mat"], [0, 1], **HOW)
    mean = stack.encode_moments(picture(SUBJECT, 0, stack.size)[None]).chunk(2, dim=1)[0]
    expected = stack.decode(stack.scale(mean)).div(2).add(0.5).clamp(0, 1)
    torch.testing.assert_close(found[:1], expected, atol=1e-5, rtol=0)
    assert (found[1] - found[0]).abs().max() > 1e-3


def test_another_sampler_is_refused(stack) -> None:
    method = build("ddim_inversion", stack, [SUBJECT])
    with pytest.raises(UserError, match="path of 2 steps, 3 were asked"):
        method.sample(["a dog"], [0], steps=3, guidance=7.5)
    for sampler in (
        Sampler("PNDMScheduler", 2, 7.5, {"skip_prk_steps": True}),
        Sampler("DDIMScheduler", 2, 7.5, {"steps_offset": 0}),
    ):
        with pytest.raises(UserError, match="DDIM's own path"):
            method.sample(["a dog"], [0], sampler=sampler, **HOW)
    with pytest.raises(UserError, match="'lion' is not in"):
        build("ddim_inversion", stack, [SUBJECT], p2p={"equalizer": {"lion": 2}})


def test_a_generated_source_is_the_plain_picture_of_its_seed(stack) -> None:
    """Our loop is the sampler's: what Prompt-to-Prompt draws for the source is what anyone draws."""
    method = build("prompt_to_prompt", stack, [SUBJECT])
    assert method.finished and method.artifact(0) == {} and method.seeded
    found = method.sample(["a <c> on a mat"] * 2, [3, 4], **HOW)
    states, empty = (Conditioning(stack.encode_text([text])[None]) for text in ("a cat on a mat", ""))
    scheduler = ddim(2, 7.5).build(stack, 2)
    latents = denoise(stack, initial_noise([4], stack.latent_shape), scheduler, lambda _: states, empty, 7.5)
    expected = stack.decode(latents).div(2).add(0.5).clamp(0, 1)
    torch.testing.assert_close(found[1:], expected, atol=1e-4, rtol=0)


def test_word_maps_cover_every_word(stack) -> None:
    found = build("ddim_inversion", stack, [SUBJECT]).attention_maps(["a dog on a mat"], 0, guidance=7.5)
    assert [each.text for each in found] == [SUBJECT.source, "a dog on a mat"]
    for each in found:
        assert each.words == tuple(each.text.split(" ")) and each.maps.shape == (5, 8, 8)
        assert each.picture.shape == (3, 128, 128) and (each.maps > 0).all()


@pytest.mark.parametrize("name", ["ddim_inversion", "edit_friendly", "masactrl", "proximal_guidance"])
def test_maps_kept_while_drawing_are_those_drawn_for_them(stack, name) -> None:
    """What `keeps_maps` saves is the second drawing, nothing else; another seed or guidance is still drawn."""
    texts = ["a dog on a mat", "a cat on a bed"]
    anew = build(name, stack, [SUBJECT]).attention_maps(texts, 0, guidance=7.5)
    method = build(name, stack, [SUBJECT])
    method.keeps_maps = True
    method.sample(texts, [0, 0], **HOW)
    calls: list[int] = []
    hook = stack.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    found = method.attention_maps(texts, 0, guidance=7.5)
    assert calls == [] and [each.text for each in found] == [each.text for each in anew]
    for one, other in zip(found, anew, strict=True):
        assert one.words == other.words
        torch.testing.assert_close(one.maps, other.maps, atol=1e-3, rtol=1e-3)
    method.attention_maps(texts, 0, guidance=5.0)
    hook.remove()
    assert calls


def test_a_held_source_is_of_the_artifacts_picture(stack) -> None:
    """The path is of the picture that the data has now, the noise of the one that the artifact was made with."""
    kept = build("ddim_inversion", stack, [SUBJECT]).artifact(0)
    other = build("ddim_inversion", stack, [SUBJECT], inject_source_latents=True)
    other.set_reference(0, picture(SUBJECT, 1, stack.size))
    other.load_artifact(0, kept)
    for _ in range(2):
        with pytest.raises(UserError, match="of another picture"):
            other.sample(["a dog on a mat"], [0], **HOW)
    other.set_reference(0, picture(SUBJECT, 0, stack.size))
    other.load_artifact(0, kept)
    assert other.sample(["a dog on a mat"], [0], **HOW).isfinite().all()
