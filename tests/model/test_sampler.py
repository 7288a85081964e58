"""Samplers: noise comes from each picture's own seed, and what a scheduler cannot do is said before a model loads."""

from __future__ import annotations

import diffusers
import pytest
import torch

from hiperlab.errors import UserError
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.sampler import Sampler, generate
from hiperlab.model.tiny import tiny

SCHEDULERS = sorted(name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax"))
STEPS = 3


@pytest.fixture(scope="module")
def stack():
    """A U-Net of which only the arithmetic of the schedule matters."""
    made = tiny(seed=0, size=64)
    made.predict = lambda latents, t, states: torch.sin(latents)  # the schedulers are on trial, not the network
    return made


def pictures(stack, sampler: Sampler, seeds: list[int], batch_size: int) -> torch.Tensor:
    states = Conditioning(stack.encode_text(["a cat"])[None])
    return generate(
        stack, lambda rows, t: states.rows([0] * len(rows)), keys=["a cat"] * len(seeds), seeds=seeds, steps=STEPS,
        guidance=1.0, sampler=sampler, negative=stack.encode_text([""]), batch_size=batch_size, time_dependent=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_picture_follows_from_its_seed(name, stack) -> None:
    """In batches of 1 and 8, and twice, whatever the global random state is; or the scheduler is refused in a line."""
    try:
        sampler = Sampler(name, STEPS, 1.0, {})
        torch.manual_seed(1)
        together = pictures(stack, sampler, [0, 1, 2], 8)
    except UserError as error:
        assert name in str(error) and "\n" not in str(error)
        return
    torch.manual_seed(2)
    assert torch.equal(together, pictures(stack, sampler, [0, 1, 2], 8))
    single = pictures(stack, sampler, [0, 1, 2], 1)
    torch.testing.assert_close(together, single, atol=0 if sampler.adds_noise else 1e-4, rtol=0)
    assert together.std(0).max() > 1e-3, "other seeds, other pictures"


def test_the_common_ones_draw() -> None:
    for name in ("DDIMScheduler", "PNDMScheduler", "UniPCMultistepScheduler", "DPMSolverMultistepScheduler"):
        assert not Sampler(name, 4, 7.5, {}).adds_noise
    for name in ("DDPMScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler"):
        assert Sampler(name, 4, 7.5, {}).adds_noise
    assert Sampler("DPMSolverMultistepScheduler", 4, 7.5, {"algorithm_type": "sde-dpmsolver++"}).adds_noise


def test_noise_continues_the_stream_of_the_start_noise(stack) -> None:
    """As a diffusers pipeline with one generator per picture: the same generator draws start and steps."""
    sampler = Sampler("EulerAncestralDiscreteScheduler", STEPS, 1.0, {})
    scheduler = sampler.build(stack, STEPS)
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(1, *stack.latent_shape, generator=generator) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        prediction = torch.sin(scheduler.scale_model_input(latents, t))
        latents = scheduler.step(prediction, t, latents, generator=generator).prev_sample
    expected = stack.decode(latents).div(2).add(0.5).clamp(0, 1)
    torch.testing.assert_close(pictures(stack, sampler, [5], 1), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "options", "steps", "message"),
    [
        ("DDIMSheduler", {}, 4, "Did you mean DDIMScheduler"),
        ("Scheduler", {}, 4, "is not in diffusers"),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, 4, None),
        ("DPMSolverMultistepScheduler", {"use_karas_sigmas": True}, 4, "no option of .* use_karras_sigmas"),
        ("DDIMScheduler", {"timestep_spacing": "nope"}, 4, "cannot draw with this model in 4 steps"),
        ("DDIMScheduler", {}, 0, "out of range"),
    ],
)
def test_mistakes_are_one_line(name, options, steps, message) -> None:
    if message is None:
        Sampler(name, steps, 7.5, options)
        return
    with pytest.raises(UserError, match=message) as caught:
        Sampler(name, steps, 7.5, options)
    assert "\n" not in str(caught.value)


def test_noise_from_elsewhere_is_refused(monkeypatch) -> None:
    """A scheduler without a generator of its own that draws from the global state."""

    class Noisy(diffusers.DDIMScheduler):
        def step(self, model_output, timestep, sample, return_dict=True):  # no generator
            return (super().step(model_output, timestep, sample).prev_sample + torch.randn_like(sample),)

    monkeypatch.setattr(diffusers, "NoisyScheduler", Noisy, raising=False)
    with pytest.raises(UserError, match="does not follow from a picture's seed"):
        Sampler("NoisyScheduler", 4, 7.5, {})
