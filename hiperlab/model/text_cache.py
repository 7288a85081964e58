"""Plain text states, worked out once per text: the text encoder is frozen, so a text always means the same numbers."""

from __future__ import annotations

from collections.abc import Sequence

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
