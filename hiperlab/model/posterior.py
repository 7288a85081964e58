"""How often a picture's latents are drawn from the VAE's posterior; edit methods differ in it. Axis: R rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hiperlab import draws
from hiperlab.errors import UserError

CHOICES = ("sample_once", "mean", "resample")


def check_latent(latent: str) -> str:
    """The choice itself.

    Raises:
        UserError: it is none of `CHOICES`.
    """
    if latent not in CHOICES:
        raise UserError(f"method.latent={latent!r} is unknown. Choose {', '.join(CHOICES)}.")
    return latent


def posterior_noise(latent: str, seed: int, view: Tensor, sample: Tensor, shape: Sequence[int]) -> Tensor:
    """Unit normals (R, *shape) for mean + std * noise (Kingma & Welling 2014, eq. 10).

    Args:
        latent: "sample_once" draws once per picture and keeps it (HiPer's train.py, ShivamShrirao's train_imagic.py),
            "mean" is zeros, "resample" draws anew for every sample.
        seed: the run's.
        view: (R,) number of the picture.
        sample: (R,) global sample number.
        shape: of one row's latents.
    """
    if latent == "mean":
        return torch.zeros(len(view), *shape)
    return draws.normal(seed, "posterior", view if latent == "sample_once" else sample, shape)
