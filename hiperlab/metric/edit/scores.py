"""Members of a protocol for edits: drawn pictures of one source against it, its text and the true results.

A score that does not exist (no mask, no truth, a text that does not change) is NaN: such pictures have no value.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hiperlab.errors import UserError
from hiperlab.metric.compare import text_similarity
from hiperlab.metric.contract import SCALES, EmbeddedPictures, Measurement, Score, cleaned
from hiperlab.metric.edit.distance import EditReference, direction, mse, psnr, ssim, structure_distance, truth_distance
from hiperlab.metric.extractor import Encoder
from hiperlab.metric.rows import PICTURE

BATCH = 16  # pictures a pass of the costly encoders


@dataclass(frozen=True)
class EditScore(Score):
    """One score of edits.

    Attributes:
        encoder: key into the protocol's encoders.
    """

    @abstractmethod
    def measure(
        self, encoder: Encoder, pictures: Sequence[Image.Image], texts: Sequence[str], reference: EditReference
    ) -> Tensor:
        """Scores (B,) of B pictures of one source, each drawn for its own plain text."""

    def measurements(self, pictures: EmbeddedPictures) -> Iterator[Measurement]:
        """One number per picture of an edit; scores of the source are of pictures drawn for its text only."""
        for concept, reference in pictures.edits.items():
            records = [pictures.records[number] for number in pictures.of(concept)]
            texts = [cleaned(record, "noun") for record in records]
            if self.of_source:
                own = " ".join(reference.source_text.split())  # as `clean` spaces it
                records = [record for record, text in zip(records, texts, strict=True) if text == own]
                texts = [own] * len(records)
            if records:
                values = self.measure(pictures.encoder, pictures.opened(records), texts, reference)
                for record, value in zip(records, values.tolist(), strict=True):
                    yield Measurement(PICTURE, value, concept, record)


@dataclass(frozen=True)
class DirectionScore(EditScore):
    """CLIP directional similarity; the source text itself has none."""

    def measure(
        self, encoder: Encoder, pictures: Sequence[Image.Image], texts: Sequence[str], reference: EditReference
    ) -> Tensor:
        """Cosines (B,)."""
        words = encoder.texts([reference.source_text, *texts])
        every = [reference.source, *pictures]
        seen = torch.cat([encoder.images(every[start : start + BATCH]) for start in range(0, len(every), BATCH)])
        return direction(seen[1:], seen[0], words[1:], words[0])


@dataclass(frozen=True)
class StructureScore(EditScore):
    """Structure distance to the source: how far the layout went, whatever the colours."""

    lower: ClassVar[bool] = True

    def measure(
        self, encoder: Encoder, pictures: Sequence[Image.Image], texts: Sequence[str], reference: EditReference
    ) -> Tensor:
        """Distances (B,)."""
        source = encoder.patches([reference.source])
        parts = [
            structure_distance(encoder.patches(pictures[start : start + BATCH]), source)
            for start in range(0, len(pictures), BATCH)
        ]
        return torch.cat(parts)


@dataclass(frozen=True)
class PerceptualScore(EditScore):
    """LPIPS to the source."""

    lower: ClassVar[bool] = True

    def measure(
        self, encoder: Encoder, pictures: Sequence[Image.Image], texts: Sequence[str], reference: EditReference
    ) -> Tensor:
        """Distances (B,)."""
        return _perceptual(encoder, pictures, reference.source)


@dataclass(frozen=True)
class BackgroundPerceptual(EditScore):
    """LPIPS to the source where the edit must change nothing, black elsewhere (PIE-Bench)."""

    lower: ClassVar[bool] = True

    def measure(
        self, encoder: Encoder, pictures: Sequence[Image.Image], texts: Sequence[str], reference: EditReference
    ) -> Tensor:
        """Distances (B,)."""
        kept = _kept(reference, edited=False)
        if kept is None:
            return _nothing(len(pictures))
        first, *rest = [_cut(picture, kept, reference.source) for picture in (reference.source, *pictures)]
        return _perceptual(encoder, rest, first)


@dataclass(frozen=True)
class EditedTextScore(EditScore):
    """CLIP-T of the part that may change, black elsewhere (PIE-Bench).

    Attributes:
        scale: "cosine", "percent" or "clipscore", as in CLIP-T of the whole picture.
    """

    scale: str
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {"scale": SCALES}

    def measure(
        self, encoder: Encoder, pictures: Sequence[Image.Image], texts: Sequence[str], reference: EditReference
    ) -> Tensor:
        """Scores (B,)."""
        kept = _kept(reference, edited=True)
        if kept is None:
            return _nothing(len(pictures))
        cut = [_cut(picture, kept, reference.source) for picture in pictures]
        seen = torch.cat([encoder.images(cut[start : start + BATCH]) for start in range(0, len(cut), BATCH)])
        return text_similarity(seen, encoder.texts(texts), self.scale).cpu()


@dataclass(frozen=True)
class ReconstructionPsnr(EditScore):
    """Peak signal-to-noise ratio in dB between the source and what is drawn for its own text."""

    of_source: ClassVar[bool] = True

    def measure(
        self, encoder: Encoder, pictures: Sequence[Image.Image], texts: Sequence[str], reference: EditReference
    ) -> Tensor:
        """Decibels (B,)."""
        return psnr(encoder.pixels(pictures), encoder.pixels([reference.source]))


@dataclass(frozen=True)
class _Background(EditScore):
    """The part that must not change, black elsewhere in both pictures (PIE-Bench's rule)."""

    def measure(
        self, encoder: Encoder, pictures: Sequence[Image.Image], texts: Sequence[str], reference: EditReference
    ) -> Tensor:
        """Scores (B,)."""
        if reference.mask is None:
            return _nothing(len(pictures))
        kept = (encoder.pixels([reference.mask]).mean(1, keepdim=True) < 0.5).float()  # (1, 1, H, W)
        if not kept.any():  # a mask over everything leaves nothing to keep: PIE-Bench's "nan"
            return _nothing(len(pictures))
        return self.compare(encoder.pixels(pictures) * kept, encoder.pixels([reference.source]) * kept)

    @abstractmethod
    def compare(self, pictures: Tensor, source: Tensor) -> Tensor:
        """(B, 3, H, W), (1, 3, H, W) in [0, 1] -> (B,)."""


class BackgroundMse(_Background):
    """Mean squared error, values in [0, 1], over the whole picture's pixels."""

    lower: ClassVar[bool] = True

    def compare(self, pictures: Tensor, source: Tensor) -> Tensor:
        """Errors (B,)."""
        return mse(pictures, source)


class BackgroundPsnr(_Background):
    """Peak signal-to-noise ratio in dB."""

    def compare(self, pictures: Tensor, source: Tensor) -> Tensor:
        """Decibels (B,)."""
        return psnr(pictures, source)


class BackgroundSsim(_Background):
    """Structural similarity."""

    def compare(self, pictures: Tensor, source: Tensor) -> Tensor:
        """In [-1, 1] (B,)."""
        return ssim(pictures, source)


@dataclass(frozen=True)
class EditTruthScore(EditScore):
    """Distance to the true result, where the data knows it, at the nearest camera."""

    lower: ClassVar[bool] = True

    def measure(
        self, encoder: Encoder, pictures: Sequence[Image.Image], texts: Sequence[str], reference: EditReference
    ) -> Tensor:
        """Distances (B,); where truths are known, the source is the truth of its own text."""
        known = dict(reference.truths)
        if known:
            known.setdefault(reference.source_text, reference.source)
        true = {text: encoder.pixels([truth])[0] for text, truth in known.items()}
        rows = [
            truth_distance(drawn, true[text]) if text in true else drawn.new_full((), torch.nan)
            for drawn, text in zip(encoder.pixels(pictures), texts, strict=True)
        ]
        return torch.stack(rows)


def _perceptual(encoder: Encoder, pictures: Sequence[Image.Image], source: Image.Image) -> Tensor:
    """Perceptual distances (B,) to one picture."""
    for picture in pictures:
        _check_size(picture, source)
    parts = [
        encoder.perceptual(pictures[start : start + BATCH], [source] * len(pictures[start : start + BATCH]))
        for start in range(0, len(pictures), BATCH)
    ]
    return torch.cat(parts)


def _kept(reference: EditReference, edited: bool) -> np.ndarray | None:
    """Where the mask is white (edited) or black: uint8 (H, W, 1) of 0 and 1 at the source's size; None if nowhere."""
    if reference.mask is None:
        return None
    mask = reference.mask.convert("L").resize(reference.source.size, Image.Resampling.NEAREST)
    kept = ((np.asarray(mask) >= 128) == edited).astype(np.uint8)[..., None]
    return kept if kept.any() else None


def _cut(picture: Image.Image, kept: np.ndarray, source: Image.Image) -> Image.Image:
    """The picture, black where nothing is kept."""
    _check_size(picture, source)
    return Image.fromarray(np.asarray(picture) * kept)


def _check_size(picture: Image.Image, source: Image.Image) -> None:
    """Refuse another size than the source's: resampling would be a change of its own."""
    if picture.size != source.size:
        raise UserError(
            f"a drawn picture has {picture.width} x {picture.height} pixels, its source {source.width} x "
            f"{source.height}: give data and model one size to score an edit."
        )


def _nothing(count: int) -> Tensor:
    """No score for so many pictures."""
    return torch.full((count,), torch.nan)
