"""Stage decoder: the autoencoder's decoder learns on, while its latents stay what the U-Net is trained on.

Most of the autoencoder's cost and error lie in its decoder. With the encoder fixed, the latents on disk stay valid, so
this stage may run beside the U-Net's (on a CPU: one core each), and its steps need no encoder.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hiperlab.miniature import latents
from hiperlab.miniature.fit import train
from hiperlab.miniature.keys import normals, rows
from hiperlab.miniature.module import Fit, StageModule
from hiperlab.miniature.parts import freeze, load_autoencoder
from hiperlab.miniature.pictures import Pictures
from hiperlab.miniature.plan import Workshop
from hiperlab.model.noise import sample_posterior

SCALES = 4
SQUARES, EDGES = 10.0, 0.25  # weights beside that of L1


@functools.cache
def centre(height: int, width: int, gain: float = 3.0) -> Tensor:
    """Weights (height, width) of mean 1, `gain` times as large in the middle, where subjects stand, as at the rim."""
    y, x = (torch.linspace(-1, 1, side) for side in (height, width))
    weights = 1 + (gain - 1) * torch.exp(-(y[:, None].square() + x[None].square()) / (2 * 0.45**2))
    return weights / weights.mean()


def pyramid_loss(picture: Tensor, target: Tensor) -> Tensor:
    """Distances of values and of edges at four sizes; edges stand in for LPIPS, which would need foreign weights.

    The squares come first: they bring colours and large shapes into the latents, and edges alone would leave subjects
    gray. L1 keeps thin strokes.

    Args:
        picture: (B, 3, H, W) in [-1, 1], H and W divisible by 8.
        target: the same.
    """
    difference = (picture - target) * centre(picture.shape[-2], picture.shape[-1]).to(picture)
    loss = difference.abs().mean() + SQUARES * (difference * (picture - target)).mean()
    for scale in range(SCALES):
        if scale:
            difference = F.avg_pool2d(difference, 2)
        loss = loss + EDGES * (difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean())
    return loss


def psnr(picture: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, per picture (B,); pictures (B, 3, H, W) in [-1, 1], so the peak is 2."""
    error = (picture.clamp(-1, 1) - target).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / error.clamp(min=1e-10))


def log_squares(picture: Tensor, target: Tensor) -> Tensor:
    """Mean over pictures of ln(mean squared error), (B, 3, H, W) twice -> a number; 1 of it is 4.34 dB of PSNR.

    Squares alone are ruled by the few pictures nobody can restore (halftone dots); here every picture counts alike.
    """
    return (picture - target).square().mean((1, 2, 3)).clamp(min=1e-6).log().mean()


class DecoderModule(StageModule):
    """The decoder with its loss.

    Args:
        fit, seed: as in StageModule.
        vae: the autoencoder; only `decoder` and `post_quant_conv` are kept and learn.
        pictures: what it learns from.
        moments: their posteriors (N, 8, h, w), as stage latents left them.
        decibels: weight of `log_squares`.
    """

    def __init__(self, fit: Fit, seed: int, *, vae: Any, pictures: Pictures, moments: Tensor, decibels: float) -> None:
        super().__init__(fit, seed)
        self.decibels = decibels
        self.decoder = vae.decoder.train().requires_grad_(True).to(memory_format=torch.channels_last)
        self.post_quant_conv = vae.post_quant_conv.train().requires_grad_(True)
        self.scale = vae.config.scaling_factor
        self.pictures, self.moments = pictures, moments

    def _pass(self, latent: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latent))

    def loss(self, step: int) -> Tensor:
        """Reconstruction of the step's pictures from sampled latents."""
        chosen = rows(self.seed, "decoder", step, len(self.moments), self.fit_settings.batch)
        moments = self.moments[chosen.to(self.moments.device)].float()
        shape = (len(chosen), 4, *moments.shape[2:])
        target = self.pictures.batch(chosen)
        latent = sample_posterior(moments, normals(self.seed, "decoder noise", step, shape, self.device)) / self.scale
        picture = self.fast("pass", self._pass)(latent.contiguous(memory_format=torch.channels_last)).float()
        return pyramid_loss(picture, target) + self.decibels * log_squares(picture, target)


@torch.no_grad()
def check(vae: Any, pictures: Pictures, most: int) -> dict[str, Any]:
    """PSNR of up to `most` held-out pictures, from the latents' means."""
    values = []
    for part in torch.arange(min(len(pictures), most)).split(32):
        pixels = pictures.batch(part)
        values.append(psnr(vae.decode(vae.encode(pixels).latent_dist.mean).sample.float(), pixels))
    return {"psnr_db": round(float(torch.cat(values).mean()), 3), "pictures": min(len(pictures), most)}


def work(shop: Workshop, *, fit: dict[str, Any], decibels: float, check_pictures: int) -> dict[str, Any]:
    """The stage; leaves the whole autoencoder."""
    vae = load_autoencoder(shop)
    main = Pictures(shop.folder("data") / "main", shop.device, shop.cache_pictures)
    module = DecoderModule(Fit(**fit), shop.seed, vae=vae, pictures=main, moments=latents.load(shop), decibels=decibels)
    outcome = train(shop, "decoder", module)
    freeze(module.float().to(shop.device))
    vae.save_pretrained(shop.weights("decoder"))  # the module trained its parts in place
    held = Pictures(shop.folder("data") / "held", shop.device)
    return outcome | {"check": check(vae, held, check_pictures)}
