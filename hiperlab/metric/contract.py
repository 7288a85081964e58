"""What a protocol asks of a score: adding one costs a class and its lines in a yaml.

A score says which of its settings may have which values, and what it finds in a set of pictures; it never sees a
method, the model or the config. Axes: B pictures, R references, D embedding width.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from hiperlab.errors import UserError, near
from hiperlab.metric.compare import usable
from hiperlab.metric.edit.distance import EditReference
from hiperlab.metric.extractor import Encoder
from hiperlab.metric.picture import as_pictures, open_picture
from hiperlab.metric.rows import SET, SETS_APART

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


LACKING = {  # what some scores need -> what to say where it is missing
    "held_out": "there are no held-out pictures: data.held_out=<number> or data.references=<folder>, and train again",
    "unrelated": "no pictures of other things were drawn: sample.unrelated=<number> stages=[sample,score,summary]",
}


class Measurement(NamedTuple):
    """One number that a score found.

    Attributes:
        kind: as in `ScoreRow`.
        value: NaN where nothing was found.
        concept: whose pictures it is about.
        record: the picture's; of a set, the further columns that its pictures share, and their number; else None.
    """

    kind: str
    value: float
    concept: str
    record: Mapping[str, Any] | None = None


class EmbeddedPictures:
    """A set of pictures before one encoder: everything is opened and embedded once, when it is first asked for.

    Args:
        encoder: the frozen network.
        records: of the pictures, see `SampleRecord`.
        references: the real pictures of each concept.
        edits: what edits among the concepts are judged against.
        root: what relative paths start from.
        batch_size: pictures per pass; does not change the numbers beyond float32's rounding.
        held_out: real pictures of each concept that nothing was trained on, where there are any.
        unrelated: records of pictures of other things, see `UnrelatedRecord`.
    """

    def __init__(
        self,
        encoder: Encoder,
        records: Sequence[Mapping[str, Any]],
        references: Mapping[str, Sequence[Image.Image]],
        edits: Mapping[str, EditReference],
        root: Path,
        batch_size: int,
        held_out: Mapping[str, Sequence[Image.Image]] | None = None,
        unrelated: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.encoder, self.records, self.edits, self.unrelated = encoder, records, edits, unrelated
        self._held_out = held_out or {}
        self._references, self._root, self._batch_size = references, root, batch_size

    @cached_property
    def images(self) -> Tensor:
        """All pictures embedded (B, D), in the order of the records."""
        return self.files([record["path"] for record in self.records])

    @cached_property
    def references(self) -> dict[str, Tensor]:
        """Real pictures embedded (R, D), by concept, in the order in which concepts occur among the records."""
        return {concept: self._embedded(self._references[concept]) for concept in self.concepts}

    @cached_property
    def held_out(self) -> dict[str, Tensor]:
        """Held-out real pictures embedded (H, D), by concept, of those that have some."""
        return {name: self._embedded(self._held_out[name]) for name in self.concepts if self._held_out.get(name)}

    @cached_property
    def concepts(self) -> list[str]:
        """The concepts, in the order in which they occur among the records."""
        return list(dict.fromkeys(record["concept"] for record in self.records))

    def files(self, paths: Sequence[str]) -> Tensor:
        """Picture files embedded (B, D), equal paths once."""
        unique = list(dict.fromkeys(paths))
        table = self._embedded([self._root / str(path) for path in unique])
        where = {path: number for number, path in enumerate(unique)}
        return table[[where[path] for path in paths]]

    def of(self, concept: str) -> list[int]:
        """Numbers of the concept's records."""
        return [number for number, record in enumerate(self.records) if record["concept"] == concept]

    def sets(self, concept: str) -> list[tuple[list[int], dict[str, Any]]]:
        """Numbers of the concept's records that are one set, those of each variant and role, and what they share."""
        found: dict[tuple[Any, ...], list[int]] = {}
        for number in self.of(concept):
            found.setdefault(tuple(self.records[number].get(name) for name in SETS_APART), []).append(number)
        firsts = [self.records[members[0]] for members in found.values()]
        shared = [{name: record[name] for name in SETS_APART if name in record} for record in firsts]
        return list(zip(found.values(), shared, strict=True))

    def path(self, record: Mapping[str, Any]) -> Path:
        """Where a record's picture lies, from the root of the file system."""
        return (self._root / str(record["path"])).resolve()

    def real(self, concept: str) -> Sequence[Image.Image]:
        """A concept's real pictures."""
        return self._references[concept]

    def opened(self, records: Sequence[Mapping[str, Any]], column: str = "path") -> list[Image.Image]:
        """The records' pictures, or those that another column names."""
        return [open_picture(self._root / str(record[column])) for record in records]

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embed B texts, equal ones once: (B, D)."""
        unique = list(dict.fromkeys(texts))
        starts = range(0, len(unique), self._batch_size)
        table = torch.cat([self.encoder.texts(unique[i : i + self._batch_size]) for i in starts])
        where = {text: i for i, text in enumerate(unique)}
        return table[[where[text] for text in texts]]

    def _embedded(self, sources: Sequence[Path | Image.Image]) -> Tensor:
        """Embed pictures or files (read batch by batch): (B, D)."""
        parts = []
        for start in range(0, len(sources), self._batch_size):
            batch = sources[start : start + self._batch_size]
            opened = [open_picture(each) if isinstance(each, Path) else each for each in batch]
            parts.append(self.encoder.images(as_pictures(opened)))
        return torch.cat(parts)


def cleaned(record: Mapping[str, Any], cleaning: str) -> str:
    """The text that a record's picture is compared with, see `clean`."""
    return clean(record["prompt"], record["text"], record.get("placeholder") or "", record.get("word") or "", cleaning)


@dataclass(frozen=True)
class Score(ABC):
    """One score of a protocol; every field is a setting, checked, hashed and told.

    Attributes:
        encoder: key into the protocol's encoders.
    """

    encoder: str
    lower: ClassVar[bool] = False  # whether less is better
    of_source: ClassVar[bool] = False  # whether it judges what was drawn for an edit's own source text
    has_ceiling: ClassVar[bool] = False  # whether real pictures are scored against each other
    of_members: ClassVar[bool] = False  # whether it is made of other members' numbers, see `MemberScore`
    needs: ClassVar[str] = ""  # what a run must bring for it, where not all do: a key of `LACKING`
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {}  # setting -> what it may be

    def check(self, key: str) -> None:
        """Refuse settings that do not exist; a score with numbers among its settings extends this.

        Args:
            key: of this score, e.g. "metric.members.clip_text", for messages.

        Raises:
            UserError: names the setting and what it may be.
        """
        for name, known in self.choices.items():
            value = getattr(self, name)
            if value not in known:
                raise UserError(f"{key}.{name}={value} is unknown.{near(str(value), known)}")

    @abstractmethod
    def measurements(self, pictures: EmbeddedPictures) -> Iterator[Measurement]:
        """Every number of this score about a set of pictures."""


@dataclass(frozen=True)
class MemberScore(Score):
    """A score of single pictures that is made of what other members found, and asks no encoder itself.

    Attributes:
        encoder: one that the members use; without it there is no score.
    """

    of_members: ClassVar[bool] = True

    @property
    @abstractmethod
    def members(self) -> list[str]:
        """Names of the members it is made of."""

    @abstractmethod
    def combine(self, found: Mapping[str, float]) -> float:
        """The number of one picture from those of its members (where there are any); NaN where there is none."""

    def measurements(self, pictures: EmbeddedPictures) -> Iterator[Measurement]:
        """Nothing: `combine` is asked instead."""
        yield from ()


@dataclass(frozen=True)
class SetScore(Score):
    """A score of a concept's pictures as a set; see `hiperlab.metric.sets`."""

    @abstractmethod
    def measure(self, images: Tensor, references: Tensor, prompts: Sequence[str]) -> float:
        """The number of one set; NaN where there are too few pictures.

        Pictures in which the encoder finds nothing (no face, say) are left out of both sides.

        Args:
            images: (B, D) unit embeddings of the drawn pictures.
            references: (R, D) of the real ones.
            prompts: of the drawn pictures, B.
        """

    def measurements(self, pictures: EmbeddedPictures) -> Iterator[Measurement]:
        """One number per concept, variant and role: pictures of another kind are another distribution."""
        there = ~pictures.images.isnan().any(-1)
        for concept, references in pictures.references.items():
            real = usable(references)
            for members, shared in pictures.sets(concept):
                numbers = [number for number in members if there[number]]
                prompts = [str(pictures.records[number]["prompt"]) for number in numbers]
                value = self.measure(pictures.images[numbers], real, prompts)
                yield Measurement(SET, value, concept, {**shared, "num_pictures": len(numbers)})
