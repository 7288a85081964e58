"""Edit-friendly DDPM inversion (Huberman-Spiegelglas et al. 2024): noise maps that lead back to the picture.

Follows inbarhub/DDPM_inversion (ddm_inversion/inversion_utils.py, inversion_forward_process and
inversion_reverse_process; prompt_to_prompt/ptp_classes.py).
Symbols: x_0 (the picture's latents), x_{k+1} (at the k-th timestep tau_k, ascending), z_k (the noise map from x_{k+1}
to x_k), a (alpha_bar), V (the variance of DDPM's step), T (steps), w (guidance).
Axes: B rows (the source and its targets), K steps that are made, C latent channels, H, W latent sides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from hiperlab import draws
from hiperlab.base.editing_method import Drawing, EditingMethod
from hiperlab.base.method import Subject
from hiperlab.edit.prompt_to_prompt import AttentionEdits, PromptToPrompt, edit_calls
from hiperlab.errors import UserError, near
from hiperlab.model.conditioning import concatenate
from hiperlab.model.inversion import levels, noise_calls, timesteps
from hiperlab.model.shared_calls import Calls
from hiperlab.model.stack import FrozenStack

MODES = ("plain", "p2p")
ETA_FORMS = ("linear", "squared")


@dataclass(frozen=True)
class Coefficients:
    """Of one step of the sampler, from tau_k to the level below; 0-d each.

    Attributes:
        signal: sqrt(a) at tau_k.
        noise: sqrt(1 - a) at tau_k.
        below: sqrt(a) of the level below.
        direction: factor of the predicted noise at the level below.
        sigma: factor of the noise map.
    """

    signal: Tensor
    noise: Tensor
    below: Tensor
    direction: Tensor
    sigma: Tensor

    def mean(self, latents: Tensor, noise: Tensor) -> Tensor:
        """The step's mean (B, C, H, W) for latents x_{k+1} and their predicted noise (Song et al. 2021, eq. 12)."""
        clean = (latents - self.noise * noise) / self.signal
        return self.below * clean + self.direction * noise


def coefficients(stack: FrozenStack, timestep: int, steps: int, eta: float, form: str) -> Coefficients:
    """The step's coefficients (reverse_step in inversion_utils.py).

    Args:
        stack: the frozen model.
        timestep: tau_k, in [0, 1000).
        steps: T.
        eta: above 0; at 1 this is DDPM's step, and both forms are one.
        form: what stands under the root of `direction`: "linear" 1 - a - eta V, "squared" 1 - a - eta^2 V.
    """
    here, below = levels(stack, timestep, steps)
    variance = (1 - below) / (1 - here) * (1 - here / below)  # Ho et al. 2020, eq. 7
    share = eta if form == "linear" else eta**2
    return Coefficients(
        here.sqrt(), (1 - here).sqrt(), below.sqrt(), (1 - below - share * variance).sqrt(), eta * variance.sqrt()
    )


class EditFriendly(EditingMethod):
    """The source's noise maps, extracted from independently noised latents, drive the targets' sampling.

    Artifacts keep x_{T - skip} and the noise maps of the steps that are made.

    Args:
        model: the frozen stack.
        concepts: one picture with its source text and, where known, its targets.
        optimizer: unused, nothing is fitted.
        seed: of the noise that the picture is diffused with; another one gives other edits, the same reconstruction.
        steps: T, of the inversion and of every drawing.
        p2p: how attention maps are taken over, with mode "p2p"; shares are of all T steps, counted from the first that
            is made.
        mode: "plain" (theirs: our_inv), without attention control, or "p2p" (theirs: p2pinv).
        skip: share in [0, 1) of the steps left out at the noisiest end; more is closer to the picture.
        guidance_source: w of the inversion and of the source row; the targets have the sampler's.
        eta: above 0, in a list of one, for all steps, or of T, ascending from the picture.
        eta_form: "linear" or "squared", see `coefficients`.
        self_pixels: image positions of the largest self-attention maps that are exchanged.

    Raises:
        UserError: a setting out of its range.
    """

    fixed_settings = ("skip", "guidance_source", "eta", "eta_form")
    sampling_settings: ClassVar[tuple[str, ...]] = ("p2p", "mode", "self_pixels")
    negates_source = False  # its maps were found with the empty text
    published_crop = "square"  # load_512 in prompt_to_prompt/ptp_classes.py

    maps: Tensor

    def __init__(
        self,
        model: FrozenStack,
        concepts: Sequence[Subject],
        optimizer: Callable[..., Optimizer],
        seed: int,
        steps: int,
        p2p: PromptToPrompt,
        mode: str,
        skip: float,
        guidance_source: float,
        eta: Sequence[float],
        eta_form: str,
        self_pixels: int,
    ) -> None:
        for name, value, known in (("mode", mode, MODES), ("eta_form", eta_form, ETA_FORMS)):
            if value not in known:
                raise UserError(f"method.{name}={value!r} is unknown.{near(str(value), known)}")
        if not 0 <= skip < 1:
            raise UserError(
                f"method.skip={skip} is no share of the steps. Choose one in [0, 1); published are 0.36, 0.12."
            )
        if mode == "plain":
            p2p = PromptToPrompt.off(p2p.map_pixels)
        super().__init__(model, concepts, optimizer, seed, steps, p2p, inject_source_latents=False, cache=None)
        self.mode, self.skip, self.guidance_source = mode, float(skip), float(guidance_source)
        self.eta = [float(each) for each in eta]
        self.eta_form, self.self_pixels = eta_form, self_pixels
        self.made = max(1, steps - round(skip * steps))
        self._check_eta()
        self.register_buffer("maps", torch.zeros(self.made, *model.latent_shape))

    def _check_eta(self) -> None:
        etas = self.eta * self.steps if len(self.eta) == 1 else self.eta
        if len(etas) != self.steps:
            raise UserError(
                f"method.eta has {len(etas)} numbers, the path {self.steps} steps: give one for each, or one."
            )
        if min(etas) <= 0:
            raise UserError(f"method.eta={min(etas)}: without noise there are no maps to find. Choose numbers above 0.")
        self._etas = etas
        found = [self.coefficients(k).direction for k in range(self.steps)]
        if not torch.stack(found).isfinite().all():
            raise UserError(f"method.eta={max(etas)} is more noise than a step's level has. Choose at most 1.")

    def coefficients(self, k: int) -> Coefficients:
        """Of the step from x_{k+1} to x_k."""
        timestep = timesteps(self.steps, self.model.num_timesteps)[k]
        return coefficients(self.model, timestep, self.steps, self._etas[k], self.eta_form)

    # ---- the inversion -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prepare_calls(self) -> Calls[None]:
        """Find the noise maps, once per picture."""
        if self.noise.any():
            return
        latents = self.picture_latents()
        noise = draws.normal(self.seed, "noise maps", range(self.made), self.model.latent_shape).to(latents)
        path, maps = yield from self.map_calls(latents, noise)
        self.noise.copy_(path[-1])
        self.maps.copy_(maps)

    @torch.no_grad()
    def map_calls(self, latents: Tensor, noise: Tensor) -> Calls[tuple[Tensor, Tensor]]:
        """The path x_0 .. x_K (K+1, C, H, W) and its noise maps z_0 .. z_{K-1} (K, C, H, W).

        z_0 is set to 0, as in the authors' code: the last step adds no noise.

        Args:
            latents: x_0 (1, C, H, W), scaled.
            noise: unit normals (K, C, H, W).
        """
        path, maps = list(self.diffused(latents, noise).split(1)), torch.zeros_like(noise)
        for k in reversed(range(len(noise))):
            step = self.coefficients(k)
            mean = step.mean(path[k + 1], (yield from self._source_noise_calls(path[k + 1], k)))
            found = (path[k] - mean) / step.sigma
            if k > 0:
                maps[k] = found[0]
                path[k] = mean + step.sigma * found  # what drawing will reach, rounding included
        return torch.cat(path), maps

    def diffused(self, latents: Tensor, noise: Tensor) -> Tensor:
        """x_0 .. x_K (K+1, C, H, W), each from x_0 with noise of its own, not its neighbour's (sample_xts_from_x0).

        Args:
            latents: x_0 (1, C, H, W), scaled.
            noise: unit normals (K, C, H, W).
        """
        steps = [self.coefficients(k) for k in range(len(noise))]
        rows = [of.signal * latents + of.noise * each for of, each in zip(steps, noise, strict=True)]
        return torch.cat([latents, *rows])  # Ho et al. 2020, eq. 4

    def _source_noise_calls(self, latents: Tensor, k: int) -> Calls[Tensor]:
        """The guided noise (1, C, H, W) that the source text sees in x_{k+1}; a pass without effect is left out."""
        timestep = timesteps(self.steps, self.model.num_timesteps)[k]
        empty, states = (self.encode.condition([text]) for text in ("", self.source))
        if self.guidance_source == 1 or not self.source:
            return (yield from noise_calls(self.model, latents, timestep, states))
        both = yield from noise_calls(self.model, torch.cat([latents] * 2), timestep, concatenate([empty, states]))
        without, within = both.chunk(2)
        return without + self.guidance_source * (within - without)

    # ---- drawing -----------------------------------------------------------------------------------------------------

    def is_guided(self, guidance: float) -> bool:
        """Whether any row has guidance."""
        return max(guidance, self.guidance_source) > 1

    @torch.no_grad()
    def denoise_calls(self, drawing: Drawing) -> Calls[Tensor]:
        """x_0 (B, C, H, W) from x_K (B, C, H, W): every row gets the same noise maps, the source its own guidance."""
        start, conditional, unconditional, guidance, edits, watch = drawing
        if isinstance(edits, AttentionEdits):
            edits.largest_self = self.self_pixels
        scales = torch.tensor([self.guidance_source, *[guidance] * (len(start) - 1)]).to(start).view(-1, 1, 1, 1)
        last = len(self.maps) - 1

        def move(step: int, latents: Tensor, noise: Tensor) -> Tensor:
            of = self.coefficients(last - step)
            return of.mean(latents, noise) + of.sigma * self.maps[last - step]

        return (
            yield from edit_calls(
                self.model, start, self.steps, conditional, unconditional, scales, edits,
                watch=watch, move=move, skip=self.steps - self.made,
            )
        )  # fmt: skip
