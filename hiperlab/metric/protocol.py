"""A score is a named protocol: everything that moves its number, in one value with one hash.

Published "CLIP scores" of the same pictures differ by backbone, weights, preprocessing, scale, pairing and what was
done to the prompt (CustomConcept101 prints 0.76 where DreamBooth prints 0.31). Numbers with different hashes are
never averaged or ranked.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from hiperlab.errors import UserError, near
from hiperlab.metric.contract import (
    CLEANINGS,
    MISSING,
    PAIRINGS,
    SCALES,
    EmbeddedPictures,
    Measurement,
    MemberScore,
    Score,
    cleaned,
)
from hiperlab.metric.encoder import EncoderConfig
from hiperlab.metric.extractor import Encoder
from hiperlab.metric.rows import CEILING, COPY, COPY_CEILING, PICTURE
from hiperlab.metric.torchmetric import ClipImage, ClipText, Identity, ImageSimilarity, Similarity
from hiperlab.metric.weights import MissingWeightsError

REVISION = 1  # of the arithmetic in this room; raise it with every change that moves a number


@dataclass(frozen=True)
class TextScore(Score):
    """Picture against its own prompt (CLIP-T).

    Attributes:
        encoder: key into the protocol's encoders.
        scale: "cosine", "percent" (x 100) or "clipscore" (2.5 max(cos, 0)).
        cleaning: "remove", "noun" or "keep", see `clean`.
    """

    scale: str
    cleaning: str
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {"scale": SCALES, "cleaning": CLEANINGS}

    def build(self, encoder: Encoder) -> Similarity:
        """The torchmetrics metric with these settings."""
        return ClipText(encoder, scale=self.scale)

    def measurements(self, pictures: EmbeddedPictures) -> Iterator[Measurement]:
        """One number per picture."""
        texts = [cleaned(record, self.cleaning) for record in pictures.records]
        values = self.build(pictures.encoder).measure(pictures.images, pictures.texts(texts))
        for record, value in zip(pictures.records, values.tolist(), strict=True):
            yield Measurement(PICTURE, value, record["concept"], record)


@dataclass(frozen=True)
class ImageScore(Score):
    """Picture against the concept's real pictures (CLIP-I).

    Attributes:
        encoder: key into the protocol's encoders.
        scale: as in TextScore.
        pairing: "mean" over all generated x real pairs, or "max", the nearest real picture.
    """

    scale: str
    pairing: str
    has_ceiling: ClassVar[bool] = True
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {"scale": SCALES, "pairing": PAIRINGS}

    def build(self, encoder: Encoder) -> ImageSimilarity:
        """The torchmetrics metric with these settings."""
        return ClipImage(encoder, scale=self.scale, pairing=self.pairing)

    def measurements(self, pictures: EmbeddedPictures) -> Iterator[Measurement]:
        """A number per picture and one of the concept's real pictures; then the same of the copy detector."""
        metric = self.build(pictures.encoder)
        copies: list[Measurement] = []
        for concept, references in pictures.references.items():
            numbers = pictures.of(concept)
            images = pictures.images[numbers]
            yield from _of_concept(pictures, numbers, PICTURE, metric.measure(images, references))
            yield from _ceiling(concept, CEILING, metric.ceiling(references))
            copies += _of_concept(pictures, numbers, COPY, metric.copies(images, references))
            copies += _ceiling(concept, COPY_CEILING, metric.ceiling(references, "max"))
        yield from copies


def _of_concept(pictures: EmbeddedPictures, numbers: Sequence[int], kind: str, values: Tensor) -> Iterator[Measurement]:
    for number, value in zip(numbers, values.tolist(), strict=True):
        record = pictures.records[number]
        yield Measurement(kind, value, record["concept"], record)


def _ceiling(concept: str, kind: str, values: Tensor) -> Iterator[Measurement]:
    """The mean over real pictures; a concept with a single one has none."""
    if len(values):
        yield Measurement(kind, values.double().mean().item(), concept)


@dataclass(frozen=True)
class IdentityScore(ImageScore):
    """The same over an identity embedder (DINO for objects, a face encoder for people).

    Attributes:
        missing: a picture in which the embedder finds nothing counts as 0 ("zero") or not at all ("drop").
    """

    missing: str
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {**ImageScore.choices, "missing": MISSING}

    def build(self, encoder: Encoder) -> ImageSimilarity:
        """The torchmetrics metric with these settings."""
        return Identity(encoder, scale=self.scale, pairing=self.pairing, missing=self.missing)


@dataclass(frozen=True)
class Protocol:
    """A named set of scores with everything that fixes their numbers.

    Attributes:
        name: how reports call it.
        trained: False where weights are random and numbers mean nothing; reports must say so.
        encoders: the frozen networks, by key.
        members: the scores, by the name their rows carry.
    """

    name: str
    trained: bool
    encoders: Mapping[str, EncoderConfig]
    members: Mapping[str, Score]

    def __post_init__(self) -> None:
        object.__setattr__(self, "encoders", dict(self.encoders))
        object.__setattr__(self, "members", dict(self.members))
        for key, encoder in self.encoders.items():
            # Hydra turns dataclasses inside a dict into configs again unless told to convert.
            assert isinstance(encoder, EncoderConfig), (
                f"encoder {key} is a {type(encoder).__name__}: set _convert_: all"
            )
        for name, member in self.members.items():
            assert isinstance(member, Score), f"member {name} is a {type(member).__name__}"
            key = f"metric.members.{name}"
            if member.encoder not in self.encoders:
                raise UserError(f"{key}.encoder={member.encoder} is unknown.{near(member.encoder, self.encoders)}")
            member.check(key)
            for other in member.members if isinstance(member, MemberScore) else ():
                if other not in self.members or self.members[other].of_members:
                    plain = [each for each, score in self.members.items() if not score.of_members]
                    raise UserError(f"{key} is made of {other}, which is no score of pictures.{near(other, plain)}")

    def settings(self) -> dict[str, Any]:
        """Everything that may move a number, as plain values."""
        members = {
            name: {"kind": type(member).__name__, **dataclasses.asdict(member)} for name, member in self.members.items()
        }
        encoders = {key: encoder.settings() for key, encoder in self.encoders.items()}
        return {"revision": REVISION, "name": self.name, "trained": self.trained, "encoders": encoders,
                "members": members}  # fmt: skip

    @cached_property
    def hash(self) -> str:
        """12 hex digits of a sha256 over the settings' canonical JSON; equal in every process and on every machine."""
        text = json.dumps(self.settings(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def load(self, key: str) -> Encoder:
        """One encoder with its weights; raises MissingWeightsError."""
        return self.encoders[key].load(f"metric.encoders.{key}")

    def fetch(self) -> list[str]:
        """Find or download all weights without loading them; one message per encoder that will be missing.

        For the door: a run of hours should say at its start that its scores will have to wait.
        """
        messages = []
        for key, encoder in self.encoders.items():
            try:
                encoder.fetch(f"metric.encoders.{key}")
            except MissingWeightsError as error:
                messages.append(self.missing(key, error))
        return messages

    def missing(self, key: str, error: UserError) -> str:
        """One line naming the scores that fall out with encoder `key`, why, and the remedy."""
        names = ", ".join(name for name, member in self.members.items() if member.encoder == key)
        return f"Not scored: {names} ({self.name}): {error}"
