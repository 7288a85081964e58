"""Ground-truth scores of the world: attributes read from a picture against those its prompt names.

Identity similarity is `metric.torchmetric.Identity` over `recipe.FolderIdentity`; distances to the rendered truth
are in distance.py. Pictures and prompts go in; no stack, no method.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hiperlab.metric.compare import rescale
from hiperlab.metric.torchmetric import Similarity
from hiperlab.metric.world.network import Judge
from hiperlab.world.caption import PLAIN, parse


def said_attributes(prompt: str, placeholder: str | None = None, kind: str | None = None) -> dict[str, str]:
    """What a picture of a prompt must show.

    Kind, pose and place only where they are named; silence about style, accessory and light means the plain ones, as
    in the world's captions.

    Args:
        prompt: in the world's grammar; unknown words are passed over.
        placeholder: what stands for the subject ("<cats>"), if anything does.
        kind: the subject's kind, for prompts with a placeholder.
    """
    said = parse(prompt, placeholder, kind)
    plain = {name: value for name, value in PLAIN.items() if name != "close"}
    wanted = plain | {name: said[name] for name in ("kind", "pose", "place", *plain) if name in said}
    return {name: str(value) for name, value in wanted.items()}


@torch.no_grad()
def read_attributes(judge: Judge, pixels: Tensor) -> list[dict[str, str]]:
    """What the reader sees in pictures (B, 3, size, size) in [-1, 1]: per picture attribute -> value."""
    chosen = {name: output.argmax(1).tolist() for name, output in judge(pixels).items()}
    labels = judge.shape.labels
    return [{name: labels[name][column[i]] for name, column in chosen.items()} for i in range(len(pixels))]


def matches(seen: Tensor, said: Tensor, columns: slice) -> Tensor:
    """1 where what is seen is what is said, 0 where not, NaN where nothing is said: (B, D), (B, D) one-hot -> (B,)."""
    said = said[:, columns]
    hit = (seen[:, columns] * said).sum(1)
    return torch.where(said.sum(1) > 0, hit, torch.full_like(hit, torch.nan))


class AttributeMatch(Similarity):
    """One attribute as a protocol's score: 1 where it is read as prompted.

    Args:
        encoder: from `recipe.FolderReader`.
        scale: "cosine" leaves 0 and 1, "percent" multiplies by 100.
        attribute: which one.
    """

    def __init__(self, encoder: Any, scale: str, attribute: str) -> None:
        super().__init__(encoder, scale)
        self.attribute = attribute

    def measure(self, embeddings: Tensor, targets: Tensor) -> Tensor:
        """(B, D), (B, D) one-hot -> (B,)."""
        places: Any = self.encoder.places
        return rescale(matches(embeddings, targets, places[self.attribute]), self.scale)

    def embed(self, targets: Sequence[str]) -> Tensor:
        """B prompts -> (B, D) one-hot."""
        return self.encoder.texts(targets)
