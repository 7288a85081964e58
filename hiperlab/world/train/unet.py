"""Stage unet: Stable Diffusion's U-Net with 16 cross-attention layers, trained on cached latents; its mean is kept."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from hiperlab.errors import UserError
from hiperlab.hub import first_line
from hiperlab.model.noise import add_noise, alphas_cumprod, sample_posterior
from hiperlab.world.train import clip, critic, latents, words
from hiperlab.world.train import vae as stage_vae
from hiperlab.world.train.fit import train
from hiperlab.world.train.keys import normals, rows, stream
from hiperlab.world.train.module import Fit, StageModule, freeze
from hiperlab.world.train.pictures import Pictures
from hiperlab.world.train.plan import Workshop
from hiperlab.world.words import KINDS


def snr_weight(alpha_bar: Tensor, gamma: float | None, power: float = 0.0) -> Tensor:
    """Weight of the epsilon loss by signal-to-noise ratio (min-SNR, Hang et al. 2023, section 3.4): (B,) -> (B,).

    Args:
        alpha_bar: share of signal variance left at t, in (0, 1).
        gamma: largest ratio that counts (5 in the paper); None = no limit.
        power: how much more high noise counts, alpha_bar ** -power: 0 weighs all errors of epsilon alike, as Stable
            Diffusion did; 1 all errors of the velocity (Salimans & Ho 2022, section 4).
    """
    weight = alpha_bar**-power
    if gamma is None:
        return weight
    return torch.minimum(weight, gamma * (1 - alpha_bar) / alpha_bar)


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


CONTRAST_UNTIL = 850  # timestep; beyond it the critic has next to nothing to say
WHITENED = 512  # captions that the whitening of text states looks at


@dataclass(frozen=True)
class Contrast:
    """What another kind's word should change in the predicted noise, as the critic knows it.

    Attributes:
        weight: of the squared distance from it, at least 0.
        gain: by how much the change should be larger than it is in the world; 1 = as in the world.
        critic: reads kinds from noisy latents (`critic.Critic`), frozen.
        kinds: of the pictures (N,), row numbers of `tokens`.
        tokens: the kinds' token ids (K,), one each.
    """

    weight: float
    gain: float
    critic: Any
    kinds: Tensor
    tokens: Tensor

    def swap(self, ids: Tensor, own: Tensor, other: Tensor) -> Tensor:
        """Token ids (B, 77) with the words of other kinds (B,) in place of their own (B,)."""
        return torch.where(ids == self.tokens[own][:, None], self.tokens[other][:, None], ids)

    def change(self, noisy: Tensor, alpha_bar: Tensor, own: Tensor, other: Tensor) -> Tensor:
        """Noise predicted for the own kind less that for another: (B, 4, h, w), (B,), (B,), (B,) -> (B, 4, h, w).

        The noise predicted for a caption is the score times -sqrt(1 - alpha_bar), and by Bayes the scores of two
        captions differ by a classifier's gradient (Dhariwal & Nichol 2021, eq. 11 to 14). So the difference has a
        target without what no caption can know, in which the error of either prediction drowns it.
        """
        slope = critic.log_ratio_slope(self.critic, noisy, alpha_bar, own, other)
        return -self.gain * (1 - alpha_bar).sqrt()[:, None, None, None] * slope


def whitening(deviations: Tensor, most: float) -> Tensor:
    """A symmetric matrix (D, D) that makes the directions of text states equally wide, as far as `most` allows.

    How fast a network learns to tell two words apart goes with the square of the distance of their states, and a CLIP
    trained for minutes leaves some words close together. The states are therefore multiplied by this matrix while the
    U-Net trains, and its keys and values by the inverse; `fold` undoes both, so the U-Net that ships takes the states
    as they are. What can be learnt stays the same, only the order in which it is learnt changes (preconditioning).

    Args:
        deviations: states less their mean (N, D).
        most: largest gain; the widest direction keeps its width.
    """
    spread, directions = torch.linalg.eigh(deviations.T.double() @ deviations.double() / len(deviations))
    width = spread.clamp(min=0).sqrt()
    gain = (width.max() / width.clamp(min=1e-6)).clamp(max=most)
    return (directions * gain @ directions.T).float()


@torch.no_grad()
def deviations(text: Any, ids: Tensor) -> Tensor:
    """What the states (N, D) of captions (pictures, wordings, 77) say beyond their position, on the CPU."""
    some = ids[:: max(1, len(ids) // WHITENED), 0].long()
    states = torch.cat([text.to(ids.device)(input_ids=part).last_hidden_state for part in some.split(64)]).float().cpu()
    return (states - states.mean(0)).flatten(0, 1)


@torch.no_grad()
def fold(unet: Any, matrix: Tensor) -> None:
    """Multiply what every cross-attention does with the text states by a matrix (D, D), from the right."""
    for name, module in unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            module.weight.copy_((module.weight.double() @ matrix.to(module.weight.device).double()).float())


class UnetModule(StageModule):
    """The denoiser with its loss and its running mean.

    Args:
        fit, seed: as in StageModule.
        unet: the network; `ema` is its running mean.
        text: the frozen text tower.
        moments: posteriors of the latents (N, 8, h, w), those of the calm pictures last.
        ids: token ids (N, wordings, 77).
        calm: how many of them are calm.
        calm_share: share of every batch that is taken from those; the rest is taken from the others.
        empty: token ids of the empty prompt (77,).
        dropout: share of captions left empty, for classifier-free guidance.
        gamma, power: of `snr_weight`.
        decay: of the running mean.
        centred: whether the error counts more in the middle, where subjects stand; the best prediction stays the same,
            but a short training spends itself on subjects rather than on skies.
        contrast: with captions of other kinds, or None. A step then costs up to twice as much.
        white: of `whitening`, or None. Until `unwhiten`, the U-Net and its mean take whitened states.
    """

    alpha_bar: Tensor
    middle: Tensor
    white: Tensor | None

    def __init__(
        self,
        fit: Fit,
        seed: int,
        *,
        unet: Any,
        text: Any,
        moments: Tensor,
        ids: Tensor,
        calm: int,
        calm_share: float,
        empty: Tensor,
        dropout: float,
        gamma: float | None,
        power: float,
        decay: float,
        centred: bool,
        contrast: Contrast | None = None,
        white: Tensor | None = None,
    ) -> None:
        super().__init__(fit, seed)
        if white is not None:
            fold(unet, torch.linalg.inv(white.double()))
        self.register_buffer("white", white, persistent=False)
        self.unet = unet.to(memory_format=torch.channels_last)
        self.ema: Any = freeze(copy.deepcopy(unet))
        self.text = text
        self.moments, self.ids, self.empty = moments, ids, empty
        self.calm, self.calm_rows = calm, round(calm_share * fit.batch)  # a step's first rows are calm
        self.contrast = contrast
        self.dropout, self.gamma, self.power, self.decay = dropout, gamma, power, decay
        self.register_buffer("alpha_bar", alphas_cumprod(), persistent=False)

        middle = stage_vae.centre(*moments.shape[2:]) if centred else torch.ones(*moments.shape[2:])
        self.register_buffer("middle", middle, persistent=False)

    def frozen_parts(self) -> tuple[str, ...]:
        """The text tower."""
        return ("text",)

    def _states(self, ids: Tensor) -> Tensor:
        states = self.text(input_ids=ids).last_hidden_state
        return states if self.white is None else states @ self.white

    def unwhiten(self) -> None:
        """From here on the U-Net and its mean take the text tower's states as they are."""
        if self.white is not None:
            fold(self.unet, self.white)
            fold(self.ema, self.white)
            self.white = None

    def _predict(self, noisy: Tensor, timestep: Tensor, states: Tensor) -> Tensor:
        return self.unet(noisy, timestep, encoder_hidden_states=states).sample

    def choose(self, step: int) -> Tensor:
        """The step's rows (B,): the calm ones first."""
        batch = self.fit_settings.batch
        calm, others = self.calm_rows, len(self.moments) - self.calm
        chosen = rows(self.seed, "unet", step, others, batch - calm)
        if calm:
            chosen = torch.cat([others + rows(self.seed, "unet calm", step, self.calm, calm), chosen])
        return chosen

    def captions(self, chosen: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """One wording's token ids (B, 77) of each row, some of them empty, and which are not empty (B,)."""
        which = rows(self.seed, "unet wording", step, self.ids.shape[1], len(chosen)).to(self.ids.device)
        dropped = torch.rand(len(chosen), 1, generator=stream(self.seed, "unet drop", step)) < self.dropout
        dropped = dropped.to(self.ids.device)
        ids = self.ids[chosen.to(self.ids.device), which].long()
        return torch.where(dropped, self.empty.to(ids.device), ids), ~dropped[:, 0]

    def loss(self, step: int) -> Tensor:
        """Mean squared error of the predicted noise (Ho et al. 2020, eq. 14), and what the critic teaches."""
        batch = self.fit_settings.batch
        chosen = self.choose(step)
        moments = self.moments[chosen.to(self.moments.device)]
        shape = (batch, 4, *moments.shape[2:])
        z0 = sample_posterior(moments, normals(self.seed, "unet latent", step, shape, self.device))
        noise = normals(self.seed, "unet noise", step, shape, self.device)
        timestep = rows(self.seed, "unet timestep", step, len(self.alpha_bar), batch).to(self.device)
        alpha_bar = self.alpha_bar[timestep]
        noisy = add_noise(z0, noise, alpha_bar)
        ids, said = self.captions(chosen, step)
        if self.contrast is None:
            error = self._error(self._denoise(noisy, timestep, ids), noise)
        else:
            known = self.calm_rows if self.calm else batch  # the first rows are like the critic's
            own = self.contrast.kinds[chosen[:known].to(self.contrast.kinds.device)]
            count = len(self.contrast.tokens)
            other = (own + 1 + rows(self.seed, "unet other", step, count - 1, known).to(own.device)) % count
            both = torch.cat([ids, self.contrast.swap(ids[:known], own, other)])
            predicted = self._denoise(torch.cat([noisy, noisy[:known]]), torch.cat([timestep, timestep[:known]]), both)
            change = self.contrast.change(noisy[:known], alpha_bar[:known], own, other)
            apart = (predicted[:known] - predicted[batch:] - change).square().mean((1, 2, 3))
            counts = said[:known].to(self.device) & (timestep[:known] < CONTRAST_UNTIL)
            error = self._error(predicted[:batch], noise)
            error = torch.cat([error[:known] + self.contrast.weight * counts * apart, error[known:]])
        return (snr_weight(alpha_bar, self.gamma, self.power) * error).mean()

    def _denoise(self, noisy: Tensor, timestep: Tensor, ids: Tensor) -> Tensor:
        """The predicted noise (B, 4, h, w)."""
        with torch.no_grad():
            states = self.fast("states", self._states)(ids)
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        return self.fast("predict", self._predict)(noisy, timestep, states).float()

    def _error(self, predicted: Tensor, noise: Tensor) -> Tensor:
        """Squared error of every picture (B,)."""
        return ((predicted - noise).square() * self.middle).mean((1, 2, 3))

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


def kinds_apart(
    shop: Workshop, weight: float, gain: float, sets: Sequence[Pictures], tokenizer: Any
) -> Contrast | None:
    """The contrast of kinds; every kind's word is one token (`tokenizer.words` and the kinds themselves).

    Raises:
        UserError: a number out of its range; a kind's word in pieces; no critic, or one of pictures that the U-Net does
            not learn from.
    """
    if weight < 0 or gain <= 0:
        raise UserError(f"unet.contrast={weight}, contrast_gain={gain}: expected at least 0, and a positive number.")
    if not weight:
        return None
    kinds = torch.cat([pictures.labels["kind"] for pictures in sets]).to(shop.device)
    ids = [words.pieces(tokenizer, kind) for kind in KINDS]
    if any(len(each) > 1 for each in ids):
        raise UserError("unet.contrast: the tokenizer cuts the word of a kind into pieces; train it on more captions.")
    judge, read = critic.load(shop)
    if read != sets[-1].folder.name:
        raise UserError(f"unet.contrast: the critic has read the set {read}; give unet.calm a share, or draw none.")
    return Contrast(weight, gain, judge, kinds, torch.tensor(ids, device=shop.device)[:, 0])


def work(
    shop: Workshop,
    *,
    fit: dict[str, Any],
    channels: list[int],
    heads: int,
    groups: int,
    dropout: float,
    min_snr_gamma: float | None,
    high_noise: float,
    ema: float,
    centred: bool,
    calm: float,
    contrast: float,
    contrast_gain: float,
    whiten: float | None,
    start: str | None,
    check_pictures: int,
) -> dict[str, Any]:
    """The stage.

    Raises:
        UserError: `start` names no U-Net of these sizes; calm pictures are asked for and there are none; a share
            or weight out of its range.
    """
    if whiten is not None and whiten < 1:
        raise UserError(f"unet.whiten={whiten}: expected at least 1, the largest gain, or null.")
    if contrast and calm and not round(calm * fit["batch"]):
        raise UserError(f"unet.calm={calm}: no picture of a batch of {fit['batch']} is calm, so contrast has none.")
    if not 0 <= calm < 1:
        raise UserError(f"unet.calm={calm}: expected a share of the pictures, at least 0 and less than 1.")
    tokenizer = words.load(shop.weights("tokenizer"))
    text = clip.load_text(shop)
    names = ("main", "calm") if calm else ("main",)
    sets = [Pictures(shop.folder("data") / name, shop.device) for name in names]
    torch.manual_seed(shop.seed + 2)
    unet = build(shop.size // 8, text.config.hidden_size, channels, heads, groups)
    if start is not None:
        begin_with(unet, start)
    ids = torch.cat([pictures.tokens(tokenizer) for pictures in sets])
    module = UnetModule(
        Fit(**fit),
        shop.seed,
        unet=unet,
        text=text,
        moments=torch.cat([latents.load(shop, name) for name in names]),
        ids=ids,
        calm=len(sets[1]) if calm else 0,
        calm_share=calm,
        empty=torch.from_numpy(words.encode(tokenizer, [""]))[0],
        dropout=dropout,
        gamma=min_snr_gamma,
        power=high_noise,
        decay=ema,
        centred=centred,
        contrast=kinds_apart(shop, contrast, contrast_gain, sets, tokenizer),
        white=None if whiten is None else whitening(deviations(text, ids), whiten),
    )
    outcome = train(shop, "unet", module)
    module.float().to(shop.device)
    module.unwhiten()
    module.ema.save_pretrained(shop.weights("unet"))
    held = Pictures(shop.folder("data") / "held", shop.device)
    loss = held_out_loss(module, stage_vae.load(shop), held, tokenizer, check_pictures)
    return outcome | {"check": {"held_out_loss": round(loss, 5), "pictures": min(len(held), check_pictures)}}
