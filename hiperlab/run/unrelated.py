"""Pictures of texts that have nothing to do with the concept, drawn with what was learnt and by the frozen model.

How far the first are from the second is how much a method changed that it should not have (`hiperlab.metric.drift`).
Both start from the same noise. A method that gives the U-Net exactly what the frozen model would be given needs no
picture of its own: it would draw the frozen model's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hiperlab import files
from hiperlab.base.capability import EditsPicture
from hiperlab.base.method import Method, Step
from hiperlab.data.concept import Concept
from hiperlab.errors import UserError
from hiperlab.metric.rows import NEEDED
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.plain import draw_plain
from hiperlab.model.sampler import Sampler
from hiperlab.model.stack import FrozenStack
from hiperlab.run.picture_key import picture_key
from hiperlab.run.session import Session

log = logging.getLogger(__name__)
FOLDER, MANIFEST = "unrelated", "unrelated.jsonl"
FROZEN = "_frozen"  # no concept can be called this
CACHE = "frozen_pictures"  # in outputs_dir: the frozen model's pictures, by content
ROUNDING = 1e-5  # of text states, relative to the largest: a batch of another shape rounds otherwise

Record = dict[str, Any]
Draw = Callable[[Path, list[Record], Callable[[list[Record]], Tensor]], None]


def check_unrelated(session: Session) -> None:
    """What can be wrong with `sample.unrelated`, before the model loads; a method without such pictures says why.

    Raises:
        UserError: it is beyond the data's texts, or goes with kept concepts.
    """
    count = session.cfg.sample.unrelated
    if not count or "sample" not in session.cfg.stages:
        return
    if session.kept:
        raise UserError("sample.unrelated draws with one trained method: leave it away where artifacts=[…] are drawn.")
    if issubclass(session.method_class, EditsPicture):
        log.warning(
            "sample.unrelated: none are drawn, as %s edits one picture and draws nothing else.",
            session.method_class.__name__,
        )
        return
    for concept in session.data.concepts:
        if not concept.unrelated:
            log.warning("sample.unrelated: none are drawn of %s, its data names no other things.", concept.name)
        elif count > len(concept.unrelated):
            raise UserError(f"sample.unrelated={count}: there are {len(concept.unrelated)} texts for {concept.name}.")


def read_unrelated(folder: Path) -> list[Record]:
    """The records of a run folder's unrelated pictures; empty where none were asked for."""
    return files.read_jsonl(folder / FOLDER / MANIFEST, (*NEEDED, "frozen"))


def write_manifest(folder: Path, records: list[Record]) -> None:
    """Keep what was drawn; where nothing was, no earlier list may stay."""
    path = folder / FOLDER / MANIFEST
    if records or path.is_file():
        files.write_jsonl(path, records)


def draw_unrelated(
    session: Session,
    method: Method,
    concepts: Sequence[Concept],
    inputs: Sequence[Mapping[str, Any]],
    draw: Draw,
) -> list[Record]:
    """The unrelated pictures of a method's concepts, drawn where they are not there yet: one per text and variant.

    Args:
        session: the run.
        method: with what was learnt.
        concepts: its concepts, in its order.
        inputs: of each concept's pictures, see `picture_key`: model, sampler, concept.
        draw: (run folder, records, paint) draws what is missing.
    """
    count = int(session.cfg.sample.unrelated)
    if not count or isinstance(method, EditsPicture):
        return []
    seed, negative, sampler = int(session.cfg.sample.seeds[0]), session.negative, session.sampler
    found: list[Record] = []
    method.eval()
    for place, (concept, own) in enumerate(zip(concepts, inputs, strict=True)):
        texts = concept.unrelated[:count]
        plain = {name: value for name, value in own.items() if name != "concept"}
        frozen = [_frozen_record(text, seed, picture_key(**plain, text=text, seed=seed)) for text in texts]
        _draw_frozen(session, frozen, draw)
        for variant in method.variants:
            records = [
                _record(
                    concept,
                    number,
                    record,
                    variant,
                    picture_key(**own, text=record["text"], seed=seed, variant=variant),
                )
                for number, record in enumerate(frozen)
            ]
            for record, there in zip(records, frozen, strict=True):
                if is_unchanged(method, place, record["text"], variant, negative, sampler):
                    record |= {"path": there["path"], "key": there["key"]}
            changed = [record for record in records if record["path"] != record["frozen"]]
            draw(session.folder, changed, partial(_paint, session, method, place))
            found += records
    return found


def is_unchanged(method: Method, place: int, text: str, variant: str, negative: str | None, sampler: Sampler) -> bool:
    """Whether the U-Net is given the same for a text as without the method, but for rounding, at every step.

    Args:
        method: with what was learnt, in evaluation mode.
        place: number of its concept.
        text: plain.
        variant: one of the method's.
        negative: text of the unconditional branch.
        sampler: says at which timesteps a method that depends on time is asked.
    """
    own_loop = type(method).sample_calls is not Method.sample_calls
    if own_loop or method.reads_latents or method.consistency is not None:
        return False
    stack = method.model
    with torch.no_grad():
        if not _is_plain(method.negative_condition(negative or "", variant, [place]), stack, negative or ""):
            return False
        times = sampler.build(stack, sampler.steps).timesteps
        which = torch.tensor([place], device=stack.device)
        return all(
            _is_plain(method.condition(Step([text], which, t.to(stack.device).expand(1), variant=variant)), stack, text)
            for t in (times if method.time_dependent else times[:1])
        )


def _is_plain(states: Conditioning, stack: FrozenStack, text: str) -> bool:
    """Whether a conditioning of one row is the frozen text encoder's and nothing else."""
    if any(each is not None for each in (states.offsets, states.row_offsets, states.decoupled, states.control)):
        return False
    wanted = stack.condition_text([text])
    pairs = [(states.keys, wanted.keys)]
    pairs += [] if states.values is None else [(states.values, wanted.keys)]
    if states.pooled is not None and wanted.pooled is not None:
        pairs.append((states.pooled, wanted.pooled))
    return all(
        float((given.float() - plain.float()).abs().max()) <= ROUNDING * float(plain.float().abs().max())
        for given, plain in pairs
    )


def _frozen_record(text: str, seed: int, key: str) -> Record:
    path = f"{FOLDER}/{FROZEN}/{key}.png"
    return {"concept": "", "prompt": text, "text": text, "seed": seed, "variant": "", "path": path, "key": key}


def _record(concept: Concept, number: int, frozen: Record, variant: str, key: str) -> Record:
    ending = "_".join([f"{number:02d}", str(frozen["seed"]), *([variant.replace("=", "-")] if variant else [])])
    path = f"{FOLDER}/{concept.name}/{ending}.png"
    own = {"concept": concept.name, "word": concept.word, "variant": variant, "path": path, "key": key}
    return {**frozen, **own, "frozen": frozen["path"]}


def _draw_frozen(session: Session, records: list[Record], draw: Draw) -> None:
    """The frozen model's pictures, from the cache where they are; what is drawn goes there."""
    cache = Path(session.cfg.outputs_dir).expanduser() / CACHE
    if files.is_rank_zero():
        for record in records:
            if not (session.folder / record["path"]).is_file():
                _copy(cache / f"{record['key']}.png", session.folder / record["path"])

    def paint(batch: list[Record]) -> Tensor:
        texts, seeds = [each["text"] for each in batch], [each["seed"] for each in batch]
        return draw_plain(session.stack, texts, seeds, session.sampler, session.negative)

    draw(session.folder, records, paint)
    if files.is_rank_zero():
        for record in records:
            _copy(session.folder / record["path"], cache / f"{record['key']}.png")


def _copy(source: Path, target: Path) -> None:
    """Copy a picture to where it is not yet; whether it is what its name says is looked up in it before it is used."""
    if source.is_file() and (not target.is_file() or target.read_bytes() != source.read_bytes()):
        files.atomic_write(target, source.read_bytes())


def _paint(session: Session, method: Method, place: int, batch: list[Record]) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] of B records of one variant, with what was learnt."""
    return method.sample(
        [record["text"] for record in batch],
        [record["seed"] for record in batch],
        concepts=[place] * len(batch),
        variant=batch[0]["variant"],
        **session.drawing(len(batch)),
    )
