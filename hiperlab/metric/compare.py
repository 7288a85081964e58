"""Embeddings -> similarities: the arithmetic of every score, free of any network.

Axes: B generated pictures, R references, D embedding width. Embeddings are unit vectors; a row of NaN means that the
encoder found nothing to embed (no face, say).
"""

from __future__ import annotations

import torch
from torch import Tensor


def usable(embeddings: Tensor) -> Tensor:
    """The rows of (B, D) that are embeddings: (B', D)."""
    return embeddings[~embeddings.isnan().any(-1)]


def unit(embeddings: Tensor) -> Tensor:
    """Scale the rows of (B, D) to length 1, in float32."""
    return torch.nn.functional.normalize(embeddings.float(), dim=-1)


def rescale(cosine: Tensor, scale: str) -> Tensor:
    """Cosines in the unit a paper prints them in.

    "cosine" leaves them, "percent" multiplies by 100 (DreamBench++), "clipscore" is 2.5 max(cos, 0) (Hessel et al.
    2021, w = 2.5; CustomConcept101's text alignment).
    """
    if scale == "cosine":
        return cosine
    if scale == "percent":
        return 100 * cosine
    assert scale == "clipscore", scale
    return 2.5 * cosine.clamp(min=0)


def text_similarity(images: Tensor, texts: Tensor, scale: str) -> Tensor:
    """Each picture with its own text: (B, D), (B, D) -> (B,)."""
    return rescale((images * texts).sum(-1), scale)


def image_similarity(images: Tensor, references: Tensor, scale: str, pairing: str) -> Tensor:
    """Each picture with all references, as their mean or their maximum: (B, D), (R, D) -> (B,).

    References without an embedding do not count; a picture without one, or no usable reference, gives NaN.
    """
    real = usable(references)
    if not len(real):
        return torch.full((len(images),), torch.nan, device=images.device)
    pairs = rescale(images @ real.T, scale)  # (B, R); scaled before pairing, as "clipscore" is not linear
    return _pair(pairs, pairing)


def real_similarity(references: Tensor, scale: str, pairing: str) -> Tensor:
    """Each reference with all others, itself left out: (R, D) -> (R', ), R' = usable references, empty below two.

    This is the score of a perfect picture, the ceiling of a protocol.
    """
    real = usable(references)
    count = len(real)
    if count < 2:
        return real.new_empty(0)
    pairs = rescale(real @ real.T, scale)
    others = ~torch.eye(count, dtype=torch.bool, device=pairs.device)
    return _pair(pairs[others].view(count, count - 1), pairing)


def _pair(pairs: Tensor, pairing: str) -> Tensor:
    """Reduce (B, R) to (B,)."""
    if pairing == "mean":
        return pairs.mean(-1)
    assert pairing == "max", pairing
    return pairs.amax(-1)
