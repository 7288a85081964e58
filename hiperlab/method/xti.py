"""XTI, extended textual inversion (P+, Voynov et al. 2023): one vector per cross-attention layer.

P+ has no official code. One text per layer reaches attention as in NeTI's models/xti_attention_processor.py
(XTIAttenProc); files are those of cloneofsimo/promptplusplus.
P+ is defined for SD 1.x. In SDXL several layers share a transformer, so that a vector may belong to a transformer or to
a layer; the pooled row, which belongs to neither, reads a vector of its own.
Axes: K concepts, L layers, S sites (L or the transformers), R rows, N tokens, D text width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from hiperlab.base.capability import Composable, Exportable
from hiperlab.base.method import Method, Step, Subject
from hiperlab.errors import UserError
from hiperlab.formats import embedding
from hiperlab.model.conditioning import Conditioning, Part
from hiperlab.model.stack import FrozenStack
from hiperlab.model.text import numbered_slots

SITES = ("transformers", "layers")


class ExtendedTextualInversion(Method, Composable, Exportable):
    """Sixteen vectors per concept, one for each cross-attention layer, constant in time.

    Args:
        model: the frozen stack.
        concepts: what is personalised; all vectors start from the embedding of the class noun.
        optimizer: parameters -> optimizer.
        seed: of the draws.
        sites: whose vectors differ: "transformers" (11 in SDXL) or "layers" (70 there); the same 16 in SD 1.x and 2.x.
    """

    fixed_settings = ("sites",)

    def __init__(
        self,
        model: FrozenStack,
        concepts: Sequence[Subject],
        optimizer: Callable[..., Optimizer],
        seed: int,
        sites: str,
    ) -> None:
        super().__init__(model, concepts, optimizer, seed)
        if sites not in SITES:
            raise UserError(f"method.sites={sites!r} is unknown. Choose {' or '.join(SITES)}.")
        self.sites = sites
        place = torch.tensor(model.transformers if sites == "transformers" else range(model.layers))
        self.place: Tensor
        self.register_buffer("place", place, persistent=False)  # (L,) the site of each layer
        words = torch.stack([model.word_embedding(concept.word) for concept in concepts])
        self.vectors = nn.Parameter(words[:, None].repeat(1, int(place.max()) + 1, 1))  # (K, S, D)
        self.pooled_vector = nn.Parameter(words.clone()) if model.pools else None  # (K, D)
        self.slots = numbered_slots([concept.placeholder for concept in concepts])

    def condition(self, step: Step) -> Conditioning:
        """v_l stands for the word in layer l: (L, R, N, D), all layers in one pass of the text encoder."""
        tokens = self.model.tokenize(step.prompts, self.slots)
        _, _, slots = tokens.occurrences()
        common = None if self.pooled_vector is None else self.pooled_vector[slots][None]
        found = self.model.condition_tokens(tokens, self.vectors[slots].transpose(0, 1), common)
        return found if found.layers == len(self.place) else found.reading(found.keys[self.place])

    def composition_part(self, step: Step) -> Part:
        """v_l for the word in layer l, (L, 1, 1, D)."""
        common = None if self.pooled_vector is None else self.pooled_vector[None, :1, None]
        return Part(step.prompts, self.vectors[0][self.place][:, None, None], pooled_vectors=common)

    def export(self, index: int, folder: Path, steps: int) -> list[Path]:
        """Promptplusplus' form: keys `<name-{layer}-{vector}>`, each (D,) float32; it has no place for SDXL's."""
        if self.model.pools:
            return []
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
        if self.model.pools:
            raise UserError(f"{path.name}: no file of layer vectors is known for SDXL. Give hiperlab's own artifact.")
        wanted = [(layer, 0) for layer in range(self.model.layers)]
        if sorted(rows) != wanted or any(row.shape != (self.model.width,) for row in rows.values()):
            raise UserError(
                f"{path.name} holds {len(rows)} layer vectors, expected {len(wanted)} of width {self.model.width}: "
                "one per cross-attention layer, named <name-0-0> to <name-15-0>."
            )
        with torch.no_grad():
            self.vectors[index].copy_(torch.stack([rows[key] for key in wanted]))
