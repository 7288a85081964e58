"""A score is a named protocol: everything that moves its number, in one value with one hash.

Published "CLIP scores" of the same pictures differ by backbone, weights, preprocessing, scale, pairing and what was
done to the prompt (CustomConcept101 prints 0.76 where DreamBooth prints 0.31). Numbers with different hashes are
never averaged or ranked.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from hiperlab.errors import UserError, near
from hiperlab.metric.edit.scores import EditScore
from hiperlab.metric.encoder import Encoder
from hiperlab.metric.features import Features
from hiperlab.metric.torchmetric import ClipImage, ClipText, Identity, ImageSimilarity, Similarity
from hiperlab.metric.weights import MissingWeightsError

REVISION = 1  # of the arithmetic in this room; raise it with every change that moves a number

SCALES = ("cosine", "percent", "clipscore")
PAIRINGS = ("mean", "max")
CLEANINGS = ("remove", "noun", "keep")
MISSING = ("drop", "zero")


def clean(prompt: str, text: str, placeholder: str | Sequence[str], word: str | Sequence[str], cleaning: str) -> str:
    """The text a picture is compared with.

    Args:
        prompt: the template with "{}" where the concept stands; without one, the placeholder is sought in it.
        text: the prompt as it was sampled.
        placeholder: the concept's word in `text`, may be empty; of a picture of several concepts, each one's.
        word: the class noun, or each one's.
        cleaning: "remove" leaves the concept out (Textual Inversion: "a photo of a  on a beach"), "noun" puts the
            class noun there once, also where the template names it already ("a {} cat" -> "a cat"), "keep" takes
            `text` as it is.

    Raises:
        UserError: "noun" without a class noun.
    """
    if cleaning == "keep":
        return text
    if not isinstance(placeholder, str):
        for one, noun in zip(placeholder, word, strict=True):
            prompt = clean(prompt, text, one, noun, cleaning)
        return prompt
    assert isinstance(word, str)
    template = prompt if "{}" in prompt or not placeholder else prompt.replace(placeholder, "{}")
    if "{}" in template and cleaning == "noun":
        if not word:
            raise UserError(f"prompt {prompt!r} needs the class noun: give the pictures' records a word.")
        template = re.sub(rf"\{{\}} {re.escape(word)}\b", "{}", template).replace("{}", word)
    return re.sub(r"\s+", " ", template.replace("{}", "")).strip()


@dataclass(frozen=True)
class TextScore:
    """Picture against its own prompt (CLIP-T).

    Attributes:
        encoder: key into the protocol's encoders.
        scale: "cosine", "percent" (x 100) or "clipscore" (2.5 max(cos, 0)).
        cleaning: "remove", "noun" or "keep", see `clean`.
    """

    encoder: str
    scale: str
    cleaning: str
    lower: ClassVar[bool] = False  # whether less is better

    def build(self, features: Features) -> Similarity:
        """The torchmetrics metric with these settings."""
        return ClipText(features, scale=self.scale)


@dataclass(frozen=True)
class ImageScore:
    """Picture against the concept's real pictures (CLIP-I).

    Attributes:
        encoder: key into the protocol's encoders.
        scale: as in TextScore.
        pairing: "mean" over all generated x real pairs, or "max", the nearest real picture.
    """

    encoder: str
    scale: str
    pairing: str
    lower: ClassVar[bool] = False

    def build(self, features: Features) -> ImageSimilarity:
        """The torchmetrics metric with these settings."""
        return ClipImage(features, scale=self.scale, pairing=self.pairing)


@dataclass(frozen=True)
class IdentityScore(ImageScore):
    """The same over an identity embedder (DINO for objects, a face encoder for people).

    Attributes:
        missing: a picture in which the embedder finds nothing counts as 0 ("zero") or not at all ("drop").
    """

    missing: str

    def build(self, features: Features) -> ImageSimilarity:
        """The torchmetrics metric with these settings."""
        return Identity(features, scale=self.scale, pairing=self.pairing, missing=self.missing)


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
    encoders: Mapping[str, Encoder]
    members: Mapping[str, TextScore | ImageScore | EditScore]

    def __post_init__(self) -> None:
        object.__setattr__(self, "encoders", dict(self.encoders))
        object.__setattr__(self, "members", dict(self.members))
        for key, encoder in self.encoders.items():
            # Hydra turns dataclasses inside a dict into configs again unless told to convert.
            assert isinstance(encoder, Encoder), f"encoder {key} is a {type(encoder).__name__}: set _convert_: all"
        for name, member in self.members.items():
            assert isinstance(member, (TextScore, ImageScore, EditScore)), f"member {name} is a {type(member).__name__}"
            self._check(name, member)

    def _check(self, name: str, member: TextScore | ImageScore | EditScore) -> None:
        """Refuse settings that do not exist."""
        known = {"encoder": tuple(self.encoders), "scale": SCALES, "pairing": PAIRINGS, "cleaning": CLEANINGS,
                 "missing": MISSING}  # fmt: skip
        for field in dataclasses.fields(member):
            value = getattr(member, field.name)
            if value not in known[field.name]:
                hint = near(str(value), known[field.name])
                raise UserError(f"metric.members.{name}.{field.name}={value} is unknown.{hint}")

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

    def load(self, key: str) -> Features:
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
