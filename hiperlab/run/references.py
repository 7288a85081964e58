"""What drawn pictures of an edit are judged against and shown beside, as methods see it."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from hiperlab.data.concept import Concept
from hiperlab.data.images import to_pixels
from hiperlab.metric.edit.distance import EditReference
from hiperlab.report.grid import to_pil


def edits(concepts: Sequence[Concept], size: int) -> dict[str, EditReference]:
    """What the edits among the concepts are judged against, cropped as methods see it at `size` pixels a side."""
    found = {}
    for concept in concepts:
        if concept.edit:
            truths = {text: truth for text, truth in zip(concept.edit.targets, concept.edit.truths) if truth}
            mask = concept.edit.mask and crop(concept.edit.mask.convert("RGB"), size)
            found[concept.name] = EditReference(crop(concept.views[0], size), concept.edit.source, truths, mask)
    return found


def crop(picture: Image.Image, size: int) -> Image.Image:
    """A picture as edit methods see it."""
    pixels = to_pixels(picture, size, "middle", flip=False)
    return to_pil((pixels[None] + 1) / 2)[0]
