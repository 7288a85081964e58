"""Run folders -> columns of numbers: what was scored, by which method, on which subject, prompt and seed.

A thousand runs are some million rows: each is read once and kept as a few numbers (codes of names), 40 bytes a score.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hiperlab import files
from hiperlab.compare.conditions import conditions, unlike
from hiperlab.compare.labels import PLACES, Contender, config, few, in_order, overrides, told_apart
from hiperlab.compare.statistics import Values
from hiperlab.errors import UserError, near
from hiperlab.metric.rows import CEILING, NEEDED, read_scores
from hiperlab.metric.table import counts, refuse_mixtures

RESULTS = "results.json"
# A folder with one of them is a run folder, even one that was killed early, or a job that never came to start.
MARKS = (RESULTS, "overrides.yaml", "run.log", "job.log")
SWEEP = "sweep.json"  # what a sweep keeps of its jobs
LISTED = 5  # names that a message about a misspelt one lists
NO_SEED = -1  # of a score of several pictures
STAMP = ("metric", "protocol", "protocol_hash", "weights")
COSTS = {  # columns of a run's cost
    "train_seconds": "training, seconds a subject",
    "picture_seconds": "seconds a picture",
    "peak_memory": "peak memory of training, bytes",
    "artifact_bytes": "kept, bytes a subject",
    "trained_parameters": "trained parameters a subject",
}


class Subject(NamedTuple):
    """What was personalised, or edited: a concept of a data set."""

    data: str
    concept: str


class Metric(NamedTuple):
    """A score.

    Attributes:
        name: as in scores.jsonl.
        lower_is_better: whether less is better.
        weights: of its judge.
    """

    name: str
    lower_is_better: bool
    weights: str


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: where it lies.
        results: its results.json.
        asked: its overrides, key -> value.
        conditions: what it was measured with beside its method, see `conditions`.
        config: composed; {} where it kept none, so that of these only what it was asked is known.
    """

    folder: Path
    results: Mapping[str, Any]
    asked: Mapping[str, str]
    conditions: Mapping[str, str]
    config: Mapping[str, Any]

    @property
    def method(self) -> str:
        """Its method's name."""
        return str(self.results.get("method") or self.asked.get("method") or "no method")

    @property
    def seed(self) -> int:
        """That it was trained with."""
        seed = self.results.get("seed", self.asked.get("seed", 0))
        return int(seed) if str(seed).lstrip("-").isdecimal() else 0

    @property
    def steps(self) -> int | None:
        """Training steps that it made."""
        return _whole(self.results.get("steps"))

    @property
    def data(self) -> str:
        """Its data set, with where its pictures lie."""
        places = [f"{key}={self.asked[key]}" for key in PLACES if key in self.asked]
        return " ".join([str(self.results.get("data") or self.asked.get("data") or ""), *places]).strip()

    @property
    def shared_by(self) -> int:
        """Runs that trained in the same process at the same time."""
        return _whole(_within(self.results, "stages", "fit", "shared_by")) or 1

    @property
    def cost(self) -> dict[str, float | None]:
        """Column of `COSTS` -> number; None where it was not kept."""
        fit = _within(self.results, "stages", "fit")
        fit = fit if isinstance(fit, dict) else {}
        subjects = max(1, len(_list(self.results.get("concepts"))))
        memory = fit.get("peak_memory") or self.results.get("peak_memory")
        memory = memory if isinstance(memory, dict) else {}
        return {
            "train_seconds": _share(fit.get("train_seconds", _within(self.results, "seconds", "fit")), subjects),
            "picture_seconds": _number(_within(self.results, "stages", "sample", "seconds_per_picture")),
            "peak_memory": _number(memory.get("cuda", memory.get("process"))),
            "artifact_bytes": _share(fit.get("artifact_bytes"), subjects),
            "trained_parameters": _share(self.results.get("trainable_parameters"), subjects),
        }


@dataclass(frozen=True)
class Columns:
    """Scores, one line each (N,): codes of the lists of `Measured`, seeds and the value (NaN: nothing was found)."""

    run: NDArray[np.int32]
    contender: NDArray[np.int32]
    metric: NDArray[np.int32]
    subject: NDArray[np.int32]
    prompt: NDArray[np.int32]
    seed: NDArray[np.int64]
    value: NDArray[np.float64]


class Picture(NamedTuple):
    """A drawn picture: its run, whose it is, what it shows, and where it lies in its run folder."""

    run: int
    contender: int
    subject: int
    prompt: int
    seed: int
    role: str
    path: str


@dataclass(frozen=True)
class Measured:
    """All that was read.

    Attributes:
        runs: the finished ones.
        contenders: lines of the tables, in the order in which they were found.
        metrics: scores, in the protocol's order.
        subjects: what was personalised.
        prompts: with "{}" where the concept stands; "" of scores of several pictures.
        scores: one line per number.
        pictures: one per picture.
        ceilings: (metric, subject), by their places in the lists -> real pictures against each other.
        protocol: its name and hash.
        trained: whether the judges are.
        left_out: a line for each folder that does not count.
        notes: what a reader must know of the runs.
        unlike: a sentence on settings in which the contenders were not measured alike; "" for none.
    """

    runs: list[Run]
    contenders: list[Contender]
    metrics: list[Metric]
    subjects: list[Subject]
    prompts: list[str]
    scores: Columns
    pictures: list[Picture]
    ceilings: dict[tuple[int, int], float]
    protocol: str
    trained: bool
    left_out: list[str]
    notes: list[str]
    unlike: str

    @cached_property
    def names(self) -> list[str]:
        """The contenders' names."""
        return [each.name for each in self.contenders]

    def subject_name(self, subject: int) -> str:
        """A subject's name; with its data set only where there are several."""
        data, concept = self.subjects[subject]
        return concept if len({each.data for each in self.subjects}) == 1 else f"{data} · {concept}"

    @cached_property
    def training_seeds(self) -> NDArray[np.int64]:
        """The runs' own seeds."""
        return np.array([run.seed for run in self.runs], dtype=np.int64)

    @cached_property
    def _order(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Lines sorted by contender and metric, and where each pair begins."""
        key = self.scores.contender.astype(np.int64) * len(self.metrics) + self.scores.metric
        order = np.argsort(key, kind="stable")
        return order, np.searchsorted(key[order], np.arange(len(self.contenders) * len(self.metrics) + 1))

    def lines(self, contender: int, metric: int) -> NDArray[np.int64]:
        """Places of the scores of one contender under one metric."""
        order, begin = self._order
        place = contender * len(self.metrics) + metric
        return order[begin[place] : begin[place + 1]]

    def runs_of(self, contender: int) -> NDArray[np.int32]:
        """Places of the runs with scores of a contender, ascending."""
        return np.unique(self.scores.run[self.scores.contender == contender])

    def values(self, contender: int, metric: int) -> Values:
        """Scores of one contender under one metric with their keys, as `statistics` takes them."""
        at, s = self.lines(contender, metric), self.scores
        return Values(s.value[at], s.subject[at], s.prompt[at], s.seed[at], self.training_seeds[s.run[at]])


# ---- finding --------------------------------------------------------------------------------------------------------


def find(paths: Sequence[Path]) -> list[Path]:
    """Run folders: the given ones, or all below them (of a sweep, of a folder of sweeps), each once, by name.

    Of a sweep also those that its record lists though they were never made, or are gone: `read` says why.

    Raises:
        UserError: a path is no folder.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            folders = [each.name for each in path.parent.iterdir() if each.is_dir()] if path.parent.is_dir() else []
            raise UserError(f"{path} is no folder of runs.{near(path.name, folders, listed=LISTED)}")
        for folder in _below(path):
            found.setdefault(folder.resolve())
    return list(found)


def _below(path: Path) -> Iterator[Path]:
    """Run folders in a folder, itself included; nothing is looked for inside of one."""
    for folder, inside, names in os.walk(path):
        if any(mark in names for mark in MARKS):
            inside.clear()
            yield Path(folder)
        elif SWEEP in names:
            inside[:] = sorted({*inside, *_jobs(Path(folder))})
            yield from (Path(folder) / name for name in inside if not (Path(folder) / name).is_dir())
        inside[:] = sorted(name for name in inside if not name.startswith("."))


def _jobs(sweep: Path) -> dict[str, str]:
    """A sweep's jobs by the names of their folders, and what its record says became of each; {} without a record."""
    try:
        jobs = json.loads((sweep / SWEEP).read_text(encoding="utf-8"))["jobs"]
        told = {str(job["job"]): (str(job["status"]), " ".join(str(job.get("error") or "").split())) for job in jobs}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # none, or another program's: the folders that are there speak for themselves
    plain = {name: texts for name, texts in told.items() if name == Path(name).name and not name.startswith(".")}
    return {name: ": ".join(filter(None, [status, error[:200]])) for name, (status, error) in plain.items()}


# ---- reading --------------------------------------------------------------------------------------------------------


def read(folders: Sequence[Path]) -> Measured:
    """Read finished runs.

    Args:
        folders: run folders.

    Raises:
        UserError: none of them has scores, or they were scored under different protocols or judges' weights.
    """
    reader = _Reader()
    runs, left_out = [], []
    for folder in folders:
        try:
            runs.append(_run(folder))
        except UserError as error:
            left_out.append(f"{folder}: {error}")
    methods = list(dict.fromkeys(run.method for run in runs))
    for method in methods:
        mine = [run for run in runs if run.method == method]
        settings = told_apart([run.asked for run in mine], [run.config for run in mine])
        reader.settings.update({run.folder: each for run, each in zip(mine, settings, strict=True)})
    for run in sorted(runs, key=lambda run: (methods.index(run.method), in_order(reader.settings[run.folder]))):
        try:
            reader.add(run)
        except UserError as error:
            left_out.append(f"{run.folder}: {error}")
    if not reader.runs:
        why = f" Left out: {'; '.join(left_out[:5])}{' …' if len(left_out) > 5 else ''}." if left_out else ""
        raise UserError(f"no finished run with scores among {len(folders)} run folders.{why}")
    return reader.measured(left_out)


def _run(folder: Path) -> Run:
    """A run folder that finished.

    Raises:
        UserError: it did not, or is damaged.
    """
    try:
        found = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = f"has no {RESULTS}" if folder.is_dir() else "there is no such folder"
        told = _jobs(folder.parent).get(folder.name)
        raise UserError(f"{what} ({f'its sweep says {told}' if told else 'it was stopped early'})") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{RESULTS} is damaged ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(found, dict):
        raise UserError(f"{RESULTS} is damaged (no table of values)")
    if found.get("status") != "finished":
        raise UserError(f"is not finished (status: {found.get('status', 'none')})")
    asked, composed = overrides(folder), config(folder)
    return Run(folder, found, asked, conditions(composed, asked, folder), composed)


class _Names(dict[Any, int]):
    """Numbers for names, in the order in which they come."""

    def code(self, name: Any) -> int:
        return self.setdefault(name, len(self))


class _Reader:
    """What was read so far."""

    def __init__(self) -> None:
        self.settings: dict[Path, tuple[tuple[str, str], ...]] = {}
        self.runs: list[Run] = []
        self.contenders, self.metrics, self.subjects, self.prompts = _Names(), _Names(), _Names(), _Names()
        self.lower: dict[str, bool] = {}
        self.stamps: dict[tuple[str, ...], Path] = {}
        self.trained = True
        self.codes: list[NDArray[np.int32]] = []
        self.seeds: list[NDArray[np.int64]] = []
        self.values: list[NDArray[np.float64]] = []
        self.pictures: list[Picture] = []
        self.ceilings: dict[tuple[int, int], list[float]] = {}
        self.notes: dict[str, None] = {}
        self.seen: dict[tuple[Any, ...], list[Path]] = {}

    def add(self, run: Run) -> None:
        """Take in a run's scores and pictures.

        Raises:
            UserError: it has no scores, or damaged ones; nothing of it was taken in then.
        """
        try:
            rows = [row for row in read_scores(run.folder) if counts(row)]
            checked = [_checked(row) for row in rows]
        except (UserError, KeyError, TypeError, ValueError, OSError) as error:
            raise UserError(f"scores.jsonl is damaged ({' '.join(str(error).split())[:160]})") from None
        if not rows:
            raise UserError("nothing was scored")
        number, data, settings = len(self.runs), run.data, self.settings[run.folder]
        self.runs.append(run)
        codes, seeds, values = [], [], []
        for row, (value, seed) in zip(rows, checked, strict=True):
            name = row["metric"]
            metric, subject = self.metrics.code(name), self.subjects.code(Subject(data, row["concept"]))
            self.stamps.setdefault(tuple(str(row.get(key, "")) for key in STAMP), run.folder)
            self.trained &= bool(row.get("trained", True))
            if row["kind"] == CEILING:
                if math.isfinite(value):
                    self.ceilings.setdefault((metric, subject), []).append(value)
                continue
            self.lower.setdefault(name, bool(row.get("lower_is_better")))
            contender = self.contenders.code(Contender(run.method, settings, str(row.get("variant") or "")))
            codes.append((number, contender, metric, subject, self.prompts.code(str(row.get("prompt") or ""))))
            seeds.append(seed)
            values.append(value)
        self.codes.append(np.array(codes, dtype=np.int32).reshape(-1, 5))
        self.seeds.append(np.array(seeds, dtype=np.int64))
        self.values.append(np.array(values, dtype=np.float64))
        self._add_pictures(run, number, data, settings)
        self._note(run)

    def _add_pictures(self, run: Run, number: int, data: str, settings: tuple[tuple[str, str], ...]) -> None:
        """The lines of samples/samples.jsonl; a damaged file costs the pictures only."""
        try:
            records = files.read_jsonl(run.folder / "samples" / "samples.jsonl", NEEDED)
        except (UserError, OSError) as error:
            self.notes.setdefault(f"{run.folder}: its pictures are not shown: {error}")
            return
        for record in records:
            path = PurePosixPath(str(record["path"]))
            if path.is_absolute() or ".." in path.parts:  # a record chooses no file outside its folder
                self.notes.setdefault(f"{run.folder}: a picture outside the run folder is not shown: {path}")
                continue
            contender = self.contenders.code(Contender(run.method, settings, str(record.get("variant") or "")))
            subject, prompt = self.subjects.code(Subject(data, str(record["concept"]))), str(record["prompt"])
            seed = _whole(record.get("seed"))
            self.pictures.append(
                Picture(
                    number, contender, subject, self.prompts.code(prompt), NO_SEED if seed is None else seed,
                    str(record.get("role") or ""), str(path),
                )
            )  # fmt: skip

    def _note(self, run: Run) -> None:
        """What the run says of itself, and which runs are the same to a comparison."""
        for note in [run.results.get("model_note"), *_list(run.results.get("notes"))]:
            if note:
                self.notes.setdefault(str(note))
        concepts = tuple(map(str, _list(run.results.get("concepts"))))
        key = (run.method, self.settings[run.folder], run.data, run.seed, concepts)
        self.seen.setdefault(key, []).append(run.folder)

    def _all_notes(self) -> list[str]:
        """What was noted; of subjects that share a note one line, and a line for runs that are averaged."""
        concepts = {subject.concept for subject in self.subjects}
        whose: dict[str, list[str]] = {}
        for note in self.notes:
            name, colon, rest = note.partition(": ")
            whose.setdefault(rest if colon and name in concepts else note, []).extend([name] * (name in concepts))
        found = [f"{few(names)}: {text}" if names else text for text, names in whose.items()]
        for folders in self.seen.values():
            if len(folders) > 1:
                found.append(f"{few(list(map(str, folders)))} differ in nothing that is compared: they are averaged.")
        bare = [str(run.folder) for run in self.runs if not run.config]
        if bare:
            found.append(
                f"{few(bare)} {'keeps' if len(bare) == 1 else 'keep'} no config.yaml: of what their pictures were "
                "drawn with only their overrides are known."
            )
        return found

    def measured(self, left_out: list[str]) -> Measured:
        """Everything as columns.

        Raises:
            UserError: the scores are several protocols' or judges'.
        """
        stamps = [dict(zip(STAMP, stamp, strict=True)) for stamp in self.stamps]
        try:
            refuse_mixtures(stamps)
        except UserError as error:
            raise UserError(f"{error} {self._examples()}") from None
        weights = {stamp["metric"]: stamp["weights"] for stamp in stamps}
        codes, protocol = np.concatenate(self.codes), stamps[0]
        columns = Columns(*codes.T, np.concatenate(self.seeds), np.concatenate(self.values))  # type: ignore[call-arg]
        return Measured(
            runs=self.runs,
            contenders=list(self.contenders),
            metrics=[Metric(name, self.lower.get(name, False), weights.get(name, "")) for name in self.metrics],
            subjects=list(self.subjects),
            prompts=list(self.prompts),
            scores=columns,
            pictures=self.pictures,
            ceilings={key: sum(found) / len(found) for key, found in self.ceilings.items()},
            protocol=f"{protocol['protocol']} {protocol['protocol_hash']}".strip(),
            trained=self.trained,
            left_out=left_out,
            notes=self._all_notes(),
            unlike=unlike(self._groups(columns)),
        )

    def _groups(self, columns: Columns) -> list[tuple[Contender, list[tuple[str, Mapping[str, str]]]]]:
        """The contenders with what their runs were measured with."""
        pairs = np.unique(np.stack([columns.contender, columns.run]), axis=1).T.tolist()
        runs = [(run.data, run.conditions) for run in self.runs]
        return [(each, [runs[run] for c, run in pairs if c == place]) for each, place in self.contenders.items()]

    def _examples(self) -> str:
        """A folder of each protocol, or of each judge's weights."""
        found: dict[tuple[str, ...], Path] = {}
        several = len({stamp[1:3] for stamp in self.stamps}) > 1
        for stamp, folder in self.stamps.items():
            key = stamp[1:3] if several else (stamp[0], stamp[3])
            if several or len({other[3] for other in self.stamps if other[0] == stamp[0]}) > 1:
                found.setdefault(key, folder)
        return "For example: " + ", ".join(f"{' '.join(key)} in {folder}" for key, folder in list(found.items())[:4])


def _checked(row: Mapping[str, Any]) -> tuple[float, int]:
    """A row's value and seed.

    Raises:
        ValueError: a column is of another kind.
    """
    value, seed = row["value"], row.get("seed")
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        raise ValueError(f"value={value!r} is no number")
    if isinstance(seed, bool) or not isinstance(seed, int | None):
        raise ValueError(f"seed={seed!r} is no whole number")
    if not isinstance(row["concept"], str) or not isinstance(row["metric"], str):
        raise ValueError("concept and metric are no names")
    return math.nan if value is None or not math.isfinite(value) else float(value), NO_SEED if seed is None else seed


def _within(found: Any, *keys: str) -> Any:
    """A value some tables deep; None where one is missing."""
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _list(found: Any) -> list[Any]:
    return found if isinstance(found, list) else []


def _number(found: Any) -> float | None:
    return None if isinstance(found, bool) or not isinstance(found, int | float) else float(found)


def _whole(found: Any) -> int | None:
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def _share(found: Any, parts: int) -> float | None:
    number = _number(found)
    return None if number is None else number / parts
