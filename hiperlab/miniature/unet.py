"""Stage unet: Stable Diffusion's U-Net with 16 cross-attention layers and its text tower, trained together.

The latents are cached; the running mean of both networks is kept. The U-Net predicts velocities (Salimans & Ho 2022) on
a cosine schedule (Nichol & Dhariwal 2021, eq. 17), and most timesteps are drawn where kinds and coats are decided.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from safetensors.torch import save as as_bytes
from torch import Tensor, nn
from transformers import CLIPTextModel

from hiperlab import files
from hiperlab.errors import UserError
from hiperlab.hub import first_line
from hiperlab.miniature import latents
from hiperlab.miniature.decoder import centre
from hiperlab.miniature.draw_shard import HEADS, Source
from hiperlab.miniature.fit import train
from hiperlab.miniature.keys import normals, rows, stream
from hiperlab.miniature.module import Fit, StageModule
from hiperlab.miniature.names import Namer, features, put
from hiperlab.miniature.parts import encode_texts, freeze, load_autoencoder, load_tokenizer, token_ids
from hiperlab.miniature.pictures import Pictures
from hiperlab.miniature.plan import Workshop
from hiperlab.model.noise import add_noise, alphas_cumprod, sample_posterior, target
from hiperlab.model.text import embed, final_norm, transform
from hiperlab.world.vocabulary import KINDS

PREDICTION = "v_prediction"
SCHEDULE: dict[str, Any] = {  # of the miniature, as a diffusers scheduler config
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "prediction_type": PREDICTION,
}
PEAK, REACH = 0.7, 0.25  # of the timesteps that count twice: a triangle, in parts of the schedule
NAMER = "namer.safetensors"
PHOTO, PHOTO_SETS = "photo", ("main", "calm")  # photos show a coat best: they may have a share of their own


def ema_decay(step: int, largest: float) -> float:
    """How much of the mean stays after a step: short memory first, so that the random start is forgotten."""
    return min(largest, (step + 1) / (step + 10))


def timesteps(seed: int, step: int, batch: int, focus: float, length: int = 1000) -> Tensor:
    """Timesteps of a step (B,) int64 in [0, length): stratified over all, a share `focus` of them around `PEAK`.

    Args:
        seed: of the training.
        step: number of the step.
        batch: how many.
        focus: share of the batch that is drawn from the triangle; in [0, 1].
        length: of the schedule.
    """
    chance = stream(seed, "unet timestep", step)
    near = round(focus * batch)
    even = (torch.arange(batch - near) + torch.rand(batch - near, generator=chance)) / max(1, batch - near)
    around = PEAK + REACH * (torch.rand(2, near, generator=chance).sum(0) - 1)
    drawn = (torch.cat([even, around]) * length).long().clamp(0, length - 1)
    return drawn[torch.randperm(batch, generator=chance)]


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


class Learner(nn.Module):
    """What learns: the denoiser, its text tower, and the network that makes names.

    Args:
        unet, text: as diffusers and transformers know them.
        namer: as wide as the tower.
    """

    def __init__(self, unet: Any, text: Any, namer: Namer) -> None:
        super().__init__()
        self.unet, self.text, self.namer = unet, text, namer

    def states(self, ids: Tensor, identities: Tensor, places: Tensor, nouns: Tensor) -> Tensor:
        """Text states (B, N, D) with names put in.

        Args:
            ids: tokens (B, N).
            identities: `names.features` of the K rows that are named (K, F).
            places: their row numbers and positions (2, K).
            nouns: ids of their kinds' words (K,).
        """
        table = self.text.get_input_embeddings().weight
        vectors = self.namer(identities, torch.nn.functional.embedding(nouns, table))[None]
        return final_norm(self.text, transform(self.text, embed(self.text, ids, vectors, (places[0], places[1]))))[0]

    def forward(self, noisy: Tensor, timestep: Tensor, states: Tensor) -> Tensor:
        """The predicted velocity (B, 4, h, w)."""
        return self.unet(noisy, timestep, encoder_hidden_states=states).sample


class UnetModule(StageModule):
    """The learner with its loss and its running mean.

    Args:
        fit, seed: as in StageModule.
        learner: what learns; `mean` is its running mean.
        moments: posteriors of the latents (N, 8, h, w), set after set.
        ids: token ids of the captions (N, wordings, 77).
        named: token ids of the captions with names (N, 77), the word for the kind in the name's place.
        identities: `names.features` (N, F).
        nouns: ids of the kinds' words (N,).
        parts: how many rows of a batch are taken from which rows: (count, (R,) int64).
        empty: token ids of the empty prompt (77,).
        dropout: share of captions left empty, for classifier-free guidance.
        names: share of captions with a name.
        focus: as in `timesteps`.
        decay: of the running mean.
        centred: how much more the error counts in the middle, where subjects stand, than at the rim; the best
            prediction stays the same, but a short training spends itself on subjects rather than on skies.
    """

    alpha_bar: Tensor
    middle: Tensor
    adam_only = ("learner.text", "learner.namer")

    def __init__(
        self,
        fit: Fit,
        seed: int,
        *,
        learner: Learner,
        moments: Tensor,
        ids: Tensor,
        named: Tensor,
        identities: Tensor,
        nouns: Tensor,
        parts: Sequence[tuple[int, Tensor]],
        empty: Tensor,
        dropout: float,
        names: float,
        focus: float,
        decay: float,
        centred: float,
    ) -> None:
        super().__init__(fit, seed)
        self.keep: Callable[[Learner], None] | None = None  # what to do with the mean at every checkpoint
        self.learner = learner
        self.mean: Any = freeze(copy.deepcopy(learner))
        self.moments, self.ids, self.named = moments, ids, named
        self.identities, self.nouns, self.parts, self.empty = identities, nouns, tuple(parts), empty
        self.dropout, self.names, self.focus, self.decay = dropout, names, focus, decay
        self.register_buffer("alpha_bar", alphas_cumprod(SCHEDULE), persistent=False)
        self.register_buffer("middle", centre(*moments.shape[2:], centred), persistent=False)

    def choose(self, step: int) -> Tensor:
        """The step's rows (B,), those of one set side by side."""
        parts = [
            source[rows(self.seed, f"unet {number}", step, len(source), count)]
            for number, (count, source) in enumerate(self.parts)
        ]
        return torch.cat(parts)

    def captions(self, chosen: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """One wording's token ids (B, 77) of each row, some of them empty, and which have a name in them (K,)."""
        chance = stream(self.seed, "unet caption", step)
        which = torch.randint(self.ids.shape[1], (len(chosen),), generator=chance)
        draws = torch.rand(len(chosen), 1, generator=chance)
        ids = torch.where(draws < self.dropout + self.names, self.named[chosen], self.ids[chosen, which])
        ids = torch.where(draws < self.dropout, self.empty.to(ids), ids).long()
        has_name = ((draws >= self.dropout) & (draws < self.dropout + self.names))[:, 0]
        return ids, has_name.nonzero()[:, 0]

    def states(self, ids: Tensor, chosen: Tensor, with_name: Tensor) -> Tensor:
        """Text states (B, 77, D) of a batch on the device; `with_name` says which rows bear names."""
        which = chosen[with_name]
        nouns = self.nouns[which]
        places = torch.stack([with_name, put(ids[with_name], nouns)])
        parts = (ids, self.identities[which], places, nouns)
        return self.fast("states", self.learner.states)(*(part.to(self.device) for part in parts))

    def loss(self, step: int) -> Tensor:
        """Mean squared error of the predicted velocity."""
        chosen = self.choose(step)
        moments = self.moments[chosen].to(self.device)
        shape = (len(chosen), 4, *moments.shape[2:])
        z0 = sample_posterior(moments, normals(self.seed, "unet latent", step, shape, self.device))
        noise = normals(self.seed, "unet noise", step, shape, self.device)
        timestep = timesteps(self.seed, step, len(chosen), self.focus, len(self.alpha_bar)).to(self.device)
        alpha_bar = self.alpha_bar[timestep]
        ids, with_name = self.captions(chosen, step)
        states = self.states(ids, chosen, with_name)
        predicted = self.fast("predict", self.learner.forward)(add_noise(z0, noise, alpha_bar), timestep, states)
        wanted = target(z0, noise, alpha_bar, PREDICTION)
        return ((predicted.float() - wanted).square() * self.middle).mean()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write the mean beside the checkpoint, so that a training that is cut off leaves what it has."""
        super().on_save_checkpoint(checkpoint)
        if self.keep is not None:
            self.keep(self.mean)

    def optimizer_step(self, epoch: int, batch_idx: int, *args: Any, **kwargs: Any) -> None:
        """Step, then move the mean; here because a checkpoint is written before the batch's own hook is called."""
        step = self.global_step
        super().optimizer_step(epoch, batch_idx, *args, **kwargs)
        with torch.no_grad():
            share = 1 - ema_decay(step, self.decay)
            torch._foreach_lerp_(list(self.mean.parameters()), [p.detach() for p in self.learner.parameters()], share)


@torch.no_grad()
def held_out_loss(module: UnetModule, vae: Any, pictures: Pictures, tokenizer: Any, most: int) -> float:
    """Velocity error of the mean on held-out pictures, at timesteps spread evenly, always with the same noise."""
    count = min(len(pictures), most)
    ids = pictures.tokens(tokenizer)[:, 0].long()
    total = 0.0
    for index, part in enumerate(torch.arange(count).split(64)):
        z0 = latents.encode(vae, pictures.batch(part))[:, :4]
        noise = normals(0, "unet check", index, tuple(z0.shape), module.device)
        timestep = ((part * 1000 + 500) // count).to(module.device)
        alpha_bar = module.alpha_bar[timestep]
        states = module.mean.text(input_ids=ids[part].to(module.device)).last_hidden_state
        predicted = module.mean(add_noise(z0, noise, alpha_bar), timestep, states)
        wanted = target(z0, noise, alpha_bar, PREDICTION)
        total += float((predicted.float() - wanted).square().mean((1, 2, 3)).sum())
    return total / count


def begin_with(learner: Learner, folder: str) -> None:
    """Copy weights from a diffusers folder: its U-Net, its text tower, and names if it has any.

    Raises:
        UserError: there is no U-Net or text tower, or one of other sizes.
    """
    try:
        for part, kind in (("unet", UNet2DConditionModel), ("text_encoder", CLIPTextModel)):
            earlier: Any = kind.from_pretrained(str(files.expand(folder)), subfolder=part, local_files_only=True)
            getattr(learner, part.split("_")[0]).load_state_dict(earlier.float().state_dict())
        path = files.expand(folder) / NAMER
        if path.is_file():
            learner.namer.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"unet.start={folder} holds no U-Net and text tower of these sizes ({first_line(error)})."
        ) from error


def rows_by_set(sets: Mapping[str, Pictures]) -> dict[str, Tensor]:
    """Set -> row numbers when the sets stand one after another; `PHOTO` are the plain photos of one subject."""
    lengths = [len(pictures) for pictures in sets.values()]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    found = {name: torch.arange(end - n, end) for name, n, end in zip(sets, lengths, ends)}
    style = HEADS["style"].index(PHOTO)
    photos = [found[name][sets[name].labels["style"] == style] for name in PHOTO_SETS if name in sets]
    return {**found, **({PHOTO: torch.cat(photos)} if photos else {})}


def share_out(shares: Mapping[str, float], batch: int) -> dict[str, int]:
    """Rows of a batch by set; rounded, and the first set takes what is left.

    Raises:
        UserError: shares that are not positive, or do not add up to 1.
    """
    if not shares or any(share < 0 for share in shares.values()) or abs(sum(shares.values()) - 1) > 1e-6:
        raise UserError(f"unet.shares={dict(shares)}: expected shares of the sets, at least 0, that add up to 1.")
    counts = {name: round(share * batch) for name, share in shares.items()}
    first = next(iter(counts))
    return {**counts, first: counts[first] + batch - sum(counts.values())}


def work(
    shop: Workshop,
    *,
    fit: dict[str, Any],
    channels: list[int],
    heads: int,
    groups: int,
    shares: dict[str, float],
    dropout: float,
    names: float,
    focus: float,
    ema: float,
    centred: float,
    start: str | None,
    check_pictures: int,
) -> dict[str, Any]:
    """The stage.

    Raises:
        UserError: `start` names no networks of these sizes; shares that do not add up; a kind's word in pieces.
    """
    tokenizer = load_tokenizer(shop.base)
    pieces = [token_ids(tokenizer, kind) for kind in KINDS]
    if any(len(each) > 1 for each in pieces):
        raise UserError(f"base={shop.base}: its tokenizer cuts a kind into pieces; a name needs one token.")
    counts = {name: count for name, count in share_out(shares, fit["batch"]).items() if count}
    names_of_sets = [name for name in latents.SETS if name in counts or (name in PHOTO_SETS and PHOTO in counts)]
    sets = {name: Pictures(shop.folder("data") / name, shop.device) for name in names_of_sets}
    where = rows_by_set(sets)
    torch.manual_seed(shop.seed + 2)
    text = CLIPTextModel.from_pretrained(str(shop.base), subfolder="text_encoder", local_files_only=True).float()
    unet: Any = build(shop.size // 8, text.config.hidden_size, channels, heads, groups)
    learner = Learner(unet.to(memory_format=torch.channels_last), text, Namer(text.config.hidden_size))
    if start is not None:
        begin_with(learner, start)
    module = UnetModule(
        Fit(**fit),
        shop.seed,
        learner=learner,
        moments=torch.cat([latents.load(shop, name) for name in sets]),
        ids=torch.cat([pictures.tokens(tokenizer) for pictures in sets.values()]),
        named=torch.cat([pictures.tokens(tokenizer, named=True) for pictures in sets.values()])[:, 0],
        identities=torch.cat([_identities(shop, name, len(pictures)) for name, pictures in sets.items()]),
        nouns=torch.tensor(pieces)[torch.cat([pictures.labels["kind"] for pictures in sets.values()]), 0],
        parts=[(count, where[name]) for name, count in counts.items()],
        empty=torch.from_numpy(encode_texts(tokenizer, [""]))[0],
        dropout=dropout,
        names=names,
        focus=focus,
        decay=ema,
        centred=centred,
    )
    module.keep = functools.partial(save, folder=shop.weights("unet"))
    outcome = train(shop, "unet", module)
    module.float().to(shop.device)
    save(module.mean, shop.weights("unet"))
    held = Pictures(shop.folder("data") / "held", shop.device)
    loss = held_out_loss(module, load_autoencoder(shop), held, tokenizer, check_pictures)
    return outcome | {"check": {"held_out_loss": round(loss, 5), "pictures": min(len(held), check_pictures)}}


def save(learner: Learner, folder: Any) -> None:
    """U-Net and text tower as diffusers and transformers write them; the network of names beside them."""
    learner.unet.save_pretrained(folder / "unet")
    learner.text.save_pretrained(folder / "text_encoder")
    tensors = {key: value.detach().cpu().contiguous() for key, value in learner.namer.state_dict().items()}
    files.atomic_write(folder / NAMER, as_bytes(tensors))


def _identities(shop: Workshop, name: str, count: int) -> Tensor:
    """`names.features` of a set's first subjects (N, F)."""
    source = Source(name, shop.seed, views=1)
    return torch.tensor([features(source.picture(number).who) for number in range(count)])
