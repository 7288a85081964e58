"""Prompt-to-Prompt on attention maps (Hertz et al. 2022): what a target's map becomes beside the source's.

As AttentionReplace, AttentionRefine, AttentionReweight and LocalBlend of the authors' prompt-to-prompt_stable.ipynb.
Everything acts on probabilities, after the softmax; nothing is renormalised.
Axes: h heads, S = s s image positions, N tokens, B rows (0 the source), G maps of a row (layers times heads), T steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class CrossEdit:
    """How one target's cross-attention follows the source's.

    Attributes:
        table: (T+1, N), 1 where the source's map is taken, see `words.time_table`.
        mapper: (N, N) float of a replacement, (N,) int64 of a refinement, None for the source's map as it is.
        aligned: (N,) 1 where a refined token has a source token, else 0; None but for refinements.
        factors: (N,) of the words' maps; None for none.
    """

    table: Tensor
    mapper: Tensor | None = None
    aligned: Tensor | None = None
    factors: Tensor | None = None

    def active(self, step: int) -> bool:
        """Whether anything changes at step 0 .. T."""
        return bool(self.table[step].any())

    def to(self, like: Tensor) -> CrossEdit:
        """The same, its tables in the type and on the device of `like`, maps of any shape; positions stay integers."""
        mapper = self.mapper
        if mapper is not None:
            mapper = mapper.to(like) if mapper.is_floating_point() else mapper.to(like.device)
        return replace(
            self,
            table=self.table.to(like),
            mapper=mapper,
            aligned=None if self.aligned is None else self.aligned.to(like),
            factors=None if self.factors is None else self.factors.to(like),
        )

    def __call__(self, step: int, source: Tensor, target: Tensor) -> Tensor:
        """The target's map (h, S, N): alpha R(a_src, a_tgt) + (1 - alpha) a_tgt (AttentionControlEdit.forward).

        Args:
            step: number of the sampling step, 0 is the noisiest.
            source: a_src (h, S, N), probabilities.
            target: a_tgt, same shape.
        """
        taken = source
        if self.mapper is not None and self.mapper.dim() == 2:
            taken = source @ self.mapper
        elif self.mapper is not None:
            assert self.aligned is not None, "a refinement knows which tokens are aligned"
            taken = source[..., self.mapper] * self.aligned + target * (1 - self.aligned)
        if self.factors is not None:
            taken = taken * self.factors
        alpha = self.table[step]
        return taken * alpha + (1 - alpha) * target


def blend_mask(maps: Tensor, tokens: Tensor, size: tuple[int, int], threshold: float, pool: bool = True) -> Tensor:
    """Where chosen words look, and where the source's do: (B, 1, H, W) bool (LocalBlend in the authors' notebook).

    Args:
        maps: (B, G, s, s, N), sums or means of cross-attention maps.
        tokens: (B, N), 1 for the tokens of each row's words.
        size: (H, W) of the latents.
        threshold: share of a row's own maximum.
        pool: widen by one position on each side.
    """
    seen = (maps * tokens[:, None, None, None]).sum(-1).mean(1, keepdim=True)
    if pool:
        seen = F.max_pool2d(seen, 3, stride=1, padding=1)
    seen = F.interpolate(seen, size=size)
    mask = seen / seen.amax((2, 3), keepdim=True) > threshold
    return mask[:1] | mask


def blend(latents: Tensor, mask: Tensor) -> Tensor:
    """Outside the mask every row becomes the source's: z_0 + mask (z - z_0), rows (B, C, H, W)."""
    return latents[:1] + mask.to(latents) * (latents - latents[:1])


def square(maps: Tensor) -> Tensor:
    """(..., S, N) -> (..., s, s, N), of square latents."""
    side = round(maps.shape[-2] ** 0.5)
    return maps.unflatten(-2, (side, side))


def tokens_mask(positions: list[int], length: int) -> Tensor:
    """(N,) with 1 at the positions."""
    mask = torch.zeros(length)
    mask[positions] = 1
    return mask
