"""Galleries of drawn subjects: held-out identities of the same kind of thing, always the same ones."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from PIL import Image

from hiperlab.errors import UserError
from hiperlab.metric.extractor import Encoder
from hiperlab.metric.gallery import GalleryConfig, GalleryEncoder
from hiperlab.metric.world.extractor import WORLD, known_subject
from hiperlab.world.subjects import HELD_OUT, held_out, views_of


class WorldGalleryEncoder(GalleryEncoder):
    """See `WorldGallery`."""

    def __init__(self, encoder: Encoder, views: int, identities: int, first: int, size: int) -> None:
        super().__init__(encoder, views)
        self.identities, self.first, self.size = identities, first, size
        self.weights = hashlib.sha256(f"{encoder.weights} {WORLD}".encode()).hexdigest()[:12]

    def key(self, concept: str) -> str | None:
        """The kind; with the name where one of its identities is the concept's own."""
        who = known_subject(concept)
        if who is None:
            return None
        return f"{who.kind} {concept}" if who in [held_out(seed, who.kind) for seed in self._seeds()] else who.kind

    def pictures(self, concept: str) -> list[Image.Image]:
        """Views of all identities of the concept's kind but its own."""
        who = known_subject(concept)
        assert who is not None, f"{concept} has no key"
        others = {seed: found for seed in self._seeds() if (found := held_out(seed, who.kind)) != who}
        return [view for seed, other in others.items() for view in views_of(other, seed, self.size, self.views)]

    def _seeds(self) -> range:
        return range(self.first, self.first + self.identities)


@dataclass(frozen=True)
class WorldGallery(GalleryConfig):
    """Views of other identities of the concept's kind; concepts that the world does not know have no gallery.

    Attributes:
        identities: how many others.
        first: seed of the first one, as `data.identity_seed`.
        size: side of their pictures in pixels, as the drawn ones'.
    """

    identities: int
    first: int
    size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.identities < 1 or not 0 <= self.first <= len(HELD_OUT) - self.identities or self.size < 64:
            raise UserError(
                f"{self}: needs 1 identity or more, seeds from 0 to {len(HELD_OUT) - 1} and size 64 or more."
            )

    def load(self, key: str) -> Encoder:
        """Build the encoder; pictures are drawn when they are first asked for."""
        inner = self.encoder.load(f"{key}.encoder")
        return WorldGalleryEncoder(inner, self.views, self.identities, self.first, self.size)
