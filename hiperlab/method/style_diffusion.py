"""StyleDiffusion (Li et al. 2023): networks that turn a picture's CLIP tokens into what the value projections read.

Follows the authors' stylediffusion.py (sen-mao/StyleDiffusion); functions named below are there. Keys stay the source
text's, so attention maps keep their objects; values carry the picture.
Symbols: M_i (network of step i), E(x) (the picture's tokens), v_i(c) (values made from text states c), tau_v.
Axes: T steps, R rows, P picture tokens, N text tokens, D text width, C latent channels, H, W latent sides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from hiperlab.base.capability import Exportable
from hiperlab.base.editing_method import Conditions
from hiperlab.base.trajectory_method import PathSettings, TrajectoryMethod
from hiperlab.errors import UserError, near
from hiperlab.formats import stylediffusion as files
from hiperlab.layer.mapping import MappingNetworks, value_rows, value_states
from hiperlab.model import vision_loader as towers
from hiperlab.model.attention_control import Record, cross_maps
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.inversion import noise_calls, previous
from hiperlab.model.shared_calls import Calls
from hiperlab.model.stack import FrozenStack
from hiperlab.model.vision_tower import VisionTower

ATTENTION_LOSSES = {"mse": F.mse_loss, "l1": F.l1_loss, "none": None}
FILE = "mapping_networks.pth"


def updates(most: int, decay: float, step: int) -> int:
    """N_i = ceil(N exp(-decay i)), the most updates at step i (stylediffusion.py, VaeInversion.optimization)."""
    return math.ceil(most * math.exp(-decay * step))


class StyleDiffusion(TrajectoryMethod, Exportable):
    """One network per step of the path, fitted so that guided denoising walks back along it.

    A step's loss is the distance to the recorded path plus the distance of the attention maps to the recorded ones. In
    editing, the source row reads v_i(source) at every step, the targets v_i(target) at the first ones.

    Args:
        inner_steps: N, most updates at the first step of the path.
        inner_decay: how fast they become fewer, see `updates`.
        epsilon: a step is done when a loss is below epsilon + 2e-5 i.
        attention_loss: distance of the attention maps: "mse" (published), "l1", or "none".
        attention_pixels: image positions of the maps compared; None is a quarter of the latents' side, squared.
        value_form: "affine" (the released code: v(c) = c S + B) or "direct" (the paper: v = M(E(x))).
        tau_v: share of the steps at which targets read fitted values, 0 to 1.
        tower: folder or hub id of the picture tower; None takes the one in the model's own folder, else OpenAI's
            ViT-B/16.
        model_folder: the model's folder or hub id, where a tower may lie.
        path: as in `TrajectoryMethod`.
    """

    why_not_sdxl = "its authors define the fitted values on the states of one text encoder, with no pooled row"
    fixed_settings = ("value_form",)
    sampling_settings = (*TrajectoryMethod.sampling_settings, "tau_v")
    progress = (*TrajectoryMethod.progress, "path_step")  # `artifact` gives every step its network

    tokens: Tensor

    def __init__(
        self,
        inner_steps: int,
        inner_decay: float,
        epsilon: float,
        attention_loss: str,
        attention_pixels: int | None,
        value_form: str,
        tau_v: float,
        tower: str | None,
        model_folder: str | None,
        **path: Unpack[PathSettings],
    ) -> None:
        super().__init__(**path)
        if attention_loss not in ATTENTION_LOSSES:
            known = near(attention_loss, ATTENTION_LOSSES)
            raise UserError(f"method.attention_loss={attention_loss!r} is unknown.{known}")
        given = self.concepts[0].edit_settings
        self.tau_v = float(given.tau.get("v", tau_v) if given and self.p2p.advice else tau_v)
        if not 0 <= self.tau_v <= 1:
            raise UserError(f"method.tau_v={self.tau_v} is no share of the steps: choose 0 to 1 (0.6).")
        self.most, self.decay, self.epsilon = inner_steps, float(inner_decay), float(epsilon)
        self.distance, self.attention_pixels = ATTENTION_LOSSES[attention_loss], attention_pixels
        self.value_form = value_form
        vision = _tower(self.model, tower, model_folder)
        self.see = vision.all_tokens  # the method of a frozen tower, which so stays out of checkpoints
        self.networks = MappingNetworks(
            self.steps,
            vision.patches + 1,
            value_rows(value_form, int(self.model.tokenizer.model_max_length)),
            self.seed,
        )
        self.register_buffer("tokens", torch.zeros(vision.patches + 1, vision.width))  # E(x)

    def set_reference(self, index: int, picture: Tensor) -> None:
        """Take the picture (3, H, W) in [-1, 1] and read its tokens, once."""
        super().set_reference(index, picture)
        self.tokens.copy_(self.see(picture[None].detach().cpu().float())[0])

    def map_pixels(self) -> int | None:
        """Image positions of the maps that the attention loss compares; None where it is off."""
        if self.distance is None:
            return None
        return self.attention_pixels or (self.model.latent_shape[-1] // 4) ** 2

    # ---- the fit -----------------------------------------------------------------------------------------------------

    def inner_steps(self, step: int) -> int:
        """N_i, the most updates at step i: with N = 100 they are 1015 in all for T = 30, 1071 for T = 50."""
        return updates(self.most, self.decay, step)

    def stop_below(self, step: int) -> float:
        """The loss below which a step is done: epsilon, and 2e-5 more at every step (VaeInversion.optimization)."""
        return self.epsilon + 2e-5 * step

    def begin(self, step: int) -> None:
        """Copy the network of the step before, from which this step starts."""
        self.networks.copy(step - 1, step)

    def inner_loss_calls(self, step: int, latents: Tensor) -> Calls[dict[str, Tensor]]:
        """Distances, 0-d, of the guided step to the recorded path and of its attention maps to the recorded ones.

        Both have weight 1 (stylediffusion.py, VaeInversion.optimization).

        Args:
            step: i.
            latents: z (1, C, H, W) at t_i.
        """
        pixels = self.map_pixels()
        record = None if pixels is None else Record(cross_maps(pixels))
        noise = yield from self._guided_calls(step, latents, record)
        found = previous(self.model, latents, noise, self.timesteps[step], self.steps)
        losses = {"latent": F.mse_loss(found[0], self.pivot[self.steps - 1 - step])}
        if record is not None:
            losses["attention"] = self._attention_loss(step, record)
        return losses

    def _attention_loss(self, step: int, record: Record) -> Tensor:
        """Means over heads, positions and tokens, summed over the layers.

        The maps of step i were recorded on the matching latents, at the timestep before; those of step 0 on the
        latents before the last: `ddim_inv_attn[NUM_DDIM_STEPS - i]` in stylediffusion.py, its last entry twice.
        """
        assert self.distance is not None, "asked for without maps"
        if not record.maps:
            raise UserError(
                f"method.attention_pixels={self.map_pixels()}: no cross-attention map has so many positions. Choose "
                "the square of a side that the U-Net has, or method.attention_loss=none."
            )
        remaining = min(self.steps - step, self.steps - 1)
        wanted = self.inversion.maps
        return torch.stack([self.distance(maps, wanted[layer][remaining]) for layer, maps in record.maps.items()]).sum()

    @torch.no_grad()
    def guided_calls(self, step: int, latents: Tensor) -> Calls[Tensor]:
        """The guided noise (1, C, H, W) for latents of that shape, with the network as it is."""
        return (yield from self._guided_calls(step, latents, None))

    def _guided_calls(self, step: int, latents: Tensor, record: Record | None) -> Calls[Tensor]:
        # Before the call with a gradient, which other pictures' can then share.
        without = yield from self.remembered_calls("unconditional", lambda: self.plain_noise_calls("", step, latents))
        text = self.encode([self.source])
        states = Conditioning(text[None], self.values(step, text)[None]).controlled(record)
        within = yield from noise_calls(self.model, latents, self.timesteps[step], states)
        return without + self.guidance * (within - without)

    def values(self, step: int, text: Tensor) -> Tensor:
        """v_i(c) (R, N, D) of text states c (R, N, D) (stylediffusion.py, Trainer.forward_embed)."""
        return value_states(text.to(self.tokens), self.networks(self.tokens[None], step), self.value_form)

    # ---- drawing -----------------------------------------------------------------------------------------------------

    def edit_conditions(self, texts: Sequence[str], negative: str | None) -> tuple[Conditions, Conditions]:
        """Keys are each row's own text; values are fitted for the source, and for the targets while i < T tau_v.

        As text2image_ldm_stable in stylediffusion.py.
        """
        _, unconditional = super().edit_conditions(texts, negative)
        states = self.encode(texts).to(self.tokens)

        def conditional(step: int) -> Conditioning:
            values = self.values(self.reached(step), states)
            if step >= self.steps * self.tau_v:
                values = torch.cat([values[:1], states[1:]])
            return Conditioning(states[None], values[None])

        return conditional, unconditional

    # ---- keeping -----------------------------------------------------------------------------------------------------

    def artifact(self, index: int) -> dict[str, Tensor]:
        """Noise (C, H, W), tokens (P, D), networks (T, ...); steps that training did not reach get the last one."""
        rows = [self.reached(step) for step in range(self.steps)]
        found = super().artifact(index)
        return {name: value[rows] if name.startswith("networks.") else value for name, value in found.items()}

    def load_artifact(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Put noise (C, H, W), tokens (P, D) and networks (T, ...) in place; nothing is left to fit then."""
        super().load_artifact(index, tensors)
        self.path_step.fill_(self.steps - 1)

    def export(self, index: int, folder: Path, steps: int) -> list[Path]:
        """The networks as the authors' later release keeps them; noise, tokens and text are in our artifact only."""
        own = {name.removeprefix("networks."): value for name, value in self.artifact(index).items()}
        return [files.write(folder / FILE, own)]

    @torch.no_grad()
    def load_foreign(self, index: int, path: Path) -> None:
        """The authors' networks, of either release; the picture itself comes from the data."""
        found, own = files.read(path), self.networks.state_dict()
        theirs = len(found["conv_end.bias"])
        if theirs != self.steps:
            raise UserError(
                f"{path.name} holds {theirs} networks, this run has {self.steps}: set sampler.steps={theirs}."
            )
        if wrong := [name for name, value in own.items() if value.shape != found[name].shape]:
            raise UserError(
                f"{path.name} does not fit: {wrong[0]} is {tuple(found[wrong[0]].shape)}, here "
                f"{tuple(own[wrong[0]].shape)}. Choose the method.tower and method.value_form it was made with."
            )
        self.networks.load_state_dict(found)
        self.path_step.fill_(self.steps - 1)


def _tower(model: FrozenStack, tower: str | None, folder: str | None) -> VisionTower:
    """The picture tower that the settings mean, frozen.

    Raises:
        UserError: its tokens are not as wide as the text's.
    """
    if tower is None and (own := towers.beside(folder)):
        tower = own
    if tower is None and not model.trained:
        made = towers.tiny_tower(seed=0, width=model.width)
    else:
        made = towers.load(tower or towers.OPENAI_BASE)
    if made.width != model.width:
        raise UserError(
            f"the picture tower's tokens are {made.width} wide, {model.name}'s text states {model.width}, and they are "
            f"added up. Give a tower of width {model.width} as method.tower, or another model (sd14, sd15)."
        )
    return made.eval().requires_grad_(False)
