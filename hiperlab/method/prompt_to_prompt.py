"""Prompt-to-Prompt (Hertz et al. 2022): a generated picture, edited by changing its text under its attention maps.

As the authors' prompt-to-prompt_stable.ipynb. The picture is the one that the source text draws from a seed's noise;
the concept's own picture is not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.optim import Optimizer

from hiperlab.base.editing_method import EditingMethod
from hiperlab.base.method import Subject
from hiperlab.edit import prompt_to_prompt as editing
from hiperlab.model.sampler import initial_noise
from hiperlab.model.shared_calls import Calls
from hiperlab.model.stack import FrozenStack


class PromptToPrompt(EditingMethod):
    """Every seed has a source of its own, which all its targets follow.

    Args:
        model: the frozen stack.
        concepts: a source text with its targets.
        optimizer: unused, nothing is fitted.
        seed: unused, pictures have seeds of their own.
        steps: T.
        p2p: how attention maps are taken over.
    """

    seeded = True
    sampling_settings = ("p2p",)

    def __init__(
        self,
        model: FrozenStack,
        concepts: Sequence[Subject],
        optimizer: Callable[..., Optimizer],
        seed: int,
        steps: int,
        p2p: editing.PromptToPrompt,
    ) -> None:
        super().__init__(model, concepts, optimizer, seed, steps, p2p, inject_source_latents=False, cache=None)

    def set_reference(self, index: int, picture: Tensor) -> None:
        """Leave the picture (3, H, W) alone: the source is drawn, not read."""

    def start_calls(self, seed: int) -> Calls[Tensor]:
        """The seed's unit normal noise (1, C, H, W)."""
        yield from ()  # asks nothing
        return initial_noise([seed], self.model.latent_shape).to(self.noise)

    def trainable_state(self) -> dict[str, Tensor]:
        """An empty mapping: nothing is learnt, and no noise is kept."""
        return {}

    def artifact(self, index: int) -> dict[str, Tensor]:
        """An empty mapping: there is nothing to keep."""
        return {}
