"""Edit-friendly DDPM inversion: the maps lead back whatever the network says, and edits follow the same maps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from hiperlab import draws
from hiperlab.base.editing_method import Drawing
from hiperlab.base.method import Subject
from hiperlab.errors import UserError
from hiperlab.method.edit_friendly import coefficients
from hiperlab.model.shared_calls import alone
from tests.composed import UNetCalls, build

SUBJECT = Subject("cat", "<c>", "cat", "a cat on a mat", ("a dog on a mat",))
TEXTS = ["a cat on a mat", "a dog on a mat"]
P2P = {"mode": "p2p", "p2p": {"tau_c": 1.0, "tau_s": 1.0}}


@pytest.fixture
def double(stack) -> Any:
    return copy.deepcopy(stack).double()


def made(stack: Any, seed: int = 0, **changes: Any) -> Any:
    method = build("edit_friendly", stack, [SUBJECT], seed, **{"steps": 4, "skip": 0.25, **changes})
    return method.to(stack.alpha_bar.dtype)


def drawn(method: Any, negative: str = "", guidance: float = 9.0) -> Tensor:
    """Latents of source and target after every step (K, 2, C, H, W)."""
    found: list[Tensor] = []
    start = alone(method.model, method.start_calls(0)).expand(2, -1, -1, -1)
    edits = method.p2p.edits(method.model.tokenizer, TEXTS[0], TEXTS[1:], 4, 16, method.is_guided(guidance))
    states = method.edit_conditions(TEXTS, negative)
    alone(method.model, method.denoise_calls(Drawing(start, *states, guidance, edits, lambda _, z: found.append(z))))
    return torch.stack(found)


def path(method: Any) -> Tensor:
    """x_0 .. x_K (K+1, C, H, W) of the method's own draws."""
    latents = method.picture_latents()
    noise = draws.normal(method.seed, "noise maps", range(method.made), latents.shape[1:]).to(latents)
    return alone(method.model, method.map_calls(latents, noise))[0]


def test_a_step_is_ddpms(double) -> None:
    """Ho et al. 2020, eq. 7: the posterior's mean and variance, for the picture that the predicted noise means."""
    x, noise = torch.randn(2, 1, 4, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    here, below = double.alpha_bar[501], double.alpha_bar[251]
    alpha, beta = here / below, 1 - here / below
    clean = (x - (1 - here).sqrt() * noise) / here.sqrt()
    mean = below.sqrt() * beta / (1 - here) * clean + alpha.sqrt() * (1 - below) / (1 - here) * x
    for form in ("linear", "squared"):
        step = coefficients(double, 501, 4, 1.0, form)
        torch.testing.assert_close(step.mean(x, noise), mean, atol=1e-12, rtol=0)
        torch.testing.assert_close(step.sigma**2, (1 - below) / (1 - here) * beta, atol=1e-12, rtol=0)
    linear, squared = (coefficients(double, 501, 4, 0.5, form) for form in ("linear", "squared"))
    assert linear.sigma == squared.sigma == step.sigma / 2
    variance = step.sigma**2
    torch.testing.assert_close(linear.direction**2, 1 - below - variance / 2, atol=1e-12, rtol=0)
    torch.testing.assert_close(squared.direction**2, 1 - below - variance / 4, atol=1e-12, rtol=0)


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_the_source_is_the_picture_whatever_the_network_says(guidance, double, monkeypatch) -> None:
    """Up to the last step, whose map is left out."""
    monkeypatch.setattr(double, "predict", lambda z, t, states: z.flip(-1) * 0.3 + states.keys.mean())
    method = made(double, guidance_source=guidance)
    found, expected = drawn(method), path(method)
    torch.testing.assert_close(found[:-1, 0], expected[1:-1].flip(0), atol=1e-9, rtol=0)
    rest = (found[-1, 0] - expected[0]).abs().max() / method.coefficients(0).sigma
    assert 0 < rest < 30, "only sigma_0 z_0 is missing"


def test_independent_noise_makes_wide_maps(double) -> None:
    """A chain of noises would give unit normals; these maps are wider."""
    method = made(double, skip=0.0)
    alone(double, method.prepare_calls())
    assert not method.maps[0].any() and method.maps[1:].flatten(1).std(1).min() > 1.2


def test_another_seed_is_another_edit_of_the_same_picture(double) -> None:
    """And drawing seeds change nothing: the maps are the method's."""
    first, other = (drawn(made(double, seed)) for seed in (0, 1))
    assert (first[-1, 1] - other[-1, 1]).abs().max() > 1e-2
    step = made(double).coefficients(0)
    assert (first[-1, 0] - other[-1, 0]).abs().max() < 40 * step.sigma
    method = made(double)
    pictures = method.sample(["a dog on a mat"] * 2, [0, 7], steps=4, guidance=9.0)
    assert torch.equal(*pictures)


def test_skipped_steps_ask_nothing_and_change_no_draw(stack, monkeypatch) -> None:
    whole, half, asked = made(stack, skip=0.0), made(stack, skip=0.5), UNetCalls(stack, monkeypatch)
    alone(stack, half.prepare_calls())
    assert [call.rows for call in asked.taken()] == [2, 2]
    drawn(half)
    assert [call.rows for call in asked.taken()] == [4, 4]
    alone(stack, whole.prepare_calls())
    assert half.maps.shape[0] == 2 and half.maps[1].any()
    torch.testing.assert_close(half.maps, whole.maps[:2], atol=1e-3, rtol=0)
    plain = made(stack, guidance_source=1.0)
    asked.taken()
    alone(stack, plain.prepare_calls())
    assert [call.rows for call in asked.taken()] == [1] * 3, "guidance 1 needs no unconditional pass"


def test_guidance_and_negative_text_are_the_targets(double) -> None:
    method = made(double)
    first = drawn(method)
    for other in (drawn(method, guidance=2.0), drawn(method, negative="blurry"), drawn(method, guidance=1.0)):
        torch.testing.assert_close(other[:, 0], first[:, 0], atol=1e-9, rtol=0)
        assert (other[-1, 1] - first[-1, 1]).abs().max() > 1e-3


def test_attention_is_taken_over_in_p2p_only(double) -> None:
    plain, shared, none = (drawn(made(double, **each))[-1] for each in ({}, P2P, {**P2P, "self_pixels": 0}))
    for other in (shared, none):
        torch.testing.assert_close(other[0], plain[0], atol=1e-9, rtol=0)
    assert (shared[1] - plain[1]).abs().max() > 1e-3 and (shared[1] - none[1]).abs().max() > 1e-3
    ignored = drawn(made(double, p2p={"tau_c": 1.0, "tau_s": 1.0, "equalizer": {"dog": 5}}))[-1]
    torch.testing.assert_close(ignored, plain, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "both"}, "method.mode='both' is unknown"),
        ({"eta_form": "cubed"}, "method.eta_form='cubed' is unknown"),
        ({"skip": 1.0}, "no share of the steps"),
        ({"eta": [0.0]}, "method.eta=0.0"),
        ({"eta": [1.0, 1.0]}, "2 numbers, the path 4 steps"),
        ({"eta": [3.0]}, "at most 1"),
    ],
)
def test_settings_are_checked(changes, message, stack) -> None:
    with pytest.raises(UserError, match=message):
        made(stack, **changes)
