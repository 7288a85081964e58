"""Copier: the concept's first picture, whatever a text says. No method but a test of scores (no paper).

A score that ranks it first rewards copying: any likeness to the training pictures does (CLIP-I, DINO). One number to
compare methods by must rank it last, see `likeness_in_context` in conf/metric/mini_full.yaml.
Axes: K concepts (always 1 here), B pictures, H = W picture sides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from hiperlab.base.capability import ReadsPicture
from hiperlab.base.method import Method, Step, Subject
from hiperlab.errors import UserError
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.sampler import Sampler
from hiperlab.model.shared_calls import Calls
from hiperlab.model.stack import FrozenStack


class Copier(Method, ReadsPicture):
    """Draws nothing: every picture is the first training picture, as training would see it.

    Args:
        model: the frozen stack, which is never asked for a picture.
        concepts: whose pictures.
        optimizer: unused, nothing is trained.
        seed: unused.
    """

    stacks_concepts = False
    why_no_early_stop = "this method trains nothing"

    pictures: Tensor

    def __init__(
        self,
        model: FrozenStack,
        concepts: Sequence[Subject],
        optimizer: Callable[..., Optimizer],
        seed: int,
    ) -> None:
        super().__init__(model, concepts, optimizer, seed)
        self.register_buffer("pictures", torch.full((1, 3, model.size, model.size), torch.nan))  # (K, …), K is 1

    def set_reference(self, index: int, picture: Tensor) -> None:
        """Take concept `index`'s first picture (3, H, H) in [-1, 1]."""
        self.pictures[index] = picture.to(self.pictures)

    def condition(self, step: Step) -> Conditioning:
        """The texts with the class noun (1, R, N, D): what the frozen model would be asked."""
        texts = [self.concepts[k].with_class_noun(p) for p, k in zip(step.prompts, step.concept.tolist(), strict=True)]
        return self.model.condition_text(texts)

    @property
    def finished(self) -> bool:
        """There is nothing to train."""
        return True

    def sample_calls(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int,
        guidance: float,
        concepts: Sequence[int] | None = None,
        images: Tensor | None = None,
        sampler: Sampler | None = None,
        variant: str = "",
        negative: str | None = None,
        batch_size: int = 8,
    ) -> Calls[Tensor]:
        """The pictures (B, 3, H, W) in [0, 1], without a single call; only their number counts.

        Raises:
            UserError: a concept has no picture yet.
        """
        yield from ()
        if self.pictures.isnan().any():
            raise UserError("Copier has no picture: call set_reference(0, picture), or load an artifact.")
        return (self.pictures.cpu() + 1).div(2).expand(len(prompts), -1, -1, -1)
