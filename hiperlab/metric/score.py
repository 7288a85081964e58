"""Score any set of pictures under a protocol: one row per picture and score, nothing averaged away."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from hiperlab.errors import UserError, near
from hiperlab.metric.contract import LACKING, EmbeddedPictures, Measurement, MemberScore
from hiperlab.metric.edit.distance import EditReference
from hiperlab.metric.encoder import EncoderConfig
from hiperlab.metric.extractor import Encoder
from hiperlab.metric.protocol import Protocol
from hiperlab.metric.rows import PICTURE, Row, SampleRecord, ScoreRow, UnrelatedRecord, columns

_NEEDED = sorted(SampleRecord.__required_keys__)
_WRITTEN = [name for name in columns(ScoreRow) if name not in columns(SampleRecord)]


class Scored(NamedTuple):
    """What `score` found.

    Attributes:
        rows: `ScoreRow`s, one per picture and score, in the order of members, then pictures; see `score`.
        messages: one line per encoder without usable weights (its scores are absent), per score that a run brings
            nothing for, and per concept without a ceiling.
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
    loaded: MutableMapping[EncoderConfig, Encoder] | None = None,
    edits: Mapping[str, EditReference] | None = None,
    held_out: Mapping[str, Sequence[Image.Image]] | None = None,
    unrelated: Sequence[Mapping[str, Any]] = (),
) -> Scored:
    """Score pictures from disk, whoever made them.

    A row is a `ScoreRow` with the record's further columns. Beside every score against the references there are rows
    of kind "copy", the similarity to the nearest reference, and both have a ceiling per concept.

    Args:
        pictures: `SampleRecord`s, whoever wrote them; further columns (e.g. truncation) are kept.
        references: the real pictures of each concept.
        protocol: what to measure.
        root: what relative paths start from.
        device: where the encoders run.
        batch_size: pictures per pass; does not change the numbers beyond float32's rounding.
        loaded: an empty dict that keeps encoders between calls; without it they are freed after use.
        edits: what the edits among the concepts are judged against; other concepts have no edit scores.
        held_out: real pictures of concepts that nothing was trained on; concepts without have no such scores.
        unrelated: `UnrelatedRecord`s; without any there are no scores of them.

    Raises:
        UserError: a record lacks a column or uses one of ours, a picture is missing or broken, a concept has no
            references.
    """
    _check(pictures, references)
    for record in unrelated:
        _check_columns(record, sorted(UnrelatedRecord.__required_keys__))
    rows: dict[str, list[Row]] = {name: [] for name in protocol.members}
    messages: list[str] = []
    for key in protocol.encoders:
        names = [name for name, member in protocol.members.items() if member.encoder == key]
        if not names or not pictures:
            continue
        try:
            encoder = _load(protocol, key, device, loaded)
        except UserError as error:  # absent weights or an unusable file: the other scores go on
            messages.append(protocol.missing(key, error))
            continue
        embedded = EmbeddedPictures(
            encoder, pictures, references, edits or {}, Path(root), batch_size, held_out, unrelated
        )
        for name in names:
            rows[name] = [
                _row(found, name, protocol, encoder.weights) for found in protocol.members[name].measurements(embedded)
            ]
    for name, member in protocol.members.items():
        if isinstance(member, MemberScore):
            rows[name] = _of_members(name, member, protocol, rows)
    brought = {
        "held_out": any((held_out or {}).get(each["concept"]) for each in pictures),
        "unrelated": bool(unrelated),
    }
    for need in LACKING:
        names = [name for name, member in protocol.members.items() if member.needs == need]
        if names and pictures and not brought[need]:
            messages.append(f"Not scored: {', '.join(names)} ({protocol.name}): {LACKING[need]}.")
    if any(member.has_ceiling for member in protocol.members.values()):
        lone = sorted({p["concept"] for p in pictures if len(references[p["concept"]]) < 2} - (edits or {}).keys())
        messages += [f"{concept} has one reference picture: no real-against-real ceiling." for concept in lone]
    return Scored([row for name in protocol.members for row in rows[name]], messages)


def _load(
    protocol: Protocol,
    key: str,
    device: str | torch.device,
    loaded: MutableMapping[EncoderConfig, Encoder] | None,
) -> Encoder:
    """An encoder on its device, from `loaded` if it is there."""
    config = protocol.encoders[key]
    if loaded is None:
        return protocol.load(key).to(device)
    if config not in loaded:
        loaded[config] = protocol.load(key)
    return loaded[config].to(device)


def _row(found: Measurement, name: str, protocol: Protocol, weights: str) -> Row:
    """A `ScoreRow` with the picture's further columns; NaN becomes None, which JSON can hold."""
    record, member = found.record or {}, protocol.members[name]
    row: ScoreRow = {
        "kind": found.kind,
        "concept": found.concept,
        "prompt": record.get("prompt", ""),
        "seed": record.get("seed"),
        "picture": str(record.get("path", "")),
        "metric": name,
        "value": None if found.value != found.value else found.value,
        "protocol": protocol.name,
        "protocol_hash": protocol.hash,
        "trained": protocol.trained,
        "weights": weights,
        "lower_is_better": member.lower,
    }
    if member.of_source:
        row["of_source"] = True
    return {**row, **{key: value for key, value in record.items() if key not in columns(SampleRecord)}}


def _of_members(name: str, member: MemberScore, protocol: Protocol, rows: Mapping[str, list[Row]]) -> list[Row]:
    """Rows of a score that is made of others' rows; none where one of these was not scored at all."""
    if not all(rows[each] for each in member.members):
        return []
    found: dict[tuple[str, str], dict[str, float]] = {}
    first: dict[tuple[str, str], Row] = {}
    for each in member.members:
        for row in rows[each]:
            if row["kind"] == PICTURE:
                picture = (row["concept"], row["picture"])
                first.setdefault(picture, row)
                if row["value"] is not None:
                    found.setdefault(picture, {})[each] = row["value"]
    weights = "+".join(sorted({rows[each][0]["weights"] for each in member.members}))
    made = []
    for picture, row in first.items():
        value = member.combine(found.get(picture, {}))
        own = {"metric": name, "value": None if value != value else value, "lower_is_better": member.lower}
        made.append({**row, **own, "weights": weights})
    return made


def _check(pictures: Sequence[Mapping[str, Any]], references: Mapping[str, Sequence[Image.Image]]) -> None:
    """Refuse what cannot be scored, before any weights are loaded."""
    for picture in pictures:
        _check_columns(picture, _NEEDED)
        if not references.get(picture["concept"]):
            raise UserError(
                f"concept {picture['concept']} has no reference pictures.{near(picture['concept'], references)}"
            )


def _check_columns(record: Mapping[str, Any], needed: Sequence[str]) -> None:
    """Refuse a record without a needed column, or with one that a score writes."""
    lacking = [column for column in needed if column not in record]
    taken = [column for column in _WRITTEN if column in record]
    if lacking or taken:
        what = f"lacks {', '.join(lacking)}" if lacking else f"may not have {', '.join(taken)}: rename it"
        raise UserError(f"the record of picture {record.get('path', '?')} {what}.")
