"""The sample stage: every concept, prompt, variant and seed becomes one PNG; pictures already there are kept."""

from __future__ import annotations

import io
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from hiperlab import files
from hiperlab.base.capability import EditsPicture, ShowsAttention
from hiperlab.base.method import Method
from hiperlab.clock import Clock
from hiperlab.data.concept import Concept, fill
from hiperlab.errors import UserError
from hiperlab.metric.rows import NEEDED
from hiperlab.metric.table import SOURCE
from hiperlab.model.shared_calls import Calls, together
from hiperlab.report.attention import attention_grid
from hiperlab.report.environment import Room
from hiperlab.report.grid import grid, save_png, to_pil
from hiperlab.run.fit import load_artifacts
from hiperlab.run.picture_key import concept_inputs, model_inputs, picture_key, sampler_inputs
from hiperlab.run.references import crop
from hiperlab.run.session import Session, parts, speaks_for
from hiperlab.run.unrelated import draw_unrelated, write_manifest

log = logging.getLogger(__name__)
MANIFEST = "samples.jsonl"
SECONDS_BETWEEN_LINES = 5.0
MOST_MAPPED = 3  # targets whose attention is shown


def sample(session: Session) -> None:
    """Draw what is missing, write samples/samples.jsonl and one grid per concept.

    Raises:
        UserError: an artifact is missing or does not fit.
    """
    for error in sample_all([session]).values():
        raise error


def sample_all(sessions: Sequence[Session]) -> dict[int, Exception]:
    """Draw the missing pictures of several runs of the same model, as many concepts as possible in each U-Net call.

    Returns:
        Why a run's pictures could not be drawn, by its number; the others' are.
    """
    for session in sessions:
        with speaks_for(session.folder):
            log.info("stage sample")
    start = time.monotonic()
    work = _Sampling(sessions)
    work.run()
    elapsed = time.monotonic() - start
    shares = parts([float(work.drawn[number]) for number in range(len(sessions))])
    for number, session in enumerate(sessions):
        if number in work.errors:
            continue
        records = work.records[number]
        if files.is_rank_zero():
            kept = [{key: value for key, value in record.items() if key != "concept_index"} for record in records]
            files.write_jsonl(session.folder / "samples" / MANIFEST, kept)
            write_manifest(session.folder, work.unrelated[number])
            title = f"{session.cfg.method._target_.rsplit('.', 1)[-1]} on {session.stack.name}"
            write_grids(session.folder, session.data.concepts, kept, session.stack.size, title)
        before = session.results.get("stages", {}).get("sample", {}).get("seconds_per_picture")
        kept_speed = {} if before is None else {"seconds_per_picture": before}  # where all pictures were there already
        found = {**kept_speed, **work.found[number], "pictures": len(records)}
        if work.unrelated[number]:
            found["unrelated"] = len(work.unrelated[number])
        with speaks_for(session.folder):
            session.end_stage("sample", found, elapsed * shares[number])
    return work.errors


def read_manifest(folder: Path) -> list[dict[str, Any]]:
    """The records of samples/samples.jsonl; empty when nothing was sampled."""
    return files.read_jsonl(folder / "samples" / MANIFEST, NEEDED)


@dataclass
class _Drawing:
    """One group of concepts with its pictures.

    Args:
        number: of its run.
        session: its run.
        group: numbers of its concepts.
        method: with what was learnt.
        records: one per picture.
        inputs: what each concept's pictures depend on, see `picture_key`.
        missing: those that are still to be drawn.
    """

    number: int
    session: Session
    group: list[int]
    method: Method
    records: list[dict[str, Any]]
    inputs: list[dict[str, Any]]
    missing: list[dict[str, Any]] = field(default_factory=list)

    def take(self, most: int) -> list[dict[str, Any]]:
        """Take out the next records, of one variant."""
        variant = self.missing[0]["variant"]
        batch = [record for record in self.missing if record["variant"] == variant][:most]
        self.missing = [record for record in self.missing if record not in batch]
        return batch

    def calls(self, batch: list[dict[str, Any]]) -> Calls[Tensor]:
        """Pictures (B, 3, H, W) in [0, 1] of B records of one variant, as U-Net calls."""
        return self.method.sample_calls(
            [record["text"] for record in batch],
            [record["seed"] for record in batch],
            concepts=[self.group.index(record["concept_index"]) for record in batch],
            variant=batch[0]["variant"],
            **self.session.drawing(len(batch)),
        )


class _Sampling:
    """The work of `sample_all`: what waits, what was drawn, what went wrong."""

    def __init__(self, sessions: Sequence[Session]) -> None:
        self.sessions = sessions
        self.records: dict[int, list[dict[str, Any]]] = {number: [] for number in range(len(sessions))}
        self.unrelated: dict[int, list[dict[str, Any]]] = {number: [] for number in range(len(sessions))}
        self.found: dict[int, dict[str, Any]] = {number: {} for number in range(len(sessions))}
        self.errors: dict[int, Exception] = {}
        self.drawn: Counter[int] = Counter()  # pictures of each run
        model = model_inputs(sessions[0].stack, sessions[0].cfg.precision)  # once: it reads all weights
        self.inputs = [
            {"model": model, "sampler": sampler_inputs(session.sampler, session.negative, session.stack)}
            for session in sessions
        ]
        self.waiting = [(number, group) for number, session in enumerate(sessions) for group in session.groups]

    def run(self) -> None:
        """Draw everything."""
        while self.waiting:
            drawings = self._next()
            self._draw(drawings)
            for drawing in drawings:
                if drawing.number in self.errors:
                    continue
                if files.is_rank_zero():
                    anew = "seconds_per_picture" in self.found[drawing.number]
                    for index in drawing.group:
                        _attention(drawing.session, drawing.method, index, anew)
                self.records[drawing.number] += drawing.records
                self._draw_unrelated(drawing)

    def _next(self) -> list[_Drawing]:
        """Load the next group, and others that can share its calls while memory takes them."""
        found: list[_Drawing] = []
        room = Room(self.sessions[0].device)
        most = min(session.cfg.sample.batch_size for session in self.sessions)
        while self.waiting and len(found) < most and room.for_another:
            number, group = self.waiting[0]
            session = self.sessions[number]
            apart = bool(session.method_class.why_alone) or _rank()[1] > 1
            if found and apart:
                break
            del self.waiting[0]
            if number in self.errors:
                continue
            try:
                found.append(self._load(number, group))
            except UserError as error:
                self.errors[number] = error
                continue
            if apart:
                break
            trained = (p for p in found[-1].method.parameters() if p.requires_grad)
            room.take(sum(p.numel() * p.element_size() for p in trained))
        return found

    def _load(self, number: int, group: list[int]) -> _Drawing:
        session = self.sessions[number]
        method = load_artifacts(session, group).to(session.device)
        if isinstance(method, ShowsAttention):
            method.keeps_maps = True
        records, inputs = [], []
        for place, index in enumerate(group):
            own = concept_inputs(
                type(method), session.method_settings(), session.subjects[index], method.artifact(place)
            )
            inputs.append({**self.inputs[number], "concept": own})
            records += _plan(session, index, method, inputs[-1])
        return _Drawing(number, session, group, method, records, inputs, _own_missing(session.folder, records))

    def _draw_unrelated(self, drawing: _Drawing) -> None:
        """Pictures of texts that the concepts have no part in, and the frozen model's beside them."""
        session = drawing.session

        def draw(
            folder: Path, records: list[dict[str, Any]], paint: Callable[[list[dict[str, Any]]], torch.Tensor]
        ) -> None:
            barrier()  # the first process may just have put some there
            draw_missing(folder, records, paint, session.cfg.sample.batch_size, {})

        concepts = [session.data.concepts[index] for index in drawing.group]
        try:
            self.unrelated[drawing.number] += draw_unrelated(session, drawing.method, concepts, drawing.inputs, draw)
        except UserError as error:
            self._failed(drawing.number, error)

    def _draw(self, drawings: list[_Drawing]) -> None:
        """Draw the missing pictures of all, each call shared by as many as want one."""
        total = sum(len(drawing.missing) for drawing in drawings)
        progress = Progress(total)
        for drawing in drawings:
            self.drawn[drawing.number] += len(drawing.missing)
        drawn = {drawing.number for drawing in drawings if drawing.missing}
        while at_work := [drawing for drawing in drawings if drawing.missing and drawing.number not in self.errors]:
            most = max(1, min(each.session.cfg.sample.batch_size for each in at_work) // len(at_work))
            batches = [drawing.take(most) for drawing in at_work]
            pictures = together(
                at_work[0].session.stack,
                [drawing.calls(batch) for drawing, batch in zip(at_work, batches, strict=True)],
                failed=lambda place, error, at_work=at_work: self._failed(at_work[place].number, error),  # type: ignore[misc]
            )
            for drawing, batch, drawn_ones in zip(at_work, batches, pictures, strict=True):
                if drawn_ones is not None:
                    for record, picture in zip(batch, to_pil(drawn_ones), strict=True):
                        _write(drawing.session.folder, record, picture)
            progress.more(sum(map(len, batches)))
        for number in drawn:
            self.found[number]["seconds_per_picture"] = progress.seconds_each
        barrier()

    def _failed(self, number: int, error: Exception) -> None:
        """One run's mistake is its own; alone, and where memory ran out, it ends the work."""
        if len(self.sessions) == 1 or isinstance(error, torch.OutOfMemoryError):
            raise error
        self.errors[number] = error


def _attention(session: Session, method: Method, index: int, anew: bool) -> None:
    """grids/<concept>_attention.png of methods that edit by attention: source and first targets, first seed."""
    if not isinstance(method, ShowsAttention):
        return
    concept = session.data.concepts[index]
    path = session.folder / "grids" / f"{concept.name}_attention.png"
    if path.is_file() and not anew:
        return
    prompts = [fill(prompt, concept.placeholder) for prompt in concept.prompts[:MOST_MAPPED]]
    seed = int(session.cfg.sample.seeds[0])
    if found := method.attention_maps(prompts, seed, guidance=session.sampler.guidance):
        image = attention_grid(found, f"{concept.name}: where each word looks, mean over layers, heads and steps")
        save_png(image, path)


def _own_missing(folder: Path, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """This process's share of the pictures, without those that are there.

    Shares are of all records: of what is missing each process may see another part, as the others draw meanwhile.
    """
    rank, world = _rank()
    return not_there(folder, records[rank::world])


def draw_missing(
    folder: Path,
    records: list[dict[str, Any]],
    paint: Callable[[list[dict[str, Any]]], torch.Tensor],
    batch_size: int,
    found: dict[str, Any],
) -> None:
    """Draw and write the pictures that are not there yet, every process its share.

    Args:
        folder: of the run.
        records: with path, key, text, seed, concept and variant, which is the same for all.
        paint: pictures (B, 3, H, W) in [0, 1] of B records.
        batch_size: most records at a time.
        found: takes the seconds a picture took.
    """
    missing = _own_missing(folder, records)
    progress = Progress(len(missing))
    for start in range(0, len(missing), batch_size):
        batch = missing[start : start + batch_size]
        for record, picture in zip(batch, to_pil(paint(batch)), strict=True):
            _write(folder, record, picture)
        progress.more(len(batch))
    if missing:
        found["seconds_per_picture"] = progress.seconds_each
    barrier()


class Progress:
    """Says now and then how many pictures are drawn.

    Args:
        total: how many there will be.
    """

    def __init__(self, total: int) -> None:
        self.total, self.done, self.clock = total, 0, Clock(SECONDS_BETWEEN_LINES)

    def more(self, count: int) -> None:
        """So many more are drawn."""
        self.done += count
        if self.clock.due(self.done == self.total):
            left = self.clock.left(self.done, self.total) or 0.0
            log.info("drew %d of %d, %.1f s a picture, %.0f s left", self.done, self.total, self.seconds_each, left)

    @property
    def seconds_each(self) -> float:
        """What a picture took, in seconds."""
        return round(self.clock.elapsed / max(1, self.done), 3)


def not_there(folder: Path, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records whose pictures are not in the run folder yet."""
    missing = [record for record in records if not _is_there(folder, record)]
    if len(missing) < len(records):
        log.info("%d of %d pictures are already there", len(records) - len(missing), len(records))
    return missing


def barrier() -> None:
    """Wait for the other processes, where there are any."""
    if _rank()[1] > 1:
        torch.distributed.barrier()


def _rank() -> tuple[int, int]:
    """This process's share of the pictures."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _plan(session: Session, index: int, method: Method, inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One record per picture of a concept, with a key that names everything its pixels depend on."""
    cfg, concept = session.cfg, session.data.concepts[index]
    prompts = concept.prompts if cfg.sample.prompts is None else concept.prompts[: cfg.sample.prompts]
    # An edit also draws its own source text: what an edit keeps can be judged only beside what was learnt.
    asked = [(concept.templates[0], {"role": SOURCE})] if concept.edit else []
    asked += [(prompt, {"role": "target"} if concept.edit else {}) for prompt in prompts]
    seeds = seeds_of(cfg.sample.seeds)
    if isinstance(method, EditsPicture) and not method.seeded:
        seeds = seeds[:1]
    records = []
    for number, (prompt, role) in enumerate(asked):
        for variant in method.variants:
            for seed in seeds:
                text = fill(prompt, concept.placeholder)
                ending = "_".join([f"{number:02d}", str(seed), *([variant.replace("=", "-")] if variant else [])])
                records.append(
                    {
                        "concept": concept.name, "prompt": prompt, "text": text, "placeholder": concept.placeholder,
                        "word": concept.word, "seed": seed, "variant": variant,
                        "path": f"samples/{concept.name}/{ending}.png",
                        "key": picture_key(**inputs, text=text, seed=seed, variant=variant), "concept_index": index,
                        **role,
                    }
                )  # fmt: skip
    return records


def seeds_of(seeds: Sequence[Any]) -> list[int]:
    """The seeds as asked, each once: a picture drawn twice must not count twice."""
    return list(dict.fromkeys(int(seed) for seed in seeds))


def _is_there(folder: Path, record: dict[str, Any]) -> bool:
    path = folder / record["path"]
    if not path.is_file():
        return False
    try:
        with Image.open(path) as picture:
            picture.load()
            return getattr(picture, "text", {}).get("key") == record["key"]
    except (OSError, ValueError, SyntaxError) as error:  # Pillow's readers raise any of them
        log.warning("%s cannot be read (%s): it is drawn again.", path, error)
        return False


def _write(folder: Path, record: dict[str, Any], picture: Image.Image) -> None:
    """A PNG that says what it shows: prompt, seed and key are in its text fields."""
    info = PngInfo()
    for name in ("text", "concept", "variant", "key"):
        info.add_itxt("prompt" if name == "text" else name, record[name])
    info.add_text("seed", str(record["seed"]))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", pnginfo=info)
    files.atomic_write(folder / record["path"], buffer.getvalue())


def write_grids(
    folder: Path, concepts: Sequence[Concept], records: list[dict[str, Any]], size: int, title: str
) -> None:
    """grids/<concept>.png: the reference pictures, then a row per prompt (and variant), a column per seed.

    Args:
        folder: of the run.
        concepts: whose pictures.
        records: of all pictures.
        size: of the model's pictures.
        title: method and model.
    """
    for concept in concepts:
        mine = [record for record in records if record["concept"] == concept.name]
        rows: dict[str, list[Image.Image | None]] = {}
        for record in mine:
            with Image.open(folder / record["path"]) as picture:
                label = " ".join(filter(None, [record["text"], f"[{record['variant']}]" if record["variant"] else ""]))
                rows.setdefault(label, []).append(picture.convert("RGB"))
        if not rows:
            continue
        if concept.edit:
            save_png(_edit_strip(folder, concept, mine, size, title), folder / "grids" / f"{concept.name}.png")
            continue
        references = [view.resize((size, size), Image.Resampling.BICUBIC) for view in concept.views]
        widest = max(len(row) for row in rows.values())
        image = grid(
            [references[: max(widest, 5)], *rows.values()],
            rows=[f"{concept.name}: references", *rows],
            title=f"{concept.name}, {title}",
        )
        save_png(image, folder / "grids" / f"{concept.name}.png")


def _edit_strip(folder: Path, concept: Concept, records: list[dict[str, Any]], size: int, title: str) -> Image.Image:
    """The source and, where known, the true results; then a row per seed (and variant): reconstruction, edits."""
    edit = concept.edit
    assert edit
    # A column per asked prompt, the source text first; by its number: concept data may ask for the source text twice.
    columns: dict[str, str] = {}
    rows: dict[str, list[Image.Image | None]] = {}
    for record in records:
        columns.setdefault(Path(record["path"]).name.split("_")[0], record["text"])
        with Image.open(folder / record["path"]) as picture:
            label = " ".join(filter(None, [f"seed {record['seed']}", record["variant"]]))
            rows.setdefault(label, []).append(picture.convert("RGB"))
    source = crop(concept.views[0], size)
    truths = [truth and truth.resize((size, size), Image.Resampling.BICUBIC) for truth in edit.truths]
    return grid(
        [[source, *truths[: len(columns) - 1]], *rows.values()],
        rows=["source" + (", truth" if truths else ""), *rows],
        columns=[text.replace(concept.placeholder, f"<{concept.word}>") for text in columns.values()],
        title=f"{concept.name}, {title}",
    )
