"""What the frozen model draws of plain texts: no concept, no method."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hiperlab.model.conditioning import Conditioning
from hiperlab.model.sampler import Sampler, generate
from hiperlab.model.stack import FrozenStack


@torch.no_grad()
def draw_plain(
    stack: FrozenStack, texts: Sequence[str], seeds: Sequence[int], sampler: Sampler, negative: str | None
) -> Tensor:
    """One picture per text and seed, in one batch, with guidance (Ho & Salimans 2022, eq. 6).

    Args:
        stack: the frozen model.
        texts: B of them.
        seeds: B seeds of the start noise.
        sampler: scheduler, its steps and guidance.
        negative: text of the unconditional branch; None for an absent one.

    Returns:
        (B, 3, H, W) in [0, 1], on the CPU.
    """

    def condition(rows: list[int], t: Tensor) -> Conditioning:
        return stack.condition_text([texts[row] for row in rows])

    return generate(
        stack,
        condition,
        keys=list(texts),
        seeds=seeds,
        steps=sampler.steps,
        guidance=sampler.guidance,
        sampler=sampler,
        negative=stack.condition_negative(negative),
        batch_size=len(seeds),
        time_dependent=False,
    )
