"""Editing by attention maps: Prompt-to-Prompt and P2Plus on the rows of one call, and the loop that draws an edit.

Prompt-to-Prompt (Hertz et al. 2022) as the authors' prompt-to-prompt_stable.ipynb has it, P2Plus (Li et al. 2023) as
their p2plus/p2plus.py (sen-mao/StyleDiffusion).
Axes: B rows (0 the source, 1 .. B-1 its targets), T steps, S = s s image positions, N tokens, C latent channels, H, W
latent sides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hiperlab.data.concept import EditSettings
from hiperlab.edit.attention_maps import CrossEdit, blend, blend_mask, tokens_mask
from hiperlab.edit.edits import Edits, Rows
from hiperlab.edit.token_alignment import (
    Window,
    bounds,
    equalizer,
    refinement,
    replacement,
    time_table,
    word_indices,
    words,
)
from hiperlab.errors import UserError, near
from hiperlab.model.attention_control import Control, Layer, MapControl
from hiperlab.model.conditioning import Conditioning, concatenate
from hiperlab.model.inversion import noise_calls, previous, timesteps
from hiperlab.model.shared_calls import Calls, answered
from hiperlab.model.stack import FrozenStack

MODES = ("auto", "replace", "refine")
LARGEST_SELF = 32**2  # positions: by default, larger self-attention maps are never exchanged
BLEND_START = 0.2  # share of the steps before local blending begins
Move = Callable[[int, Tensor, Tensor], Tensor]  # step, latents and guided noise (B, C, H, W) -> the step's result
Guide = Callable[[int, Tensor, Tensor], Tensor]  # sampling step, e_u and e_c (B, C, H, W) -> noise


class PromptToPrompt:
    """How maps are taken over: the settings, for any pair of prompts.

    Args:
        mode: "replace" (equally many words), "refine" (words added), or "auto" by the number of words.
        tau_c: until which share of the steps cross-attention is the source's, or [start, end].
        tau_s: the same of self-attention in the conditional pass.
        tau_u: the same of self-attention in the unconditional pass (P2Plus).
        tau_words: other windows of cross-attention for single words of the target; None for none.
        equalizer: factors of words of the target while cross-attention is the source's; None for none.
        blend: [source word, target word]: outside their regions the source stays; None for everywhere.
        blend_except: [source word, target word] whose regions stay even so; None for none.
        blend_threshold: of a region's map, a share of its maximum.
        align_tail: see `words.replacement`.
        map_pixels: image positions of the maps that blending and pictures of maps read; None chooses, see `map_pixels`.
        advice: follow what the data's authors set for an edit, where they did.
    """

    def __init__(
        self,
        mode: str,
        tau_c: Window,
        tau_s: float,
        tau_u: float,
        tau_words: Mapping[str, Window] | None,
        equalizer: Mapping[str, float] | None,
        blend: Sequence[str] | None,
        blend_except: Sequence[str] | None,
        blend_threshold: float,
        align_tail: bool,
        map_pixels: int | None,
        advice: bool,
    ) -> None:
        if mode not in MODES:
            raise UserError(f"method.p2p.mode={mode!r} is unknown.{near(str(mode), MODES)}")
        for window in (tau_c, tau_s, tau_u, *(tau_words or {}).values()):
            bounds(window)
        for name, pair in (("blend", blend), ("blend_except", blend_except)):
            if pair is not None and (isinstance(pair, str) or len(pair) != 2):
                raise UserError(f"method.p2p.{name}={pair} must be [word of the source, word of the target], or null.")
        if blend_except and not blend:
            raise UserError("method.p2p.blend_except narrows method.p2p.blend: give both.")
        self.mode, self.tau_c, self.tau_s, self.tau_u = mode, tau_c, float(tau_s), float(tau_u)
        self.tau_words, self.equalizer = dict(tau_words or {}), dict(equalizer or {})
        self.blend = None if blend is None else tuple(blend)
        self.blend_except = None if blend_except is None else tuple(blend_except)
        self.blend_threshold, self.align_tail = float(blend_threshold), align_tail
        self.map_pixels, self.advice = map_pixels, advice

    @classmethod
    def off(cls, map_pixels: int | None = None) -> PromptToPrompt:
        """Settings under which no row follows another; `map_pixels` as above."""
        return cls("refine", 0.0, 0.0, 0.0, None, None, None, None, 0.3, False, map_pixels, False)

    def with_settings(self, given: EditSettings | None) -> PromptToPrompt:
        """These settings, with an edit's own where its authors named them and `advice` is on."""
        if given is None or not self.advice:
            return self
        tau = given.tau
        return PromptToPrompt(
            given.mode or self.mode,
            tau.get("c", self.tau_c), tau.get("s", self.tau_s), tau.get("u", self.tau_u),
            self.tau_words, dict(given.equalizer) or self.equalizer, given.blend or self.blend,
            self.blend_except, self.blend_threshold, self.align_tail, self.map_pixels, False,
        )  # fmt: skip

    def check(self, tokenizer: Any, source: str, targets: Sequence[str]) -> None:
        """Refuse words that no prompt has, before anything is fitted; without targets nothing is known.

        Raises:
            UserError: a word is not in the source, or in none of the targets; a prompt cannot be edited so.
        """
        if not targets:
            return
        for pair in filter(None, (self.blend, self.blend_except)):
            word_indices(source, pair[0], tokenizer)
        for word in self._target_words():
            if not any(word in words(target) for target in targets):
                word_indices(targets[0], word, tokenizer)
        for target in targets:
            self.edits(tokenizer, source, [target], steps=1, side=4, guided=True)

    def _target_words(self) -> list[str]:
        return [*self.equalizer, *self.tau_words, *(pair[1] for pair in (self.blend, self.blend_except) if pair)]

    def edits(
        self,
        tokenizer: Any,
        source: str,
        targets: Sequence[str],
        steps: int,
        side: int,
        guided: bool,
        keep: bool = False,
    ) -> AttentionEdits:
        """The controls of one drawing of the source with some of its targets.

        Settings for words that a target does not have leave that target alone.

        Args:
            tokenizer: CLIP's.
            source: the source prompt.
            targets: the target prompts.
            steps: T.
            side: of the latents.
            guided: whether each call has the unconditional rows in front.
            keep: add up the maps also where nothing is blended.
        """
        pairs = [self._pair(tokenizer, source, target, steps) for target in targets]
        pixels = self.map_pixels or map_pixels(side)
        return AttentionEdits(pairs, steps, self.tau_s, self.tau_u, pixels, self.blend_threshold, guided, keep)

    def _pair(self, tokenizer: Any, source: str, target: str, steps: int) -> Pair:
        present = set(words(target))
        windows = {word: each for word, each in self.tau_words.items() if word in present}
        factors = {word: each for word, each in self.equalizer.items() if word in present}
        edit = CrossEdit(
            time_table(target, steps, self.tau_c, windows, tokenizer),
            factors=equalizer(target, factors, tokenizer) if factors else None,
        )
        mode = self.mode
        if mode == "auto":
            mode = "replace" if len(words(source)) == len(words(target)) else "refine"
        if mode == "replace":
            edit = replace(edit, mapper=replacement(source, target, tokenizer, self.align_tail))
        else:
            mapper, aligned = refinement(source, target, tokenizer)
            edit = replace(edit, mapper=mapper, aligned=aligned)
        return Pair(
            edit,
            regions(tokenizer, source, target, self.blend),
            regions(tokenizer, source, target, self.blend_except),
        )


def map_pixels(side: int) -> int:
    """Positions of the maps to read where latents have this side: of a quarter of it, but of 8 where there are 8."""
    return max(side // 4, min(side, 8)) ** 2


def regions(tokenizer: Any, source: str, target: str, pair: Sequence[str] | None) -> Tensor | None:
    """(2, N) tokens of the source's word and the target's; None where the target does not have the word."""
    if pair is None or pair[1] not in words(target):
        return None
    length = int(tokenizer.model_max_length)
    chosen = [word_indices(text, word, tokenizer) for text, word in zip((source, target), pair, strict=True)]
    return torch.stack([tokens_mask(positions, length) for positions in chosen])


@dataclass(frozen=True)
class Pair:
    """The source and one target.

    Attributes:
        cross: how the target's cross-attention follows.
        region: (2, N) tokens whose regions may change, None for everywhere.
        fixed: (2, N) tokens whose regions stay even so, None for none.
    """

    cross: CrossEdit
    region: Tensor | None = None
    fixed: Tensor | None = None


class AttentionEdits(Edits):
    """The controls of one drawing: which rows' maps follow row 0's, step by step, and what local blending has seen.

    Rows are addressed by their number in a call of B conditional rows, with as many unconditional ones in front where
    it is guided; so one doubled call equals two.

    Args:
        pairs: of the source with each target; row k + 1 is pair k's.
        steps: T.
        tau_s: share of the steps with the source's self-attention, conditional rows.
        tau_u: the same, unconditional rows.
        pixels: image positions of the cross-attention maps that blending reads.
        threshold: see `blend_mask`.
        guided: whether unconditional rows stand in front.
        keep: add up the maps also where nothing is blended.

    Attributes:
        largest_self: image positions of the largest self-attention maps that are exchanged.
    """

    remedy = "set method.p2p.map_pixels to null, or to the square of a side that the U-Net has"

    def __init__(
        self,
        pairs: Sequence[Pair],
        steps: int,
        tau_s: float,
        tau_u: float,
        pixels: int,
        threshold: float,
        guided: bool,
        keep: bool = False,
    ) -> None:
        self.blends = any(pair.region is not None for pair in pairs)
        super().__init__(Rows(len(pairs) + 1, guided), pixels, stores=keep or self.blends)
        self.pairs, self.steps, self.threshold = list(pairs), steps, threshold
        self.self_until, self.uncond_until = int(steps * tau_s), int(steps * tau_u)
        self.guided = guided
        self.largest_self = LARGEST_SELF
        self._kept: dict[tuple[int, torch.dtype, torch.device], CrossEdit] = {}

    def at(self, step: int) -> Control:
        """The control of the call at sampling step 0 .. T-1."""
        return _AtStep(self, step)

    def cross(self, number: int, like: Tensor) -> CrossEdit:
        """The tables of pair `number` in the type and on the device of `like`, maps of any shape."""
        key = number, like.dtype, like.device
        if key not in self._kept:
            self._kept[key] = self.pairs[number].cross.to(like)
        return self._kept[key]

    def blend(self, step: int, latents: Tensor) -> Tensor:
        """Local blending of z (B, C, H, W) after a step: outside the regions each target becomes the source.

        As LocalBlend of the authors' notebook, which begins after 0.2 T steps.
        """
        if not self.blends or step + 1 <= int(BLEND_START * self.steps):
            return latents
        maps = self.maps()
        rows = [latents[:1]]
        for number, pair in enumerate(self.pairs):
            both = latents[[0, number + 1]]
            if pair.region is not None:
                both = blend(both, self.mask(maps[[0, number + 1]], pair, (both.shape[2], both.shape[3])))
            rows.append(both[1:])
        return torch.cat(rows)

    def mask(self, maps: Tensor, pair: Pair, size: tuple[int, int]) -> Tensor:
        """Where a pair may differ, (2, 1, H, W) bool, from maps (2, G, s, s, N)."""
        assert pair.region is not None, "pairs without regions may differ everywhere"
        mask = blend_mask(maps, pair.region.to(maps), size, self.threshold)
        if pair.fixed is not None:
            mask = mask & ~blend_mask(maps, pair.fixed.to(maps), size, self.threshold, pool=False)
        return mask


class _AtStep(MapControl):
    """`AttentionEdits` in one call; changes the maps in place, so it is for drawing only."""

    def __init__(self, edits: AttentionEdits, step: int) -> None:
        self.edits, self.step = edits, step
        self.edits_cross = any(pair.cross.active(step) for pair in edits.pairs)

    def wants(self, layer: Layer, pixels: int) -> bool:
        if layer.cross:
            return self.edits_cross or self.edits.is_stored(layer, pixels)
        exchanged = self.step < max(self.edits.self_until, self.edits.uncond_until if self.edits.guided else 0)
        return exchanged and pixels <= self.edits.largest_self

    def __call__(self, layer: Layer, probabilities: Tensor) -> Tensor:
        rows = len(self.edits.pairs) + 1
        assert len(probabilities) == (2 * rows if self.edits.guided else rows), "a call of other rows"
        conditional, unconditional = probabilities[-rows:], probabilities[:-rows]
        if not layer.cross:
            if self.step < self.edits.self_until:
                conditional[1:] = conditional[:1]
            if self.step < self.edits.uncond_until and self.edits.guided:
                unconditional[1:] = unconditional[:1]
            return probabilities
        if self.edits_cross:
            for number in range(rows - 1):
                change = self.edits.cross(number, probabilities)
                conditional[number + 1] = change(self.step, conditional[0], conditional[number + 1])
        if self.edits.is_stored(layer, probabilities.shape[2]):
            self.edits.store(layer, conditional)
        return probabilities


@torch.no_grad()
def edit_calls(
    stack: FrozenStack,
    start: Tensor,
    steps: int,
    conditional: Callable[[int], Conditioning],
    unconditional: Callable[[int], Conditioning],
    guidance: float | Tensor,
    edits: Edits | None = None,
    pivot: Tensor | None = None,
    watch: Callable[[int, Tensor], None] | None = None,
    move: Move | None = None,
    skip: int = 0,
    source_once: bool = False,
    guide: Guide | None = None,
) -> Calls[Tensor]:
    """Draw the source and its targets together, from the same noise, with DDIM (Song et al. 2021, eq. 12, eta = 0).

    Args:
        stack: the frozen model.
        start: z_T (B, C, H, W), the same for all rows of one source; with `skip` the latents at that step.
        steps: T.
        conditional: step 0 .. T-1 -> conditioning of the B rows.
        unconditional: the same of guidance's other branch; not asked where guidance is 1 or less.
        guidance: w in e_u + w (e_c - e_u), the same for all rows or one for each, (B, 1, 1, 1).
        edits: whose maps follow; None leaves every row alone.
        pivot: (T+1, C, H, W): after each step row 0 becomes the recorded path of the picture; None leaves it free.
        watch: called with (step, latents) after each step.
        move: another step than DDIM's, before blending; None for DDIM's.
        skip: steps left out at the noisiest end; step 0 is the first that is made.
        source_once: row 0 reads the same text in both branches: it is asked once, see `Rows`.
        guide: another way from e_u and e_c to the noise than e_u + w (e_c - e_u), where there is guidance.

    Returns:
        z_0 (B, C, H, W), scaled.
    """
    latents, guided = start, bool(torch.as_tensor(guidance > 1).any())
    again = range(1 if source_once else 0, len(start))  # rows with a conditional text of their own
    conditional_rows = Rows(len(start), guided, source_once).conditional
    path = timesteps(steps, stack.num_timesteps)[: steps - skip][::-1]
    for step, timestep in enumerate(path):
        control = edits.at(step) if edits else None
        if guided:
            within_text = conditional(step).rows(again) if source_once else conditional(step)
            both = concatenate([unconditional(step), within_text]).controlled(control)
            predicted = yield from noise_calls(stack, torch.cat([latents, latents[again.start :]]), timestep, both)
            without, within = predicted[: len(start)], predicted[conditional_rows]
            noise = guide(step, without, within) if guide else without + guidance * (within - without)
        else:
            noise = yield from noise_calls(stack, latents, timestep, conditional(step).controlled(control))
        latents = move(step, latents, noise) if move else previous(stack, latents, noise, timestep, steps)
        if pivot is not None:
            latents = torch.cat([pivot[len(path) - 1 - step][None].to(latents), latents[1:]])
        if edits:
            latents = edits.blend(step, latents)
        if watch is not None:
            watch(step, latents)
    return latents


edit = answered(edit_calls)
