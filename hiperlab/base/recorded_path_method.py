"""Editing methods that read the picture's whole path to its noise while they draw, and keep it.

Axes: T steps, C latent channels, H, W latent sides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from hiperlab.base.editing_method import EditingMethod
from hiperlab.base.method import Subject
from hiperlab.edit.prompt_to_prompt import PromptToPrompt
from hiperlab.model.shared_calls import Calls
from hiperlab.model.stack import FrozenStack


class RecordedPathMethod(EditingMethod):
    """Artifacts keep the path (T+1, C, H, W), from the picture to its noise: its end alone would not do.

    Args:
        model: the frozen stack.
        concepts: one picture with its source text and, where known, its targets.
        optimizer: parameters -> optimizer; unused by methods that train nothing.
        seed: of draws.
        steps: T, of every drawing.
        p2p: how attention maps are taken over.
        cache: folder of kept inversions; None keeps them in memory.
    """

    path: Tensor

    def __init__(
        self,
        model: FrozenStack,
        concepts: Sequence[Subject],
        optimizer: Callable[..., Optimizer],
        seed: int,
        steps: int,
        p2p: PromptToPrompt,
        cache: str | None,
    ) -> None:
        super().__init__(model, concepts, optimizer, seed, steps, p2p, inject_source_latents=True, cache=cache)
        self.register_buffer("path", torch.zeros(steps + 1, *model.latent_shape))

    def set_reference(self, index: int, picture: Tensor) -> None:
        """Take the picture (3, 8H, 8W) in [-1, 1]; it is inverted when first needed."""
        super().set_reference(index, picture)
        self.path.zero_()

    def start_calls(self, seed: int) -> Calls[Tensor]:
        """The path's end (1, C, H, W)."""
        if not self.path.any():
            yield from self.prepare_calls()
            self.path.copy_(self.pivot)
        return self.path[-1:]
