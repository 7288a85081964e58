"""Text states: plain ones, worked out once per text as the text encoder is frozen, and those of several encoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hiperlab.model.stack import FrozenStack

MOST = 1024  # texts kept; at SD's 77 x 768 in float32 240 MB


class TextCache:
    """`stack.encode_text` for texts that come again and again.

    Args:
        stack: the frozen model; may change its type or device later.
    """

    def __init__(self, stack: FrozenStack) -> None:
        self.stack = stack
        self.kept: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """States (B, N, D) of B texts; each is encoded alone, so that it does not depend on the others of the call."""
        kind = next(self.stack.text.parameters()).dtype
        keys = [(text, kind, self.stack.device) for text in texts]
        missing = [key for key in dict.fromkeys(keys) if key not in self.kept]
        if len(self.kept) + len(missing) > MOST:
            self.kept.clear()
            missing = list(dict.fromkeys(keys))
        for key in missing:
            self.kept[key] = self.stack.encode_text([key[0]])[0]
        return torch.stack([self.kept[key] for key in keys])


def by_concept(texts: Sequence[str], concepts: Sequence[int], encode: Callable[[Sequence[str], int], Tensor]) -> Tensor:
    """States (R, N, D) of R texts, each through its concept's own text encoder.

    Args:
        texts: R of them.
        concepts: number of each text's concept.
        encode: texts and a concept's number -> their states (B, N, D).
    """
    found: dict[int, Tensor] = {}
    for index in dict.fromkeys(concepts):
        rows = [row for row, number in enumerate(concepts) if number == index]
        found.update(zip(rows, encode([texts[row] for row in rows], index), strict=True))
    return torch.stack([found[row] for row in range(len(texts))])
