"""Mutual self-attention control (Cao et al. 2023, MasaCtrl): targets look up their content in the source.

Follows TencentARC/MasaCtrl (masactrl/masactrl.py, MutualSelfAttentionControl, …Mask and …MaskAuto).
Axes: R rows of a call, H heads of width d, S image positions, N tokens, P positions of the maps that masks are made of.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hiperlab.edit.attention_maps import square
from hiperlab.edit.edits import Edits, Rows, StepControl
from hiperlab.errors import UserError
from hiperlab.model.attention_control import Control, Layer


@dataclass(frozen=True)
class GivenMasks:
    """The same masks for all targets.

    Attributes:
        source: (h, w) bool, where the source shows the thing.
        target: (h', w') bool, where the targets are to show it.
    """

    source: Tensor
    target: Tensor


@dataclass(frozen=True)
class WordMasks:
    """Masks from the cross-attention maps that the same call has made so far.

    Attributes:
        regions: (2, N) tokens of the source's word and of each target's, None for a target without the word.
        pixels: P, of the maps to read.
        threshold: where a mask begins, of a map stretched to [0, 1].
    """

    regions: Sequence[Tensor | None]
    pixels: int
    threshold: float


LOOKUPS = ("source", "both", "own")


class MutualAttention(Edits):
    """In chosen steps and layers every row's self-attention has its source's keys and values, and its own queries.

    Args:
        rows: of each call.
        layers: paths of the self-attention layers.
        steps: sampling steps.
        masks: parts that look up one another only; None for everywhere.
        pixels: see `Edits`.
        stores: see `Edits`.
        lookup: whose keys and values targets read in guidance's unconditional rows and in the conditional ones: the
            "source"'s, "both" its and their own, or their "own" (phymhan/prompt-to-prompt, masactrl/masactrl.py,
            inject_uncond and inject_cond).
    """

    remedy = "set method.mask_pixels to null, or to the square of a side that the U-Net has"

    def __init__(
        self,
        rows: Rows,
        layers: Collection[str],
        steps: Collection[int],
        masks: GivenMasks | WordMasks | None,
        pixels: int,
        stores: bool,
        lookup: tuple[str, str] = ("source", "source"),
    ) -> None:
        super().__init__(rows, pixels, stores)
        assert masks is None or lookup == ("source", "source"), "masks tell parts of the source apart"
        self.lookup = lookup
        self.layers, self.steps, self.masks = frozenset(layers), frozenset(steps), masks
        self.found_maps = False

    def at(self, step: int) -> Control:
        """The control of the call at sampling step 0 .. T-1."""
        return _AtStep(self, step)

    def blend(self, step: int, latents: Tensor) -> Tensor:
        """The latents z (B, C, H, W) as they are.

        Raises:
            UserError: masks were to be made of maps that the U-Net does not have.
        """
        if isinstance(self.masks, WordMasks) and step in self.steps and self.layers and not self.found_maps:
            raise UserError(f"no cross-attention map has {self.masks.pixels} positions: {self.remedy}.")
        return latents


class _AtStep(StepControl):
    """`MutualAttention` in one call."""

    def __init__(self, edits: MutualAttention, step: int) -> None:
        super().__init__(edits)
        self.mutual = edits
        self.masks, self.layers = edits.masks, edits.layers if step in edits.steps else frozenset()
        self.seen: dict[Layer, Tensor] = {}  # maps (R, P, N) of this call, the mean over heads

    def wants(self, layer: Layer, pixels: int) -> bool:
        if layer.cross:
            return super().wants(layer, pixels) or self._is_read(pixels)
        return layer.name in self.layers

    def _is_read(self, pixels: int) -> bool:
        return bool(self.layers) and isinstance(self.masks, WordMasks) and pixels == self.masks.pixels

    def look(self, layer: Layer, probabilities: Tensor) -> Tensor:
        if self._is_read(probabilities.shape[2]):
            self.seen[layer] = probabilities.mean(1)
            self.mutual.found_maps = True
        return super().look(layer, probabilities)

    def attend(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if layer.cross:
            return super().attend(layer, query, key, value)
        rows = self.edits.rows
        assert len(query) == len(rows), "a call of other rows"
        if self.mutual.lookup != ("source", "source"):
            return self._from(query, key, value)
        key, value = key[rows.sources], value[rows.sources]
        attended = F.scaled_dot_product_attention(query, key, value)
        for number in range(rows.texts - 1):
            masks = self._masks(number, query.shape[2])
            if masks is not None:
                own = rows.target(number)
                source, target = (mask.to(query.device) for mask in masks)
                attended[own] = by_parts(query[own], key[own], value[own], source, target)
        return attended

    def _from(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention (R, H, S, d) in which each branch's targets read what `lookup` says."""
        rows, attended = self.edits.rows, F.scaled_dot_product_attention(query, key, value)
        conditional = rows.conditional
        branches = [(conditional[0], conditional[1:], self.mutual.lookup[1])]
        if rows.guided:
            branches.append((0, list(range(1, rows.texts)), self.mutual.lookup[0]))
        for source, targets, kind in branches:
            if kind == "own" or not targets:
                continue
            first = [source] * len(targets)
            keys, values = key[first], value[first]
            if kind == "both":
                keys, values = torch.cat([keys, key[targets]], dim=2), torch.cat([values, value[targets]], dim=2)
            attended[targets] = F.scaled_dot_product_attention(query[targets], keys, values)
        return attended

    def _masks(self, number: int, positions: int) -> tuple[Tensor, Tensor] | None:
        """(S,) bool each, of the source and of target `number`, at a layer of S = `positions`."""
        if isinstance(self.masks, GivenMasks):
            return at_layer(self.masks.source, positions), at_layer(self.masks.target, positions)
        words = self.masks.regions[number] if self.masks else None
        if self.masks is None or words is None or not self.seen:
            return None  # before the call's first map there is no mask, as theirs
        maps = torch.stack(list(self.seen.values())).mean(0)[self.edits.rows.conditional]
        both = zip(maps[[0, number + 1]], words, strict=True)
        source, target = (at_layer(word_map(each, word), positions) >= self.masks.threshold for each, word in both)
        return source, target


def word_map(maps: Tensor, tokens: Tensor) -> Tensor:
    """Where words look, stretched to [0, 1] (MutualSelfAttentionControlMaskAuto.aggregate_cross_attn_map).

    Args:
        maps: (P, N), means of cross-attention maps.
        tokens: (N,) 1 for the words' tokens.

    Returns:
        (p, p), P = p p.
    """
    seen = (square(maps) * tokens.to(maps)).sum(-1)
    least, most = seen.min(), seen.max()
    return (seen - least) / (most - least).clamp_min(torch.finfo(seen.dtype).tiny)


def at_layer(mask: Tensor, positions: int) -> Tensor:
    """A mask or map (h, w) at a layer of S = `positions`, by its nearest values: (S,), same type."""
    side = round(positions**0.5)
    kind = torch.float32 if mask.dtype == torch.bool else mask.dtype
    return F.interpolate(mask.to(kind)[None, None], (side, side)).flatten().to(mask.dtype)


def by_parts(query: Tensor, key: Tensor, value: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Attention (R, H, S, d) in which the target's part looks up the source's part, and the rest the rest.

    As MutualSelfAttentionControlMask.attn_batch and forward. A layer that the source's part fills, or has no part in,
    has none to tell apart; there attention is plain, where theirs is the mean of all values.

    Args:
        query: (R, H, S, d), of the targets.
        key: (R, H, S, d), of the source.
        value: (R, H, S, d), of the source.
        source: (S,) bool, the part among keys and values.
        target: (S,) bool, the part among queries.
    """
    if source.all() or not source.any():
        return F.scaled_dot_product_attention(query, key, value)
    inside = F.scaled_dot_product_attention(query, key, value, source[None, None, None])
    outside = F.scaled_dot_product_attention(query, key, value, ~source[None, None, None])
    return torch.where(target[:, None], inside, outside)
