"""pix2pix-zero: the noise's regularisation, directions, what guidance holds and whose calls are shared, settings."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hiperlab.base import artifact
from hiperlab.base.editing_method import Drawing
from hiperlab.base.method import Subject
from hiperlab.errors import UserError
from hiperlab.loss.white_noise import PUBLISHED, autocorrelation, divergence, sides, whitened
from hiperlab.method.pix2pix_zero import drawn_rolls, inversion_path, map_distance
from hiperlab.model.attention_control import layer_of
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.inversion import invert
from hiperlab.model.shared_calls import alone, together
from hiperlab.model.tiny import tiny
from tests.composed import UNetCalls, build, config

SUBJECT = Subject("cat", "<c>", "cat", "a cat on a mat", ("a dog on a mat",))
TEXTS = ["a cat on a mat", "a dog on a mat", "a red cat"]
STEPS = 3


@pytest.fixture
def double(stack) -> Any:
    return copy.deepcopy(stack).double()


def made(stack: Any, subject: Subject = SUBJECT, **changes: Any) -> Any:
    method: Any = build("pix2pix_zero", stack, [subject], **{"steps": STEPS, "xa_guidance": 20.0, **changes})
    return method.to(next(stack.unet.parameters()).dtype)


def work(method: Any, texts: list[str] = TEXTS, guidance: float = 5.0, negative: str = "") -> Any:
    start = alone(method.model, method.start_calls(0)).expand(len(texts), -1, -1, -1)
    return method.denoise_calls(Drawing(start, *method.edit_conditions(texts, negative), guidance, None))


def drawn(method: Any, *args: Any, **how: Any) -> Tensor:
    return alone(method.model, work(method, *args, **how))


def unit(seed: int = 0, side: int = 64) -> Tensor:
    return torch.randn(4, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the noise -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [64, 16, 8])
def test_autocorrelation_is_the_naive_sum(side) -> None:
    """Channel by channel, level by level, with a roll of its own each."""
    noise, rolls = unit(1, side), drawn_rolls(3, 0, 1, 1, 4, side)[0, 0]
    expected = 0.0
    for channel, shifts in zip(noise, rolls.tolist(), strict=True):
        level = channel[None, None]
        for number, shift in enumerate(shifts):
            level = F.avg_pool2d(level, 2) if number else level
            for axis in (2, 3):
                expected += float((level * level.roll(shift, axis)).mean() ** 2)
    assert len(shifts) == len(sides(side)) and level.shape[2] == 8
    assert float(autocorrelation(noise, rolls)) == pytest.approx(expected, rel=1e-12)


def test_rolls_are_drawn_for_each_level() -> None:
    """From 1 to half the side, all of them; the same for the same seed and step."""
    rolls = drawn_rolls(0, 2, 50, 5, 4, 64)
    assert rolls.shape == (50, 5, 4, 4) and torch.equal(rolls, drawn_rolls(0, 2, 50, 5, 4, 64))
    assert not torch.equal(rolls, drawn_rolls(0, 3, 50, 5, 4, 64))
    for level, side in enumerate(sides(64)):
        assert rolls[..., level].unique().tolist() == list(range(1, side // 2))


def test_white_noise_is_left_nearly_alone() -> None:
    """Smooth noise, or noise of another size, moves towards it."""
    white = unit()
    smooth = F.avg_pool2d(white, 5, stride=1, padding=2) * 5
    rolls = drawn_rolls(0, 0, 5, 5, 4, 64)

    def moved(noise: Tensor, **how: float) -> float:
        return float((whitened(noise, rolls, **{"lambda_ac": 20.0, "lambda_kl": 20.0, **how}) - noise).norm())

    assert moved(white) < 0.1 * moved(smooth) and moved(white, lambda_ac=0, lambda_kl=0) == 0
    assert moved(white) < 0.2 * moved(1.5 * white, lambda_ac=0)
    for noise, loss in ((smooth, lambda e: autocorrelation(e, rolls[0, 0])), (1.5 * white, divergence)):
        assert loss(whitened(noise, rolls, 20.0, 20.0)) < loss(noise)


def test_weights_mean_the_same_at_any_size() -> None:
    """Of the divergence the relative step is lambda 2 (1 - 1 / v) / 16384 whatever the number of elements."""
    found = []
    for side in (64, 16):
        noise = torch.where(torch.arange(4 * side * side).view(4, side, side) % 2 == 0, 2.0, -2.0).double()
        rolls = drawn_rolls(0, 0, 1, 1, 4, side)
        found.append(float(1 - whitened(noise, rolls, 0.0, 20.0)[0, 0, 0] / 2))
    expected = 20 * 2 * (1 - 1 / 4) / PUBLISHED
    assert found == pytest.approx([expected, expected], rel=1e-2)


# ---- the inversion ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_without_regularisation_it_is_ddims(kind) -> None:
    stack = tiny(seed=0, size=64, prediction_type=kind).double()
    method = made(stack, lambda_ac=0.0, lambda_kl=0.0)
    start = alone(stack, method.start_calls(0))
    states = Conditioning(stack.encode_text(TEXTS[:1])[None])
    torch.testing.assert_close(start, invert(stack, method.picture_latents(), states, STEPS).latents[-1])
    other = alone(stack, made(stack).start_calls(0))
    assert (other - start).abs().max() > 1e-5


def test_the_authors_levels_are_one_low_and_two_short(stack) -> None:
    own, theirs = (inversion_path(stack, 50, kind) for kind in ("all", "authors"))
    level = stack.alpha_bar
    assert [step[0] for step in theirs] == [step[0] for step in own][1:-1]
    assert theirs[0][1:] == (level[20], level[40]) and theirs[-1][2] == level[980]
    assert own[0][1:] == (level[0], level[1]) and own[-1][2] == level[981]
    assert all(before[2] == after[1] for path in (own, theirs) for before, after in pairwise(path))


# ---- drawing ---------------------------------------------------------------------------------------------------------


def test_the_source_is_drawn_alone_and_targets_are_what_they_are_alone(double) -> None:
    for how in ({}, {"unconditional": "negative"}):
        method = made(double, **how)
        both = drawn(method)
        torch.testing.assert_close(drawn(method, TEXTS[:1]), both[:1], atol=1e-9, rtol=0)
        for row in (1, 2):
            torch.testing.assert_close(drawn(method, [TEXTS[0], TEXTS[row]])[1], both[row], atol=1e-9, rtol=0)
    assert (drawn(made(double, xa_guidance=0.0))[1:] - both[1:]).abs().amax((1, 2, 3)).min() > 1e-3


def test_no_direction_is_the_reconstruction(double) -> None:
    """Whatever the guidance: there is no distance. Of a model of velocities, too."""
    for stack in (double, tiny(seed=0, size=128, prediction_type="v_prediction").double()):
        found = drawn(made(stack, direction_scale=0.0))
        torch.testing.assert_close(found[1:], found[:1].expand_as(found[1:]), atol=1e-9, rtol=0)


def test_guidance_lowers_the_distance_of_maps(double, monkeypatch) -> None:
    """One step does, at the step's own latents: the published formula, naively."""
    layer = layer_of("mid_block.attentions.0.transformer_blocks.0.attn2")
    maps, reference = torch.rand(4, 8, 16, 77), torch.rand(2, 8, 16, 77)
    naive = [
        torch.stack([((maps[row] - held) ** 2).sum((1, 2)) for row, held in zip((n, n + 2), reference, strict=True)])
        for n in (0, 1)
    ]
    expected = sum(each.mean() for each in naive)
    torch.testing.assert_close(map_distance({layer: maps}, {layer: reference}), expected)
    distances: list[list[float]] = []
    for rate in (1e-12, 2.0):
        seen: list[Tensor] = []
        monkeypatch.setattr(
            "hiperlab.method.pix2pix_zero.map_distance",
            lambda *args, seen=seen: seen.append(map_distance(*args)) or seen[-1],
        )
        drawn(made(double, xa_guidance=rate), TEXTS[:2])
        distances.append([float(each.detach()) for each in seen])
    assert distances[1][0] == pytest.approx(distances[0][0]) and distances[1][1] < distances[0][1]


def test_calls_without_a_gradient_are_shared(double, monkeypatch) -> None:
    """Source rows of both pictures in one call, then a gradient's call for each, then both pictures' moved rows."""
    method, other = made(double), made(double, Subject("dog", "<d>", "dog", "a dog"), xa_guidance=5.0)
    works = [(method, TEXTS), (other, ["a dog", "a cat"])]
    expected = [drawn(*each) for each in works]
    asked = UNetCalls(double, monkeypatch)
    found = together(double, [work(*each) for each in works])
    assert [(call.rows, call.gradient) for call in asked.taken()] == [
        (2, False), (4, True), (2, True), (6, False)
    ] * STEPS  # fmt: skip
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)
    assert not any(weight.requires_grad for weight in double.parameters())


def test_directions(double, tmp_path) -> None:
    """Means of sentences, from a file or a list; without any the texts' difference."""
    before, after = ["a cat", "cats", " "], ["a dog", "dogs"]
    (tmp_path / "cat.txt").write_text("\n".join(before) + "\n", encoding="utf-8")
    expected = double.encode_text(after).mean(0) - double.encode_text(before[:2]).mean(0)
    method = made(double, source_sentences=str(tmp_path / "cat.txt"), target_sentences=after, direction_scale=0.5)
    torch.testing.assert_close(method.directions(TEXTS[1:2])[0], expected)
    keys = method.edit_conditions(TEXTS[:2], "")[0](0).keys[0]
    torch.testing.assert_close(keys[1] - keys[0], expected / 2)
    plain = made(double).edit_conditions(TEXTS, "")[0](0).keys[0]
    torch.testing.assert_close(plain, double.encode_text(TEXTS), atol=1e-12, rtol=0)
    with pytest.raises(UserError, match="are one edit, 2 targets were given"):
        method.edit_conditions(TEXTS, "")


def test_the_other_branch_of_guidance(double) -> None:
    """The source's text, or the negative one, which the reconstruction has, too."""
    with pytest.raises(UserError, match=r"sample\.negative='ugly': the unconditional text is the source's"):
        drawn(made(double), negative="ugly")
    plain, ugly = (drawn(made(double, unconditional="negative"), negative=text) for text in ("", "ugly"))
    assert (plain - ugly).abs().amax((1, 2, 3)).min() > 1e-4


def test_an_artifact_edits_without_its_picture(stack, tmp_path) -> None:
    method = made(stack)
    expected = method.sample(TEXTS, [0, 0, 0], steps=STEPS, guidance=5.0)
    artifact.write(tmp_path / "cat.safetensors", method, 0, {}, steps=0)
    other = made(stack)
    other._picture = None
    artifact.load_into(other, 0, tmp_path / "cat.safetensors")
    assert torch.equal(other.sample(TEXTS, [0, 0, 0], steps=STEPS, guidance=5.0), expected)


def test_the_end_is_kept_on_disk_for_its_settings(stack, tmp_path, monkeypatch) -> None:
    first = made(stack, cache=str(tmp_path))
    first.prepare()
    asked = UNetCalls(stack, monkeypatch)
    again = made(stack, cache=str(tmp_path))
    again.prepare()
    assert not asked.taken() and torch.equal(again.noise, first.noise)
    for changes in ({"levels": "authors"}, {"lambda_ac": 0.0}, {"lambda_kl": 1.0}, {"num_ac_rolls": 1}):
        made(stack, cache=str(tmp_path), **changes).prepare()
    assert len(list(tmp_path.iterdir())) == 5


def test_maps_of_words_are_shown(stack) -> None:
    found = made(stack, xa_guidance=0.0).attention_maps(TEXTS[1:], 0, guidance=5.0)
    assert [each.text for each in found] == TEXTS
    assert all(each.maps.shape[0] == len(each.words) and each.maps.min() > 0 for each in found)


def test_defaults_are_the_authors() -> None:
    """Of real pictures."""
    cfg = config("pix2pix_zero")
    weights = [cfg.method[name] for name in ("lambda_ac", "lambda_kl", "num_reg_steps", "num_ac_rolls", "xa_guidance")]
    assert weights == [20, 20, 5, 5, 0.1] and cfg.sampler.guidance == 5 and cfg.method.unconditional == "source"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": "author"}, "levels='author' is unknown. Did you mean"),
        ({"unconditional": "none"}, "unconditional='none' is unknown"),
        ({"levels": "authors", "steps": 2}, "levels=authors leaves out two. Choose 3 or more"),
        ({"lambda_ac": -1.0}, "lambda_ac=-1.0 would push the wrong way"),
        ({"xa_guidance": -0.1}, "xa_guidance=-0.1 would push the wrong way"),
        ({"num_ac_rolls": 0}, "num_ac_rolls=0 makes none"),
        ({"latent": "resample"}, "latent='resample' is unknown"),
        ({"source_sentences": ["a cat"]}, "target_sentences=null: a direction needs sentences of both"),
        ({"source_sentences": [" "], "target_sentences": ["a dog"]}, "source_sentences=.* holds no sentence"),
        ({"source_sentences": "none.txt", "target_sentences": ["a dog"]}, "source_sentences=none.txt cannot be read"),
    ],
)
def test_settings_are_checked(stack, changes, message) -> None:
    with pytest.raises(UserError, match=message):
        made(stack, **changes)
