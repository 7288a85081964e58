"""Stage decoder: the autoencoder's decoder alone learns on, while its latents stay what the U-Net is trained on.

Most of the autoencoder's cost and error lie in its decoder. With the encoder fixed, the latents on disk stay valid, so
this stage may run beside the U-Net's (on a CPU: one core each), and its steps need no encoder. What the conditioning
CLIP's picture tower (never a judge) sees of a picture counts beside its pixels, as LPIPS does in Stable Diffusion.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from hiperlab.miniature import latents
from hiperlab.miniature import vae as stage_vae
from hiperlab.miniature.fit import train
from hiperlab.miniature.keys import normals, rows
from hiperlab.miniature.module import Fit, StageModule, freeze
from hiperlab.miniature.pictures import Pictures, reduced
from hiperlab.miniature.plan import Workshop
from hiperlab.model.noise import sample_posterior


class DecoderModule(StageModule):
    """The decoder with its loss.

    Args:
        fit, seed: as in StageModule.
        vae: the trained autoencoder; only `decoder` and `post_quant_conv` are kept and learn.
        pictures: what it learns from.
        moments: their posteriors (N, 8, h, w), as stage latents left them.
        eye: transformers' CLIP picture tower.
        perceptual: weight of what it sees.
        decibels: weight of `log_squares`.
    """

    def __init__(
        self,
        fit: Fit,
        seed: int,
        *,
        vae: Any,
        pictures: Pictures,
        moments: Tensor,
        eye: Any,
        perceptual: float,
        decibels: float,
    ) -> None:
        super().__init__(fit, seed)
        self.eye, self.perceptual, self.decibels = freeze(eye), perceptual, decibels
        self.decoder = vae.decoder.train().requires_grad_(True).to(memory_format=torch.channels_last)
        self.post_quant_conv = vae.post_quant_conv.train().requires_grad_(True)
        self.scale = vae.config.scaling_factor
        self.pictures, self.moments = pictures, moments

    def frozen_parts(self) -> tuple[str, ...]:
        """The picture tower."""
        return ("eye",)

    def _pass(self, latent: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latent))

    def _seen(self, picture: Tensor) -> list[Tensor]:
        """What the tower's layers make of pictures: (B, N, D) each."""
        network: Any = self.eye
        picture = reduced(picture, network.config.image_size)
        return list(network(pixel_values=picture, output_hidden_states=True).hidden_states[1:])

    def loss(self, step: int) -> Tensor:
        """Reconstruction of the step's pictures from sampled latents."""
        chosen = rows(self.seed, "decoder", step, len(self.moments), self.fit_settings.batch)
        moments = self.moments[chosen.to(self.moments.device)].float()
        shape = (len(chosen), 4, *moments.shape[2:])
        target = self.pictures.batch(chosen)
        noise = normals(self.seed, "decoder noise", step, shape, self.device)
        latent = sample_posterior(moments, noise) / self.scale
        picture = self.fast("pass", self._pass)(latent.contiguous(memory_format=torch.channels_last))
        loss = stage_vae.pyramid_loss(picture.float(), target) + self.decibels * log_squares(picture.float(), target)
        if self.perceptual:
            with torch.no_grad():
                wanted = self._seen(target)
            loss = loss + self.perceptual * layer_distance(self._seen(picture), wanted)
        return loss


def log_squares(picture: Tensor, target: Tensor) -> Tensor:
    """Mean over pictures of ln(mean squared error), (B, 3, H, W) twice -> a number; 1 of it is 4.34 dB of PSNR.

    Squares alone are ruled by the few pictures nobody can restore (halftone dots); here every picture counts alike.
    """
    return (picture - target).square().mean((1, 2, 3)).clamp(min=1e-6).log().mean()


def layer_distance(found: list[Tensor], wanted: list[Tensor]) -> Tensor:
    """1 - cosine of tokens, the mean over layers and tokens: lists of (B, N, D) -> a number."""
    parts = [1 - F.cosine_similarity(a.float(), b.float(), dim=-1).mean() for a, b in zip(found, wanted, strict=True)]
    return torch.stack(parts).mean()


def work(
    shop: Workshop,
    *,
    fit: dict[str, Any],
    perceptual: float,
    decibels: float,
    check_pictures: int,
) -> dict[str, Any]:
    """The stage; leaves the whole autoencoder."""
    vae = stage_vae.load(shop)
    main = Pictures(shop.folder("data") / "main", shop.device, shop.cache_pictures)
    eye: Any = CLIPVisionModelWithProjection.from_pretrained(
        str(shop.weights("clip") / "image_encoder"), local_files_only=True
    )
    module = DecoderModule(
        Fit(**fit), shop.seed, vae=vae, pictures=main, moments=latents.load(shop), eye=eye.to(shop.device),
        perceptual=perceptual, decibels=decibels,
    )  # fmt: skip
    outcome = train(shop, "decoder", module)
    freeze(module.float().to(shop.device))
    vae.save_pretrained(shop.weights("decoder"))  # the module trained its parts in place
    held = Pictures(shop.folder("data") / "held", shop.device)
    return outcome | {"check": stage_vae.check(vae, held, check_pictures)}
