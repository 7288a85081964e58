"""DDIM there and back for models that predict noise and models that predict velocities: diffusers' own formulas."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler

from hiperlab.model import inversion
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.stack import FrozenStack
from hiperlab.model.tiny import tiny

STEPS = 5
TYPES = ("epsilon", "v_prediction")


@pytest.fixture(scope="module", params=TYPES)
def stack(request) -> FrozenStack:
    return tiny(seed=0, size=64, prediction_type=request.param).double()


@pytest.fixture(scope="module")
def latents(stack) -> torch.Tensor:
    return torch.randn(2, *stack.latent_shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def states(stack: FrozenStack) -> Conditioning:
    return Conditioning(stack.encode_text(["a cat", "a dog"])[None].double())


def test_inversion_is_diffusers_inverse_scheduler(stack, latents) -> None:
    scheduler = DDIMInverseScheduler.from_config(stack.scheduler_config)
    scheduler.alphas_cumprod, scheduler.initial_alpha_cumprod = stack.alpha_bar, stack.alpha_bar[0]
    scheduler.set_timesteps(STEPS)
    text, z = states(stack), latents
    with torch.no_grad():
        for t in scheduler.timesteps:
            z = scheduler.step(stack.predict(z, t.expand(2), text), int(t), z, return_dict=False)[0]
    found = inversion.invert(stack, latents, text, STEPS).latents
    assert found.shape == (STEPS + 1, *latents.shape)
    torch.testing.assert_close(found[-1], z, atol=1e-10, rtol=0)


def test_denoising_is_diffusers_ddim(stack, latents) -> None:
    scheduler = DDIMScheduler.from_config(stack.scheduler_config)
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = stack.alpha_bar, stack.alpha_bar[0]
    scheduler.set_timesteps(STEPS)
    text, z, ours = states(stack), latents, latents
    with torch.no_grad():
        for t in scheduler.timesteps:
            z = scheduler.step(stack.predict(z, t.expand(2), text), t, z, return_dict=False)[0]
            noise = inversion.predict_noise(stack, ours, int(t), text)
            ours = inversion.previous(stack, ours, noise, int(t), STEPS)
    torch.testing.assert_close(ours, z, atol=1e-10, rtol=0)


def test_a_velocity_is_the_noise_it_stands_for(stack) -> None:
    """A network that predicts exactly gives back the noise that was added, whatever it predicts."""
    torch.manual_seed(0)
    z0, noise = (torch.randn(2, *stack.latent_shape, dtype=torch.float64) for _ in range(2))
    when = torch.tensor([401, 401])
    exact = stack.target(z0, noise, when)

    class Exact:
        prediction_type, alpha_bar = stack.prediction_type, stack.alpha_bar

        def predict(self, *_: object) -> torch.Tensor:
            return exact

    z = stack.add_noise(z0, noise, when)
    found = inversion.predict_noise(Exact(), z, 401, states(stack))  # type: ignore[arg-type]
    torch.testing.assert_close(found, noise, atol=1e-12, rtol=0)
