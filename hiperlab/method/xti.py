"""XTI, extended textual inversion (P+, Voynov et al. 2023): one vector per cross-attention layer.

P+ has no official code. One text per layer reaches attention as in NeTI's models/xti_attention_processor.py
(XTIAttenProc); files are those of cloneofsimo/promptplusplus.
Axes: K concepts, L layers, R rows, N tokens, D text width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim import Optimizer

from hiperlab.base.capability import Composable, Exportable
from hiperlab.base.method import Method, Step, Subject
from hiperlab.errors import UserError
from hiperlab.formats import embedding
from hiperlab.model.conditioning import Conditioning, Part
from hiperlab.model.stack import FrozenStack
from hiperlab.model.text import numbered_slots


class ExtendedTextualInversion(Method, Composable, Exportable):
    """Sixteen vectors per concept, one for each cross-attention layer, constant in time.

    Args:
        model: the frozen stack.
        concepts: what is personalised; all sixteen vectors start from the embedding of the class noun.
        optimizer: parameters -> optimizer.
        seed: of the draws.
    """

    def __init__(
        self, model: FrozenStack, concepts: Sequence[Subject], optimizer: Callable[..., Optimizer], seed: int
    ) -> None:
        super().__init__(model, concepts, optimizer, seed)
        words = torch.stack([model.word_embedding(concept.word) for concept in concepts])
        self.vectors = nn.Parameter(words[:, None].repeat(1, model.layers, 1))  # (K, L, D)
        self.slots = numbered_slots([concept.placeholder for concept in concepts])

    def condition(self, step: Step) -> Conditioning:
        """v_l stands for the word in layer l: (L, R, N, D), all layers in one pass of the text encoder."""
        tokens = self.model.tokenize(step.prompts, self.slots)
        _, _, slots = tokens.occurrences()
        states = self.model.hidden_states(tokens, self.vectors[slots].transpose(0, 1))
        return Conditioning(self.model.normalise_text(states))

    def composition_part(self, step: Step) -> Part:
        """v_l for the word in layer l, (L, 1, 1, D)."""
        return Part(step.prompts, self.vectors[0, :, None, None])

    def export(self, index: int, folder: Path, steps: int) -> list[Path]:
        """Promptplusplus' form: keys `<name-{layer}-{vector}>`, each (D,) float32."""
        name = self.concepts[index].placeholder.strip("<>")
        rows = self.vectors[index].detach().float().cpu()
        tensors = {f"<{name}-{layer}-0>": row.clone() for layer, row in enumerate(rows)}
        path = folder / "promptplusplus.safetensors"
        save_file(tensors, path, metadata=dict.fromkeys(tensors, "<embed>"))
        return [path]

    def load_foreign(self, index: int, path: Path) -> None:
        """A promptplusplus file: one vector per layer, keys `<name-{layer}-0>`."""
        rows = {}
        for key, row in embedding.tensors(path).items():
            if found := re.fullmatch(r"<?.+-(\d+)-(\d+)>?", key):
                rows[int(found[1]), int(found[2])] = row.float()
        wanted = [(layer, 0) for layer in range(self.model.layers)]
        if sorted(rows) != wanted or any(row.shape != (self.model.width,) for row in rows.values()):
            raise UserError(
                f"{path.name} holds {len(rows)} layer vectors, expected {len(wanted)} of width {self.model.width}: "
                "one per cross-attention layer, named <name-0-0> to <name-15-0>."
            )
        with torch.no_grad():
            self.vectors[index].copy_(torch.stack([rows[key] for key in wanted]))
