"""The forward diffusion and what the U-Net is asked to predict.

Axes: B batch, C latent channels (4), H, W latent sides. Everything here is float32: in half precision, as in HiPer's
train.py, sqrt(1 - alpha_bar) is 7 % off at the first timesteps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from hiperlab import draws
from hiperlab.errors import UserError

SCHEDULE = {  # Stable Diffusion 1.x's, as a diffusers scheduler config: scaled linear betas over 1000 steps
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "prediction_type": "epsilon",
}
LATENTS = ("sample_once", "mean", "resample")
INVERTED = LATENTS[:2]  # an inversion is made once
LOGVAR_RANGE = (-30.0, 20.0)  # as in latent diffusion's DiagonalGaussianDistribution


def alphas_cumprod(schedule: Mapping[str, Any] = SCHEDULE) -> Tensor:
    """Share of signal variance left at every timestep of a schedule (1000,), alpha-bar in Ho et al. 2020."""
    return DDPMScheduler.from_config(dict(schedule)).alphas_cumprod.float()


def sample_posterior(moments: Tensor, noise: Tensor) -> Tensor:
    """Draw z (B, C, H, W) from the VAE's posterior (Kingma & Welling 2014, eq. 10), unscaled.

    Args:
        moments: (B, 2C, H, W), mean and log-variance stacked along channels.
        noise: unit normal (B, C, H, W).
    """
    mean, logvar = moments.float().chunk(2, dim=1)
    return mean + torch.exp(0.5 * logvar.clamp(*LOGVAR_RANGE)) * noise


def check_latent(latent: str, known: Sequence[str] = LATENTS) -> str:
    """The choice itself.

    Raises:
        UserError: it is none of `known`.
    """
    if latent not in known:
        raise UserError(f"method.latent={latent!r} is unknown. Choose {', '.join(known)}.")
    return latent


def posterior_noise(latent: str, seed: int, view: Tensor, sample: Tensor, shape: Sequence[int]) -> Tensor:
    """Unit normals (R, *shape) for mean + std * noise (Kingma & Welling 2014, eq. 10).

    Args:
        latent: how often a picture's latents are drawn; edit methods differ in it. "sample_once" draws once per
            picture and keeps it (HiPer's train.py, ShivamShrirao's train_imagic.py), "mean" is zeros, "resample"
            draws anew for every sample.
        seed: the run's.
        view: (R,) number of the picture.
        sample: (R,) global sample number.
        shape: of one row's latents.
    """
    if latent == "mean":
        return torch.zeros(len(view), *shape)
    return draws.normal(seed, "posterior", view if latent == "sample_once" else sample, shape)


def add_noise(z0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Diffuse clean latents to their timestep, z_t (B, C, H, W) (DDPM, Ho et al. 2020, eq. 4).

    Args:
        z0: clean latents (B, C, H, W), already multiplied by the VAE's scaling factor.
        noise: unit normal, same shape.
        alpha_bar: share of signal variance left at t, in (0, 1), shape (B,).
    """
    a = alpha_bar[:, None, None, None]
    return a.sqrt() * z0 + (1 - a).sqrt() * noise


def target(z0: Tensor, noise: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """What the U-Net should predict: the noise, or the velocity (Salimans & Ho 2022, section 4), (B, C, H, W).

    Args:
        z0: clean latents (B, C, H, W), scaled.
        noise: unit normal, same shape.
        alpha_bar: share of signal variance left at t, in (0, 1), shape (B,).
        prediction_type: "epsilon" or "v_prediction".

    Raises:
        ValueError: the scheduler names another prediction type.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        a = alpha_bar[:, None, None, None]
        return a.sqrt() * noise - (1 - a).sqrt() * z0
    raise ValueError(f"prediction_type={prediction_type!r} is not supported. Choose epsilon or v_prediction.")
