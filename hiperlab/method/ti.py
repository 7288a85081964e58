"""Textual Inversion (Gal et al. 2022): learn the input embedding of one new word, everything else stays frozen.

As the authors' ldm/modules/embedding_manager.py (rinongal/textual_inversion, EmbeddingManager) and diffusers'
examples/textual_inversion/textual_inversion.py.
Axes: K concepts, V vectors per concept, R rows, N tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from hiperlab.base.capability import Composable, Exportable
from hiperlab.base.method import Method, Step, Subject
from hiperlab.errors import UserError
from hiperlab.formats import embedding
from hiperlab.model.conditioning import Conditioning, Part
from hiperlab.model.stack import FrozenStack
from hiperlab.model.text import numbered_slots


class TextualInversion(Method, Composable, Exportable):
    """One vector (or V consecutive ones) per concept, read by all layers at all timesteps.

    In SDXL a vector is one row of each text encoder, side by side; the gradient comes through the pooled row, too.

    Training a row of its own equals training that row of the embedding matrix: AdamW acts per element.

    Args:
        model: the frozen stack.
        concepts: what is personalised; each starts from the embedding of its class noun.
        optimizer: parameters -> optimizer.
        seed: of the draws.
        num_vectors: V; the placeholder takes V tokens of the prompt.
    """

    def __init__(
        self,
        model: FrozenStack,
        concepts: Sequence[Subject],
        optimizer: Callable[..., Optimizer],
        seed: int,
        num_vectors: int,
    ) -> None:
        super().__init__(model, concepts, optimizer, seed)
        if not 1 <= num_vectors <= 60:
            raise UserError(f"method.num_vectors={num_vectors} is out of range. Choose 1 to 60; papers use 1 to 8.")
        words = torch.stack([model.word_embedding(concept.word) for concept in concepts])
        self.vectors = nn.Parameter(words[:, None].repeat(1, num_vectors, 1))  # (K, V, D)
        self.slots = numbered_slots([concept.placeholder for concept in concepts], num_vectors)

    def condition(self, step: Step) -> Conditioning:
        """The V vectors stand for the word in every layer: (1, R, N, D)."""
        tokens = self.model.tokenize(step.prompts, self.slots)
        _, _, slots = tokens.occurrences()
        return self.model.condition_tokens(tokens, self.vectors.flatten(0, 1)[slots][None])

    def composition_part(self, step: Step) -> Part:
        """The vectors (1, 1, V, D) for the word."""
        return Part(step.prompts, self.vectors[None, :1])

    def export(self, index: int, folder: Path, steps: int) -> list[Path]:
        """Diffusers' `learned_embeds.safetensors` and `.bin`, and A1111's `<name>.pt`; of SDXL the pair `<name>`."""
        subject = self.concepts[index]
        vectors = self.vectors[index].detach().float().cpu()
        return embedding.write(folder, subject.name, subject.placeholder, vectors, self.model.name, self.model.widths)

    def load_foreign(self, index: int, path: Path) -> None:
        """Any embedding file that is around: diffusers, CompVis, A1111, a bare tensor."""
        vectors = embedding.read_like(path, self.vectors[index], "method.num_vectors={}", self.model.widths)
        with torch.no_grad():
            self.vectors[index].copy_(vectors)
