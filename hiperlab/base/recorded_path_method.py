"""Editing methods that read the picture's whole path to its noise while they draw, and keep it.

Axes: T steps, C latent channels, H, W latent sides.
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from hiperlab.base.editing_method import EditingMethod, EditorSettings
from hiperlab.edit.prompt_to_prompt import PromptToPrompt
from hiperlab.model.shared_calls import Calls


class RecordedPathMethod(EditingMethod):
    """Artifacts keep the path (T+1, C, H, W), from the picture to its noise: its end alone would not do.

    Args:
        p2p: how attention maps are taken over.
        editor: as in `EditingMethod`.
    """

    path: Tensor

    def __init__(self, p2p: PromptToPrompt, **editor: Unpack[EditorSettings]) -> None:
        super().__init__(p2p=p2p, inject_source_latents=True, **editor)
        self.register_buffer("path", torch.zeros(self.steps + 1, *self.model.latent_shape))

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
