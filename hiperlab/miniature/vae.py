"""Stage vae: Stable Diffusion's autoencoder (factor 8, 4 channels), narrow, without adversary or learnt perception."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from hiperlab.miniature import record
from hiperlab.miniature.fit import train
from hiperlab.miniature.keys import normals, rows
from hiperlab.miniature.module import Fit, StageModule, freeze
from hiperlab.miniature.pictures import Pictures
from hiperlab.miniature.plan import Workshop

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


def kl_to_unit_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence of diagonal Gaussians from the unit one, per picture (Kingma & Welling 2014, appendix B): (B,)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum((1, 2, 3))


def psnr(picture: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, per picture (B,); pictures (B, 3, H, W) in [-1, 1], so the peak is 2."""
    error = (picture.clamp(-1, 1) - target).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / error.clamp(min=1e-10))


def build(size: int, channels: Sequence[int], layers: int, groups: int) -> AutoencoderKL:
    """Stable Diffusion's autoencoder with other widths."""
    return AutoencoderKL(
        block_out_channels=list(channels), down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=layers, latent_channels=4, norm_num_groups=groups,
        sample_size=size,
    )  # fmt: skip


class VaeModule(StageModule):
    """The autoencoder with its loss.

    Args:
        fit, seed: as in StageModule.
        vae: the network.
        pictures: what it learns from.
        kl: weight of the KL divergence, small: latents must stay finite, not become noise.
    """

    def __init__(self, fit: Fit, seed: int, vae: Any, pictures: Pictures, kl: float) -> None:
        super().__init__(fit, seed)
        self.vae, self.kl = vae.to(memory_format=torch.channels_last), kl
        self.pictures = pictures

    def _pass(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Picture -> reconstruction from a sampled latent, mean, log-variance."""
        mean, log_variance = self.vae.encode(pixels).latent_dist.parameters.chunk(2, dim=1)
        log_variance = log_variance.clamp(-30, 20)  # diffusers' own bounds
        return self.vae.decode(mean + (0.5 * log_variance).exp() * noise).sample, mean, log_variance

    def loss(self, step: int) -> Tensor:
        """Reconstruction and KL of the step's pictures."""
        pixels = self.pictures.batch(rows(self.seed, "vae", step, len(self.pictures), self.fit_settings.batch))
        shape = (len(pixels), 4, pixels.shape[-2] // 8, pixels.shape[-1] // 8)
        noise = normals(self.seed, "vae noise", step, shape, self.device)
        picture, mean, log_variance = self.fast("pass", self._pass)(pixels, noise)
        return (
            pyramid_loss(picture.float(), pixels)
            + self.kl * kl_to_unit_normal(mean.float(), log_variance.float()).mean()
        )


@torch.no_grad()
def whiten(vae: Any, pictures: Pictures, sample: Tensor, batch: int = 64) -> float:
    """Give every latent channel mean 0 and spread 1 by rewriting the two 1x1 convolutions; reconstructions stay.

    The U-Net's noise schedule assumes unit latents; Stable Diffusion corrects the spread by one number only.

    Args:
        vae: changed in place.
        pictures: where the statistics come from.
        sample: rows to look at.
        batch: pictures at a time.

    Returns:
        What is left to scale by (close to 1): the scaling factor to store.
    """
    means = _means(vae, pictures, sample, batch)
    offset, spread = means.mean((0, 2, 3)), means.std((0, 2, 3)).clamp(min=1e-6)
    before, after = vae.quant_conv, vae.post_quant_conv
    assert before is not None and after is not None
    after.bias += after.weight[:, :, 0, 0] @ offset
    after.weight *= spread[None, :, None, None]
    before.bias[:4] = (before.bias[:4] - offset) / spread
    before.weight[:4] /= spread[:, None, None, None]
    before.bias[4:] -= 2 * spread.log()
    return float(1 / _means(vae, pictures, sample, batch).std())


def _means(vae: Any, pictures: Pictures, sample: Tensor, batch: int) -> Tensor:
    parts = [vae.encode(pictures.batch(part)).latent_dist.mean.float() for part in sample.split(batch)]
    return torch.cat(parts)


@torch.no_grad()
def check(vae: Any, pictures: Pictures, most: int) -> dict[str, Any]:
    """PSNR of up to `most` held-out pictures, from the latents' means."""
    values = []
    for part in torch.arange(min(len(pictures), most)).split(32):
        pixels = pictures.batch(part)
        values.append(psnr(vae.decode(vae.encode(pixels).latent_dist.mean).sample.float(), pixels))
    return {"psnr_db": round(float(torch.cat(values).mean()), 3), "pictures": min(len(pictures), most)}


def work(
    shop: Workshop,
    *,
    fit: dict[str, Any],
    channels: list[int],
    layers: int,
    groups: int,
    kl: float,
    check_pictures: int,
) -> dict[str, Any]:
    """The stage: train, whiten, store the scaling factor, measure."""
    main = Pictures(shop.folder("data") / "main", shop.device, shop.cache_pictures)
    torch.manual_seed(shop.seed)
    module = VaeModule(Fit(**fit), shop.seed, build(shop.size, channels, layers, groups), main, kl)
    outcome = train(shop, "vae", module)
    vae: Any = freeze(module.vae.float().to(shop.device))
    factor = whiten(vae, main, rows(shop.seed, "vae whiten", 0, len(main), min(len(main), 2048)))
    vae.register_to_config(scaling_factor=factor)
    vae.save_pretrained(shop.weights("vae"))
    held = Pictures(shop.folder("data") / "held", shop.device)
    return outcome | {"check": check(vae, held, check_pictures) | {"scaling_factor": round(factor, 5)}}


def load(shop: Workshop, stage: str = "vae") -> Any:
    """The trained autoencoder, frozen, on the device; stage "decoder" has the same encoder."""
    vae = AutoencoderKL.from_pretrained(str(shop.weights(stage)), local_files_only=True)
    return freeze(vae.to(shop.device))


def load_last(shop: Workshop) -> Any:
    """The autoencoder with its last decoder: stage "decoder" if it is done, else "vae"."""
    return load(shop, "decoder" if record.done(shop.folder("decoder")) else "vae")
