"""How far predicted noise is from white noise, and steps that bring it nearer (Parmar et al. 2023, section 3).

As auto_corr_loss and kl_divergence of pix2pix-zero's src/utils/ddim_inv.py (pix2pixzero/pix2pix-zero).
Axes: C latent channels, H, W latent sides, K levels of the pyramid, M outer and N inner rounds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST = 8  # side of the last level of the pyramid
PUBLISHED = 4 * 64 * 64  # numbers of the latents that the published weights are for


def sides(side: int) -> list[int]:
    """Sides of the pyramid's levels, each half the one before; the last is the first of at most 8."""
    found = [side]
    while found[-1] > SMALLEST:
        found.append(found[-1] // 2)
    return found


def autocorrelation(noise: Tensor, rolls: Tensor) -> Tensor:
    """Squared correlations of noise with itself rolled by rows and by columns, summed over channels and levels, 0-d.

    Args:
        noise: (C, H, W).
        rolls: (C, K) int64, by how many pixels, on both axes.
    """
    total = noise.new_zeros(())
    for level, shifts in enumerate(rolls.to(noise.device).unbind(1)):
        if level:
            noise = F.avg_pool2d(noise, 2)
        for axis in (1, 2):
            places = (torch.arange(noise.shape[axis], device=noise.device) - shifts[:, None]) % noise.shape[axis]
            rolled = noise.gather(axis, places.unsqueeze(3 - axis).expand_as(noise))
            total = total + (noise * rolled).mean((1, 2)).square().sum()
    return total


def divergence(noise: Tensor) -> Tensor:
    """Twice the divergence of a normal with the noise's mean and variance from the unit normal, 0-d; any shape."""
    variance = noise.var()
    return variance + noise.mean() ** 2 - 1 - torch.log(variance + 1e-7)


def whitened(noise: Tensor, rolls: Tensor, lambda_ac: float, lambda_kl: float) -> Tensor:
    """Predicted noise (C, H, W) after M rounds: N steps down the autocorrelation, then one down the divergence.

    Both gradients fall with the number of elements, so that weights are scaled by it: they mean what they do at
    4 x 64 x 64.

    Args:
        noise: (C, H, W).
        rolls: (M, N, C, K).
        lambda_ac: of the autocorrelation, shared by the N steps of a round; 0 for none.
        lambda_kl: of the divergence; 0 for none.
    """
    scale = noise.numel() / PUBLISHED
    for round_ in rolls:
        for each in round_ if lambda_ac else ():
            rate = scale * lambda_ac / len(round_)
            noise = noise - rate * _gradient(lambda e, each=each: autocorrelation(e, each), noise)  # type: ignore[misc]
        if lambda_kl:
            noise = noise - scale * lambda_kl * _gradient(divergence, noise)
    return noise


def _gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    with torch.enable_grad():
        at = at.detach().requires_grad_()
        return torch.autograd.grad(loss(at), at)[0]
