"""Members of a protocol for the ground-truth scores: one class per attribute and per part of the distance.

Which attribute is said by the class, not by a setting, because a protocol checks and hashes every setting of a member.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hiperlab.metric.extractor import Encoder
from hiperlab.metric.protocol import TextScore
from hiperlab.metric.torchmetric import Similarity
from hiperlab.metric.world.attributes import AttributeMatch
from hiperlab.metric.world.distance import TruthDistance


@dataclass(frozen=True)
class AttributeScore(TextScore):
    """Is the attribute read as prompted? With cleaning "noun" the prompt names the subject's kind."""

    attribute: ClassVar[str]

    def build(self, encoder: Encoder) -> Similarity:
        """The torchmetrics metric with these settings."""
        return AttributeMatch(encoder, self.scale, self.attribute)


class KindScore(AttributeScore):
    """The subject's class."""

    attribute = "kind"


class PoseScore(AttributeScore):
    """What the subject does."""

    attribute = "pose"


class PlaceScore(AttributeScore):
    """Where it is."""

    attribute = "place"


class StyleScore(AttributeScore):
    """Photo, oil painting and so on."""

    attribute = "style"


class AccessoryScore(AttributeScore):
    """What it wears."""

    attribute = "accessory"


class LightScore(AttributeScore):
    """Day, sunset or night."""

    attribute = "light"


@dataclass(frozen=True)
class TruthScore(TextScore):
    """Distance to the rendered truth, smaller is better; needs cleaning "keep", the placeholder names the subject."""

    lower: ClassVar[bool] = True

    def build(self, encoder: Encoder) -> Similarity:
        """The torchmetrics metric with these settings."""
        return TruthDistance(encoder, self.scale)
