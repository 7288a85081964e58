"""Stage unet: Stable Diffusion's U-Net with 16 cross-attention layers, trained on cached latents; its mean is kept."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from hiperlab.errors import UserError
from hiperlab.hub import first_line
from hiperlab.model.noise import SCHEDULE, add_noise, sample_posterior
from hiperlab.world.train import clip, latents, words
from hiperlab.world.train import vae as stage_vae
from hiperlab.world.train.fit import train
from hiperlab.world.train.keys import normals, rows, stream
from hiperlab.world.train.module import Fit, StageModule, freeze
from hiperlab.world.train.pictures import Pictures
from hiperlab.world.train.plan import Workshop


def snr_weight(alpha_bar: Tensor, gamma: float | None) -> Tensor:
    """Weight of the epsilon loss by signal-to-noise ratio (min-SNR, Hang et al. 2023, section 3.4): (B,) -> (B,).

    Args:
        alpha_bar: share of signal variance left at t, in (0, 1).
        gamma: largest ratio that counts (5 in the paper); None weighs all timesteps alike, as Stable Diffusion did.
    """
    if gamma is None:
        return torch.ones_like(alpha_bar)
    ratio = alpha_bar / (1 - alpha_bar)
    return ratio.clamp(max=gamma) / ratio


def ema_decay(step: int, largest: float) -> float:
    """How much of the mean stays after a step: short memory first, so that the random start is forgotten."""
    return min(largest, (step + 1) / (step + 10))


def build(side: int, width: int, channels: Sequence[int], heads: int, groups: int) -> UNet2DConditionModel:
    """Stable Diffusion's U-Net with other widths: 16 cross-attention layers.

    Args:
        side: of the latents, at least 8.
        width: of the text states.
        channels: four.
        heads: of every attention.
        groups: of every norm.
    """
    return UNet2DConditionModel(
        sample_size=side, block_out_channels=list(channels), layers_per_block=2, attention_head_dim=heads,
        cross_attention_dim=width, norm_num_groups=groups,
    )  # fmt: skip


def begin_with(unet: Any, folder: str) -> None:
    """Copy weights from a diffusers folder, e.g. of a U-Net trained on an earlier autoencoder's latents.

    Raises:
        UserError: there is no U-Net, or one of other sizes.
    """
    try:
        earlier: Any = UNet2DConditionModel.from_pretrained(folder, local_files_only=True)
        unet.load_state_dict(earlier.state_dict())
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"unet.start={folder} holds no U-Net of these sizes ({first_line(error)}).") from error


class UnetModule(StageModule):
    """The denoiser with its loss and its running mean.

    Args:
        fit, seed: as in StageModule.
        unet: the network; `ema` is its running mean.
        text: the frozen text tower.
        moments: posteriors of the latents (N, 8, h, w).
        ids: token ids (N, wordings, 77).
        empty: token ids of the empty prompt (77,).
        dropout: share of captions left empty, for classifier-free guidance.
        gamma: of min-SNR, or None.
        decay: of the running mean.
        centred: whether the error counts more in the middle, where subjects stand; the best prediction stays the same,
            but a short training spends itself on subjects rather than on skies.
    """

    alpha_bar: Tensor
    middle: Tensor

    def __init__(
        self,
        fit: Fit,
        seed: int,
        *,
        unet: Any,
        text: Any,
        moments: Tensor,
        ids: Tensor,
        empty: Tensor,
        dropout: float,
        gamma: float | None,
        decay: float,
        centred: bool,
    ) -> None:
        super().__init__(fit, seed)
        self.unet = unet.to(memory_format=torch.channels_last)
        self.ema: Any = freeze(copy.deepcopy(unet))
        self.text = text
        self.moments, self.ids, self.empty = moments, ids, empty
        self.dropout, self.gamma, self.decay = dropout, gamma, decay
        self.register_buffer("alpha_bar", DDPMScheduler.from_config(SCHEDULE).alphas_cumprod.float(), persistent=False)

        middle = stage_vae.centre(*moments.shape[2:]) if centred else torch.ones(*moments.shape[2:])
        self.register_buffer("middle", middle, persistent=False)

    def frozen_parts(self) -> tuple[str, ...]:
        """The text tower."""
        return ("text",)

    def _states(self, ids: Tensor) -> Tensor:
        return self.text(input_ids=ids).last_hidden_state

    def _predict(self, noisy: Tensor, timestep: Tensor, states: Tensor) -> Tensor:
        return self.unet(noisy, timestep, encoder_hidden_states=states).sample

    def captions(self, chosen: Tensor, step: int) -> Tensor:
        """One wording's token ids (B, 77) of each row, some of them empty."""
        which = rows(self.seed, "unet wording", step, self.ids.shape[1], len(chosen)).to(self.ids.device)
        dropped = torch.rand(len(chosen), 1, generator=stream(self.seed, "unet drop", step)) < self.dropout
        ids = self.ids[chosen.to(self.ids.device), which].long()
        return torch.where(dropped.to(ids.device), self.empty.to(ids.device), ids)

    def loss(self, step: int) -> Tensor:
        """Mean squared error of the predicted noise (Ho et al. 2020, eq. 14)."""
        batch = self.fit_settings.batch
        chosen = rows(self.seed, "unet", step, len(self.moments), batch)
        moments = self.moments[chosen.to(self.moments.device)]
        shape = (batch, 4, *moments.shape[2:])
        z0 = sample_posterior(moments, normals(self.seed, "unet latent", step, shape, self.device))
        noise = normals(self.seed, "unet noise", step, shape, self.device)
        timestep = rows(self.seed, "unet timestep", step, len(self.alpha_bar), batch).to(self.device)
        with torch.no_grad():
            states = self.fast("states", self._states)(self.captions(chosen, step))
        alpha_bar = self.alpha_bar[timestep]
        noisy = add_noise(z0, noise, alpha_bar).contiguous(memory_format=torch.channels_last)
        predicted = self.fast("predict", self._predict)(noisy, timestep, states)
        error = ((predicted.float() - noise).square() * self.middle).mean((1, 2, 3))
        return (snr_weight(alpha_bar, self.gamma) * error).mean()

    def optimizer_step(self, epoch: int, batch_idx: int, *args: Any, **kwargs: Any) -> None:
        """Step, then move the mean; here because a checkpoint is written before the batch's own hook is called."""
        step = self.global_step
        super().optimizer_step(epoch, batch_idx, *args, **kwargs)
        with torch.no_grad():
            share = 1 - ema_decay(step, self.decay)
            torch._foreach_lerp_(list(self.ema.parameters()), [p.detach() for p in self.unet.parameters()], share)


@torch.no_grad()
def held_out_loss(module: UnetModule, vae: Any, pictures: Pictures, tokenizer: Any, most: int) -> float:
    """Noise error of the mean on held-out pictures, at timesteps spread evenly, always with the same noise."""
    count = min(len(pictures), most)
    ids = pictures.tokens(tokenizer)[:, 0].long()
    total = 0.0
    for index, part in enumerate(torch.arange(count).split(64)):
        z0 = latents.encode(vae, pictures.batch(part))[:, :4]
        noise = normals(0, "unet check", index, tuple(z0.shape), module.device)
        timestep = ((part * 1000 + 500) // count).to(module.device)
        noisy = add_noise(z0, noise, module.alpha_bar[timestep])
        states = module._states(ids[part.to(ids.device)])
        predicted = module.ema(noisy, timestep, encoder_hidden_states=states).sample
        total += float((predicted.float() - noise).square().mean((1, 2, 3)).sum())
    return total / count


def work(
    shop: Workshop,
    *,
    fit: dict[str, Any],
    channels: list[int],
    heads: int,
    groups: int,
    dropout: float,
    min_snr_gamma: float | None,
    ema: float,
    centred: bool,
    start: str | None,
    check_pictures: int,
) -> dict[str, Any]:
    """The stage.

    Raises:
        UserError: `start` names no U-Net of these sizes.
    """
    tokenizer = words.load(shop.weights("tokenizer"))
    text = clip.load_text(shop)
    main = Pictures(shop.folder("data") / "main", shop.device)
    torch.manual_seed(shop.seed + 2)
    unet = build(shop.size // 8, text.config.hidden_size, channels, heads, groups)
    if start is not None:
        begin_with(unet, start)
    module = UnetModule(
        Fit(**fit),
        shop.seed,
        unet=unet,
        text=text,
        moments=latents.load(shop),
        ids=main.tokens(tokenizer),
        empty=torch.from_numpy(words.encode(tokenizer, [""]))[0],
        dropout=dropout,
        gamma=min_snr_gamma,
        decay=ema,
        centred=centred,
    )
    outcome = train(shop, "unet", module)
    module.float().to(shop.device)
    module.ema.save_pretrained(shop.weights("unet"))
    held = Pictures(shop.folder("data") / "held", shop.device)
    loss = held_out_loss(module, stage_vae.load(shop), held, tokenizer, check_pictures)
    return outcome | {"check": {"held_out_loss": round(loss, 5), "pictures": min(len(held), check_pictures)}}
