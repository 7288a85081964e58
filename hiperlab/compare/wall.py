"""The page's pictures: a row per subject, prompt and seed, a column per method, beside what they should be."""

from __future__ import annotations

import base64
import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
from PIL import Image

from hiperlab.compare import tables
from hiperlab.compare.references import references
from hiperlab.compare.runs import NO_SEED, Picture
from hiperlab.compare.summary import Summary
from hiperlab.metric.table import SOURCE

MOST_SIDE = 256  # pixels of an embedded picture
MOST_BYTES = 30_000_000  # of all embedded pictures together, unless all are asked for
QUALITY = 90
TRUTH = "truth_distance"
ALL, NONE, LINK = "all", "none", "link"
Key = tuple[int, int, int]  # subject, prompt, seed


def embedded(data: bytes, kind: str) -> str:
    """Bytes as an address that holds them."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


class Shown(NamedTuple):
    """A picture of the wall: its address ("" where there is none), and its scores."""

    address: str
    note: str = ""


@dataclass
class Row:
    """Pictures of one subject, prompt and seed, one per method, beside what they should be."""

    number: int
    prompt: str
    label: str
    seed: str
    truth: str
    cells: list[Shown]


@dataclass
class Block:
    """A subject's rows under its real pictures, or why there are none."""

    subject: str
    references: list[str]
    missing: str
    rows: list[Row] = field(default_factory=list)


class Wall:
    """Pictures by subject, prompt and seed, a column per method."""

    def __init__(self, summary: Summary, folder: Path, asked: str) -> None:
        self.summary, self.measured, self.folder, self.asked = summary, summary.measured, folder, asked
        self.bytes = 0
        self.unreadable: list[str] = []
        self.too_many = 0  # left out, for the page would be too large
        self.by_key: dict[Key, dict[int, Picture]] = {}
        seeds = self.measured.training_seeds
        wanted = set(summary.contenders)
        pictures = [picture for picture in self.measured.pictures if picture.contender in wanted]
        for picture in sorted(pictures, key=lambda each: int(seeds[each.run])):
            row = self.by_key.setdefault((picture.subject, picture.prompt, picture.seed), {})
            row.setdefault(picture.contender, picture)  # of several training seeds the least
        self.keys = self._chosen()
        self.scores = self._scores()

    @property
    def note(self) -> str:
        """How many pictures of how many are shown, and which; once `blocks` has made them."""
        total = sum(map(len, self.by_key.values()))
        if self.asked == NONE or not total:
            return "No pictures were asked for." if total else ""
        shown = sum(len(self.by_key[key]) for key in self.keys) - len(self.unreadable) - self.too_many
        parts = [f"{shown} of {total} pictures."]
        if len(np.unique(self.measured.training_seeds)) > 1:
            parts.append("Of several training seeds the least is shown.")
        if self.asked == LINK:
            parts.append("They lie in the run folders: this page shows them only where it was written.")
        edits = any(picture.role for picture in self.measured.pictures)
        if not edits and any(each.name == TRUTH for each in self.measured.metrics):
            parts.append(f"The true pictures of {TRUTH} are drawn by its judge and kept nowhere.")
        if shown + len(self.unreadable) < total:
            parts.append("--pictures all puts all into the page.")
        if self.unreadable:
            parts.append(f"Not readable: {', '.join(self.unreadable[:3])}{' …' * (len(self.unreadable) > 3)}.")
        return " ".join(parts)

    def _chosen(self) -> list[Key]:
        """The rows that are shown: first one seed of each prompt, and of all subjects alike, as many as asked for."""
        if self.asked == NONE:
            return []
        most = int(self.asked) if self.asked.isdecimal() else 10**9
        turn: dict[Key, tuple[int, int]] = {}
        seeds: dict[tuple[int, int], int] = {}
        prompts: dict[int, dict[int, int]] = {}
        for key in self.by_key:
            subject, prompt, _ = key
            of = prompts.setdefault(subject, {})
            place = seeds[subject, prompt] = seeds.get((subject, prompt), -1) + 1
            turn[key] = (place, of.setdefault(prompt, len(of)))
        chosen, count = [], 0
        for key in sorted(self.by_key, key=lambda key: (*turn[key], key[0])):
            if count + len(self.by_key[key]) > most:
                break
            count += len(self.by_key[key])
            chosen.append(key)
        return sorted(chosen, key=lambda key: (key[0], turn[key][1], turn[key][0]))

    def _scores(self) -> dict[tuple[int, int, int, Key], float]:
        """(metric, run, contender, key) -> value, of the trade-off's two scores."""
        s, wanted = self.measured.scores, [m for m in (self.summary.x, self.summary.y) if m is not None]
        places = np.flatnonzero(np.isin(s.metric, wanted)) if self.keys else np.zeros(0, dtype=np.int64)
        columns = (s.metric, s.run, s.contender, s.subject, s.prompt, s.seed, s.value)
        lines = zip(*(column[places].tolist() for column in columns), strict=True)
        return {(m, run, c, (subject, prompt, seed)): value for m, run, c, subject, prompt, seed, value in lines}

    def blocks(self) -> list[Block]:
        """A block per subject, its rows in order."""
        number, blocks = 0, []
        for subject in dict.fromkeys(key[0] for key in self.keys):
            beside = references(self.measured, subject)
            images = [self._jpeg(image) for image in beside.shown]
            block = Block(self.measured.subject_name(subject), images, beside.missing)
            for key in (key for key in self.keys if key[0] == subject):
                number += 1
                truth = beside.truths.get(key[1])
                row = self.by_key[key]
                roles = {picture.role for picture in row.values()}
                prompt = self.measured.prompts[key[1]].replace("{}", "S*")
                block.rows.append(
                    Row(
                        number, prompt, "the source again" if roles == {SOURCE} else "",
                        "" if key[2] == NO_SEED else f"seed {key[2]}", self._jpeg(truth) if truth else "",
                        [self._shown(row.get(c), key) for c in self.summary.contenders],
                    )
                )  # fmt: skip
            blocks.append(block)
        return blocks

    def _shown(self, picture: Picture | None, key: Key) -> Shown:
        if picture is None:
            return Shown("")
        path = self.measured.runs[picture.run].folder / picture.path
        places = [(m, picture.run, picture.contender, key) for m in (self.summary.x, self.summary.y) if m is not None]
        scores = [
            f"{tables.head(self.summary, place[0])} {self._number(place[0], self.scores[place])}"
            for place in places
            if place in self.scores
        ]
        if self.asked == LINK:
            return Shown(self._address(path), " · ".join(scores))
        if self.asked != ALL and self.bytes > MOST_BYTES:
            self.too_many += 1
            return Shown("")
        try:
            with Image.open(path) as image:
                return Shown(self._jpeg(image.convert("RGB")), " · ".join(scores))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # Pillow's readers raise any of them
            self.unreadable.append(path.name)
            return Shown("")

    def _number(self, metric: int, value: float) -> str:
        return self.summary.number(metric, value) if metric in self.summary.decimals else f"{value:.3g}"

    def _address(self, path: Path) -> str:
        """Relative to the page, so that a folder with both can be moved."""
        return quote(Path(os.path.relpath(path, self.folder.resolve())).as_posix())

    def _jpeg(self, image: Image.Image) -> str:
        """A picture as an address that holds it."""
        if max(image.size) > MOST_SIDE:
            image = image.copy()
            image.thumbnail((MOST_SIDE, MOST_SIDE), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="JPEG", quality=QUALITY, subsampling=0)
        self.bytes += buffer.tell()
        return embedded(buffer.getvalue(), "image/jpeg")
