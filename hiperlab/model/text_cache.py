"""Text states: plain ones, worked out once per text as the text encoder is frozen, and those of several encoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hiperlab.model.conditioning import Conditioning, concatenate
from hiperlab.model.stack import FrozenStack

MOST = 1024  # texts kept; at SD's 77 x 768 in float32 240 MB, at SDXL's 77 x 2048 650


class TextCache:
    """`stack.condition_text` for texts that come again and again.

    Args:
        stack: the frozen model; may change its type or device later.
    """

    def __init__(self, stack: FrozenStack) -> None:
        self.stack = stack
        self.kept: dict[tuple[str, torch.dtype, torch.device], Conditioning] = {}

    @torch.no_grad()
    def condition(self, texts: Sequence[str]) -> Conditioning:
        """What the U-Net reads of B texts (1, B, N, D); each is encoded alone, whatever the others of the call are."""
        kind = next(self.stack.text.parameters()).dtype
        keys = [(text, kind, self.stack.device) for text in texts]
        missing = [key for key in dict.fromkeys(keys) if key not in self.kept]
        if len(self.kept) + len(missing) > MOST:
            self.kept.clear()
            missing = list(dict.fromkeys(keys))
        for key in missing:
            self.kept[key] = self.stack.condition_text([key[0]])
        return concatenate([self.kept[key] for key in keys])

    def negative(self, texts: Sequence[str | None]) -> Conditioning:
        """What guidance's unconditional branch reads of B negative texts (1, B, N, D), None for an absent one."""
        return concatenate([self.stack.as_negative(text, self.condition([text or ""])) for text in texts])

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Their states alone, (B, N, D)."""
        return self.condition(texts).keys[0]


def by_concept(
    texts: Sequence[str], concepts: Sequence[int], encode: Callable[[Sequence[str], int], Conditioning]
) -> Conditioning:
    """What the U-Net reads of R texts (1, R, N, D), each through its concept's own text encoder.

    Args:
        texts: R of them.
        concepts: number of each text's concept.
        encode: texts and a concept's number -> what is read of them (1, B, N, D).
    """
    order, parts = [], []
    for index in dict.fromkeys(concepts):
        rows = [row for row, number in enumerate(concepts) if number == index]
        parts.append(encode([texts[row] for row in rows], index))
        order += rows
    return concatenate(parts).rows([order.index(row) for row in range(len(texts))])
