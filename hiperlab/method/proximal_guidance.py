"""Proximal guidance (Han et al. 2024, ProxEdit): ProxNPI and ProxMasaCtrl, and negative-prompt inversion.

Follows phymhan/prompt-to-prompt (negative_prompt_inversion.py, ptp_utils.py, scheduler_dev.py, prox_masactrl.py).
Symbols: w (guidance), delta, lambda, m (see `hiperlab.edit.proximal`), x*_k (the picture's recorded path), eta (pull).
Axes: B rows (the source and its targets), C latent channels, H, W latent sides, N tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf
from typing import ClassVar, TypedDict, Unpack

import torch
from torch import Tensor

from hiperlab.base.editing_method import Conditions, Drawing, EditorSettings
from hiperlab.base.recorded_path_method import RecordedPathMethod
from hiperlab.edit.edits import Edits, Rows
from hiperlab.edit.mutual_attention import LOOKUPS, MutualAttention
from hiperlab.edit.prompt_to_prompt import PromptToPrompt, edit_calls, map_pixels
from hiperlab.edit.proximal import KINDS, edited, shrunk, slerp, threshold
from hiperlab.errors import UserError, near
from hiperlab.model.conditioning import concatenate
from hiperlab.model.inversion import levels, previous
from hiperlab.model.shared_calls import Calls

ATTENTION = ("p2p", "masactrl")
PULLS = ("none", "reconstruction", "inversion")


class Mutual(TypedDict):
    """Settings of mutual self-attention, see `hiperlab.edit.mutual_attention`.

    Attributes:
        start_step: the first step with it, counted from 0, the noisiest.
        start_layer: the first self-attention layer with it, in the order of execution.
        unconditional: whose keys and values unconditional target rows read: "source", "both" or "own".
        conditional: the same of conditional ones.
    """

    start_step: int
    start_layer: int
    unconditional: str
    conditional: str


class ProximalGuidance(RecordedPathMethod):
    """The source text stands for the unconditional one, and only large differences to it are guided.

    Args:
        p2p: how attention maps are taken over, with `attention` "p2p".
        attention: "p2p" (ProxNPI) or "masactrl" (ProxMasaCtrl), whose source row is guided with 1 and never shrunk.
        mutual: its settings.
        source_negative: the source text is the unconditional one (negative-prompt inversion, Miyake et al. 2023); False
            takes the sampler's.
        npi_interp: share of the empty text in it, 0 to 1, on an arc; with "masactrl" in target rows only.
        prox: "none", "l0" or "hard", see `hiperlab.edit.proximal.shrunk`.
        quantile: q of |delta|, at most 1, over source and target ("p2p") or the target alone ("masactrl"); 0 or less:
            lambda is -quantile.
        prox_step: the first step that is shrunk, counted from 0, the noisiest.
        pull: what draws cells outside the edit back: "none", "reconstruction" (the picture, in x_0) or "inversion" (its
            path, after the step).
        pull_below: timesteps below this one are pulled.
        pull_rate: eta, 0 to 1.
        dilate: cells by which the edit's mask grows.
        editor: as in `EditingMethod`; nothing is fitted or random.

    Raises:
        UserError: a setting out of its range, a pull without a threshold.
    """

    sampling_settings: ClassVar[tuple[str, ...]] = (
        "p2p", "cache", "attention", "mutual", "source_negative", "npi_interp", "prox", "quantile", "prox_step", "pull",
        "pull_below", "pull_rate", "dilate",
    )  # fmt: skip
    published_crop = "square"  # load_512 of negative_prompt_inversion.py

    def __init__(
        self,
        p2p: PromptToPrompt,
        attention: str,
        mutual: Mutual,
        source_negative: bool,
        npi_interp: float,
        prox: str,
        quantile: float,
        prox_step: int,
        pull: str,
        pull_below: int,
        pull_rate: float,
        dilate: int,
        **editor: Unpack[EditorSettings],
    ) -> None:
        super().__init__(p2p, **editor)
        choices = {
            "attention": (attention, ATTENTION), "prox": (prox, KINDS), "pull": (pull, PULLS),
            "mutual.unconditional": (mutual["unconditional"], LOOKUPS),
            "mutual.conditional": (mutual["conditional"], LOOKUPS),
        }  # fmt: skip
        for name, (value, known) in choices.items():
            if value not in known:
                raise UserError(f"method.{name}={value!r} is unknown.{near(str(value), known)}")
        ranges = {
            "npi_interp": (npi_interp, 0, 1), "quantile": (quantile, -inf, 1), "pull_rate": (pull_rate, 0, 1),
            "prox_step": (prox_step, 0, inf), "dilate": (dilate, 0, self.model.size // 8),
            "mutual.start_step": (mutual["start_step"], 0, inf),
            "mutual.start_layer": (mutual["start_layer"], 0, len(self.model.self_attention) - 1),
        }  # fmt: skip
        for name, (number, least, most) in ranges.items():
            if not least <= number <= most:
                raise UserError(f"method.{name}={number} is out of range: choose {least} to {most}.")
        if pull != "none" and prox == "none":
            raise UserError(f"method.pull={pull} needs a threshold that says where the edit is: set method.prox=l0.")
        if npi_interp and not source_negative:
            raise UserError("method.npi_interp mixes the source text with the empty one: set source_negative=true.")
        self.attention, self.mutual = attention, mutual
        self.source_negative, self.npi_interp = source_negative, float(npi_interp)
        self.prox, self.quantile, self.prox_step = prox, float(quantile), prox_step
        self.pull, self.pull_below, self.pull_rate, self.dilate = pull, pull_below, float(pull_rate), dilate

    # ---- texts and attention -----------------------------------------------------------------------------------------

    @property
    def masactrl(self) -> bool:
        """Whether targets look up the source by mutual self-attention."""
        return self.attention == "masactrl"

    @property
    def source_once(self) -> bool:
        """Whether the source row reads the same text in both branches of guidance, and one row serves both.

        Prompt-to-Prompt's tables ask for both.
        """
        return self.masactrl and self.source_negative

    def edit_conditions(self, texts: Sequence[str], negative: str | None) -> tuple[Conditions, Conditions]:
        """The texts, and the source text (or a mix with the empty one) as the unconditional one of all rows.

        Raises:
            UserError: another unconditional text is asked for.
        """
        conditional, plain = super().edit_conditions(texts, negative)
        if not self.source_negative:
            return conditional, plain
        if negative:
            raise UserError(
                f"sample.negative={negative!r}: the source text is the unconditional one. Leave it, or set "
                "method.source_negative=false."
            )
        source, empty = self.encode.condition([self.source]), self.encode.condition([""])
        mixed = source
        if self.npi_interp:  # of SDXL's pooled rows as of the states
            between = [
                slerp(self.npi_interp, one, two) if one is not None and two is not None else None
                for one, two in ((source.keys[0], empty.keys[0]), (source.pooled, empty.pooled))
            ]
            assert between[0] is not None
            mixed = replace(source.reading(between[0][None]), pooled=between[1])
        states = concatenate([source if self.masactrl else mixed, mixed.rows([0] * (len(texts) - 1))])
        return conditional, lambda step: states

    def edits(self, texts: Sequence[str], side: int, guided: bool, keep: bool) -> Edits:
        """Prompt-to-Prompt's controls, or mutual self-attention; arguments as `EditingMethod.edits`."""
        if not self.masactrl:
            return super().edits(texts, side, guided, keep)
        rows = Rows(len(texts), guided, self.source_once)
        layers = self.model.self_attention[self.mutual["start_layer"] :]
        steps = range(self.mutual["start_step"], self.steps)
        lookup = (self.mutual["unconditional"], self.mutual["conditional"])
        return MutualAttention(rows, layers, steps, None, map_pixels(side), stores=keep, lookup=lookup)

    def _draw_calls(
        self, texts: Sequence[str], seed: int, guidance: float, negative: str | None, batch_size: int
    ) -> Calls[dict[str, Tensor]]:
        """As `EditingMethod`; a source row that is shrunk by a target's threshold is drawn for each target alone."""
        together = self.masactrl or (self.source_negative and not self.npi_interp) or self.quantile <= 0
        batch_size = batch_size if together or self.prox == "none" else 2
        return (yield from super()._draw_calls(texts, seed, guidance, negative, batch_size))

    # ---- drawing -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def denoise_calls(self, drawing: Drawing) -> Calls[Tensor]:
        """z_0 (B, C, H, W) of a drawing.

        Raises:
            UserError: guidance of 1 or less has no direction to shrink.
        """
        start, conditional, unconditional, guidance, edits, watch = drawing
        if self.prox != "none" and not self.is_guided(guidance):
            raise UserError(
                f"sampler.guidance={guidance}: without guidance there is nothing to shrink: method.prox=none."
            )
        masks: list[Tensor] = []  # of the newest step

        def guide(step: int, without: Tensor, within: Tensor) -> Tensor:
            left, mask = self.directions(step, within - without)
            masks[:] = [mask]
            weights = torch.full_like(left[:, :1, :1, :1], guidance)
            if self.masactrl:
                weights[0] = 1.0
            return without + weights * left

        def move(step: int, latents: Tensor, noise: Tensor) -> Tensor:
            timestep = self.timesteps[step]
            found = previous(self.model, latents, noise, timestep, self.steps)
            if self.pull == "none" or timestep >= self.pull_below:
                return found
            outside = self.pull_rate * (1 - masks[0])
            if self.pull == "inversion":
                return found - outside * (found - self.path[self.steps - 1 - step])
            here, below = levels(self.model, timestep, self.steps)
            picture = (latents - (1 - here).sqrt() * noise) / here.sqrt()
            return found - below.sqrt() * outside * (picture - self.path[0])

        return (
            yield from edit_calls(
                self.model, start, self.steps, conditional, unconditional, guidance, edits, watch=watch, move=move,
                source_once=self.source_once, guide=guide,
            )
        )  # fmt: skip

    def directions(self, step: int, delta: Tensor) -> tuple[Tensor, Tensor]:
        """What is left of delta (B, C, H, W) at sampling step i, and where it is an edit, m of the same shape.

        Every target has its own threshold; the source's is the first target's.
        """
        if self.prox == "none" or step < self.prox_step or len(delta) == 1:
            return delta, torch.zeros_like(delta)
        left: list[Tensor] = []
        masks: list[Tensor] = []
        for number in range(1, len(delta)):
            pair = delta[[0, number]]
            least = threshold(pair[1:] if self.masactrl else pair, self.quantile)
            both = shrunk(pair, least, self.prox)
            mask = edited(both, least, self.dilate)
            left += [both[1:]] if left else [both]
            masks += [mask[1:]] if masks else [mask]
        found, where = torch.cat(left), torch.cat(masks)
        if self.masactrl:
            found = torch.cat([delta[:1], found[1:]])
        return found, where
