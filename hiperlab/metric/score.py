"""Score any set of pictures under a protocol: one row per picture and score, nothing averaged away."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from hiperlab.errors import UserError, near
from hiperlab.metric.edit.distance import EditReference
from hiperlab.metric.edit.scores import EditScore
from hiperlab.metric.encoder import Encoder
from hiperlab.metric.features import Features
from hiperlab.metric.picture import as_pictures, open_picture
from hiperlab.metric.protocol import ImageScore, Protocol, TextScore, clean

Row = dict[str, Any]

REAL = "real"  # in a row's column "picture": the ceiling, real pictures scored against each other
COPY = "_copy"  # ending of the copy detector's scores
_NEEDED = ("concept", "prompt", "text", "path")
_OPTIONAL = ("placeholder", "word", "seed")
_WRITTEN = (
    "picture",
    "metric",
    "value",
    "protocol",
    "protocol_hash",
    "trained",
    "weights",
    "lower_is_better",
    "of_source",
)


class Scored(NamedTuple):
    """What `score` found.

    Attributes:
        rows: one per picture and score, in the order of members, then pictures; see `score`.
        messages: one line per encoder without usable weights (its scores are absent) and per concept without a
            ceiling.
    """

    rows: list[Row]
    messages: list[str]


def score(
    pictures: Sequence[Mapping[str, Any]],
    references: Mapping[str, Sequence[Image.Image]],
    protocol: Protocol,
    *,
    root: str | Path = ".",
    device: str | torch.device = "cpu",
    batch_size: int = 32,
    loaded: MutableMapping[Encoder, Features] | None = None,
    edits: Mapping[str, EditReference] | None = None,
) -> Scored:
    """Score pictures from disk, whoever made them.

    A row holds concept, prompt, seed, picture (the record's path), metric, value (None where nothing was found),
    protocol, protocol_hash, trained, lower_is_better, weights (content of the encoder's
    weights) and the record's further columns.
    Beside every picture score M there is "M_copy", the similarity to the nearest reference. Per concept, M and M_copy
    have one row with picture="real": real pictures against each other, each left out of its own references. A copy
    score above that row's is nearer to one photograph than photographs of the concept are to each other.

    Args:
        pictures: records with concept, prompt (with "{}"), text (as sampled) and path, maybe placeholder, word (class
            noun) and seed; further columns (e.g. truncation) are kept.
        references: the real pictures of each concept.
        protocol: what to measure.
        root: what relative paths start from.
        device: where the encoders run.
        batch_size: pictures per pass; does not change the numbers beyond float32's rounding.
        loaded: an empty dict that keeps encoders between calls; without it they are freed after use.
        edits: what the edits among the concepts are judged against; other concepts have no edit scores.

    Raises:
        UserError: a record lacks a column or uses one of ours, a picture is missing or broken, a concept has no
            references.
    """
    _check(pictures, references)
    rows: dict[str, list[Row]] = {name: [] for name in protocol.members}
    messages: list[str] = []
    for key in protocol.encoders:
        names = [name for name, member in protocol.members.items() if member.encoder == key]
        if not names or not pictures:
            continue
        try:
            features = _load(protocol, key, device, loaded)
        except UserError as error:  # absent weights or an unusable file: the other scores go on
            messages.append(protocol.missing(key, error))
            continue
        others = [name for name in names if not isinstance(protocol.members[name], EditScore)]
        embedded = _Embedded(features, pictures, references, Path(root), batch_size) if others else None
        base = {"protocol": protocol.name, "protocol_hash": protocol.hash, "trained": protocol.trained,
                 "weights": features.weights}  # fmt: skip
        for name in names:
            member = protocol.members[name]
            stamp = {**base, "lower_is_better": member.lower}
            if isinstance(member, EditScore):
                stamp |= {"of_source": True} if member.of_source else {}
                rows[name] = _edit_rows(name, member, features, pictures, edits or {}, Path(root), stamp)
                continue
            assert embedded
            if isinstance(member, TextScore):
                rows[name] = _text_rows(name, member, embedded, stamp)
            else:
                rows[name] = _image_rows(name, member, embedded, stamp)
    if any(isinstance(member, ImageScore) for member in protocol.members.values()):
        lone = sorted({p["concept"] for p in pictures if len(references[p["concept"]]) < 2} - (edits or {}).keys())
        messages += [f"{concept} has one reference picture: no real-against-real ceiling." for concept in lone]
    return Scored([row for name in protocol.members for row in rows[name]], messages)


def _load(
    protocol: Protocol, key: str, device: str | torch.device, loaded: MutableMapping[Encoder, Features] | None
) -> Features:
    """An encoder on its device, from `loaded` if it is there."""
    recipe = protocol.encoders[key]
    if loaded is None:
        return protocol.load(key).to(device)
    if recipe not in loaded:
        loaded[recipe] = protocol.load(key)
    return loaded[recipe].to(device)


class _Embedded:
    """Everything one encoder sees: pictures and references embedded once, texts on demand."""

    def __init__(
        self,
        features: Features,
        pictures: Sequence[Mapping[str, Any]],
        references: Mapping[str, Sequence[Image.Image]],
        root: Path,
        batch_size: int,
    ) -> None:
        self.features = features
        self.pictures = pictures
        self.batch_size = batch_size
        used = dict.fromkeys(picture["concept"] for picture in pictures)  # ordered, without repeats
        self.references = {concept: self._images(as_pictures(references[concept])) for concept in used}
        self.images = self._images([root / str(picture["path"]) for picture in pictures])

    def _images(self, sources: Sequence[Path | Image.Image]) -> Tensor:
        """Embed pictures or files (read batch by batch): (B, D)."""
        parts = []
        for start in range(0, len(sources), self.batch_size):
            batch = sources[start : start + self.batch_size]
            parts.append(self.features.images([open_picture(s) if isinstance(s, Path) else s for s in batch]))
        return torch.cat(parts)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts, equal ones once: (B, D)."""
        unique = list(dict.fromkeys(texts))
        starts = range(0, len(unique), self.batch_size)
        table = torch.cat([self.features.texts(unique[i : i + self.batch_size]) for i in starts])
        where = {text: i for i, text in enumerate(unique)}
        return table[[where[text] for text in texts]]


def _text_rows(name: str, member: TextScore, embedded: _Embedded, stamp: Row) -> list[Row]:
    """Rows of one text score."""
    texts = [
        clean(p["prompt"], p["text"], p.get("placeholder") or "", p.get("word") or "", member.cleaning)
        for p in embedded.pictures
    ]
    values = member.build(embedded.features).measure(embedded.images, embedded.texts(texts))
    return [_row(p, name, value, stamp) for p, value in zip(embedded.pictures, values.tolist())]


def _image_rows(name: str, member: ImageScore, embedded: _Embedded, stamp: Row) -> list[Row]:
    """Rows of one picture score, its copy detector and their ceilings."""
    metric = member.build(embedded.features)
    rows: list[Row] = []
    copies: list[Row] = []
    for concept, references in embedded.references.items():
        index = [i for i, picture in enumerate(embedded.pictures) if picture["concept"] == concept]
        mine = [embedded.pictures[i] for i in index]
        images = embedded.images[index]
        for out, label, values, ceiling in (
            (rows, name, metric.measure(images, references), metric.ceiling(references)),
            (copies, name + COPY, metric.copies(images, references), metric.ceiling(references, "max")),
        ):
            out += [_row(p, label, value, stamp) for p, value in zip(mine, values.tolist())]
            if len(ceiling):
                real = {"concept": concept, "prompt": "", "seed": None, "path": REAL}
                out.append(_row(real, label, ceiling.double().mean().item(), stamp))
    return rows + copies


def _edit_rows(
    name: str,
    member: EditScore,
    features: Features,
    pictures: Sequence[Mapping[str, Any]],
    edits: Mapping[str, EditReference],
    root: Path,
    stamp: Row,
) -> list[Row]:
    """Rows of one score of edits; a picture of a concept that is no edit has none.

    Scores of the source are of pictures drawn for its text, and say so in the column "of_source".
    """
    rows = []
    for concept, reference in edits.items():
        told = [
            (p, clean(p["prompt"], p["text"], p.get("placeholder") or "", p.get("word") or "", "noun"))
            for p in pictures
            if p["concept"] == concept
        ]
        if member.of_source:
            own = " ".join(reference.source_text.split())  # as `clean` spaces it
            told = [(p, text) for p, text in told if text == own]
        if told:
            mine, texts = zip(*told, strict=True)
            opened = [open_picture(root / str(p["path"])) for p in mine]
            values = member.measure(features, opened, texts, reference)
            rows += [_row(p, name, value, stamp) for p, value in zip(mine, values.tolist(), strict=True)]
    return rows


def _row(picture: Mapping[str, Any], name: str, value: float, stamp: Row) -> Row:
    """One line of scores.jsonl; NaN becomes None, which JSON can hold."""
    extra = {k: v for k, v in picture.items() if k not in (*_NEEDED, *_OPTIONAL)}
    return {
        "concept": picture["concept"],
        "prompt": picture["prompt"],
        "seed": picture.get("seed"),
        "picture": str(picture["path"]),
        "metric": name,
        "value": None if value != value else value,
        **stamp,
        **extra,
    }


def _check(pictures: Sequence[Mapping[str, Any]], references: Mapping[str, Sequence[Image.Image]]) -> None:
    """Refuse what cannot be scored, before any weights are loaded."""
    for picture in pictures:
        lacking = [column for column in _NEEDED if column not in picture]
        taken = [column for column in _WRITTEN if column in picture]
        if lacking or taken:
            what = f"lacks {', '.join(lacking)}" if lacking else f"may not have {', '.join(taken)}: rename it"
            raise UserError(f"the record of picture {picture.get('path', '?')} {what}.")
        if not references.get(picture["concept"]):
            raise UserError(
                f"concept {picture['concept']} has no reference pictures.{near(picture['concept'], references)}"
            )
