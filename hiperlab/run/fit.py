"""The fit stage: train, resume, keep; what can share passes of the frozen network does."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate

from hiperlab import files
from hiperlab.base import artifact
from hiperlab.base.capability import Exportable, ReadsPicture
from hiperlab.base.method import Method
from hiperlab.base.side_by_side import shares_passes
from hiperlab.errors import StoppedError, UserError
from hiperlab.hub import first_line
from hiperlab.report.checkpoint import step_of
from hiperlab.report.environment import Room, peak_memory
from hiperlab.report.progress import StepProgress
from hiperlab.report.signals import StopCallback, StopSignals
from hiperlab.run import monitor
from hiperlab.run.resume import checkpoint_folder, starting_point
from hiperlab.run.session import Session, parts, speaks_for
from hiperlab.run.train_together import train_together
from hiperlab.run.trainee import Trainee, as_published, begin, enrol, first_pixels, make_trainer, split_batch
from hiperlab.sweep.fold import MOST_ROWS, on_one_device

log = logging.getLogger(__name__)
BYTES_PER_NUMBER = 16  # of a trained one: itself, its gradient, and two moments, in float32


def check_trainer(session: Session) -> None:
    """Set up Lightning's Trainer once, before the model loads: it refuses devices that are not there.

    Raises:
        UserError: what it says.
    """
    cfg = session.cfg.trainer
    if cfg.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError("trainer.accelerator=gpu, but torch sees no GPU here. Use trainer=cpu, or mend the driver.")
    try:
        settings = instantiate(cfg, _convert_="all")
        pl.Trainer(**settings, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    except Exception as error:  # Lightning raises its own, TypeError and ValueError, and strategies raise theirs
        raise UserError(f"trainer cannot be set up: {first_line(error)}.") from error


def check_stop(session: Session) -> None:
    """Refuse `fit.stop` for a method whose training does not end that way.

    Raises:
        UserError: saying why.
    """
    method = session.method_class
    if session.cfg.fit.stop is not None and method.why_no_early_stop:
        raise UserError(f"fit.stop={session.cfg.fit.stop}: {method.why_no_early_stop}. Use fit.stop=null.")


class _Piece(NamedTuple):
    """A group of concepts that one method trains.

    Attributes:
        number: its run's among those that train.
        group: numbers of its concepts in that run.
        resume: where it goes on.
        micro: most images of a concept at a time.
        most: most pieces that it may share a pass with, itself included; None for as many as there is room for.
    """

    number: int
    group: tuple[int, ...]
    resume: str | None
    micro: int | None
    most: int | None = None


def fit(session: Session, signals: StopSignals, resume_command: str) -> None:
    """Train every concept and write its artifact.

    Raises:
        StoppedError: told to stop (everything is saved), or a loss was not finite.
        UserError: out of memory with nothing left to halve.
    """
    for error in fit_all([session], signals, resume_command).values():
        raise error


def fit_all(sessions: Sequence[Session], signals: StopSignals, resume_command: str) -> dict[int, Exception]:
    """Train the concepts of several runs, as many as possible in each pass of the frozen network.

    Args:
        sessions: runs that ask for the same model, precision, trainer and `fit` settings.
        signals: of the process.
        resume_command: how to go on, printed when stopped.

    Returns:
        Why a run did not get to the end of its training, by its number; the others did.

    Raises:
        StoppedError: told to stop; everything is saved.
    """
    for session in sessions:
        session.judges = sessions[0].judges  # one of each, for all
        with speaks_for(session.folder):
            log.info("stage fit")
    start = time.monotonic()
    training = _Training(sessions, signals, resume_command)
    training.run()
    sessions[0].judges.clear()  # the memory is needed for pictures
    elapsed = time.monotonic() - start
    shares = parts([_own_seconds(training.rows[number]) for number in range(len(sessions))])
    for number, session in enumerate(sessions):
        if number not in training.errors:
            rows = training.rows[number]
            with speaks_for(session.folder):
                if files.is_rank_zero():
                    _write_card(session, rows)
                session.end_stage("fit", _summed_up(session, rows), elapsed * shares[number])
    return training.errors


def _own_seconds(rows: list[dict[str, Any]]) -> float:
    """What a run's training took, without drawing and scoring in between: of a pass that several share, its part."""
    return sum(row["train_seconds"] / row["shared_by"] for row in rows)


def _summed_up(session: Session, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What results.json says of a run's training."""
    found = {key: rows[0][key] for key in ("world_size", "micro_batch_size", "accumulate")}
    found = {"steps": max(row["steps"] for row in rows), **found}
    found["ended_early"] = all(row["ended_early"] for row in rows)
    each = [(name, row) for row in rows for name in row["concepts"]]
    if session.cfg.fit.stop is not None or session.cfg.monitor is not None:
        found["stopped_at"] = {name: row["steps"] for name, row in each if row["ended_early"]}
        found["steps_saved"] = {name: session.cfg.fit.steps - row["steps"] for name, row in each}
    if session.cfg.monitor is not None:
        found["monitor"] = {"score": session.cfg.monitor, **{name: row["monitor"] for name, row in each}}
    found["trainable_parameters"] = sum(row["trainable_parameters"] for row in rows)
    found["train_seconds"] = round(_own_seconds(rows), 2)
    if (shared := max(row["shared_by"] for row in rows)) > 1:
        found["shared_by"] = shared
    found["loss"] = rows[-1]["loss"]
    found["artifact_bytes"] = sum(file.stat().st_size for file in (session.folder / "artifacts").glob("*.safetensors"))
    found["peak_memory"] = peak_memory()
    session.update(steps=found["steps"], trainable_parameters=found["trainable_parameters"])
    return found


class _Training:
    """The work of `fit_all`: what waits, what was done, what went wrong."""

    def __init__(self, sessions: Sequence[Session], signals: StopSignals, resume_command: str) -> None:
        self.sessions, self.signals, self.command = sessions, signals, resume_command
        self.rows: dict[int, list[dict[str, Any]]] = {number: [] for number in range(len(sessions))}
        self.errors: dict[int, Exception] = {}
        self.waiting = [
            _Piece(number, tuple(group), session.cfg.resume, session.cfg.fit.micro_batch_size)
            for number, session in enumerate(sessions)
            for group in session.groups
        ]

    def run(self) -> None:
        """Train everything."""
        while self.waiting:
            chosen = self._next()
            try:
                self._train(chosen)
                continue
            except torch.OutOfMemoryError:
                pass
            except (UserError, StoppedError) as error:
                if isinstance(error, StoppedError) and error.code != 1:
                    raise
                self._failed(chosen[0].number, error)
                continue
            torch.cuda.empty_cache()  # out here: the exception, and with it the failed attempt's tensors, is gone
            try:
                self.waiting = self._smaller(chosen) + self.waiting
            except UserError as error:
                self._failed(chosen[0].number, error)

    def _failed(self, number: int, error: Exception) -> None:
        self.errors.setdefault(number, error)
        if len(self.sessions) == 1:  # nobody else waits
            self.waiting.clear()

    def _next(self) -> list[_Piece]:
        """Take out the first piece that waits, with others that can share its passes."""
        first = self.waiting.pop(0)
        chosen = [first]
        if first.most != 1 and self._shares(first):
            step = self._step(first)
            mates = [piece for piece in self.waiting if self._shares(piece) and self._step(piece) == step]
            chosen += mates[: self._most(first) - 1]
            self.waiting = [piece for piece in self.waiting if piece not in chosen]
        return chosen

    def _shares(self, piece: _Piece) -> bool:
        """Whether its passes can be shared: one process, no gradient scaler (it skips everybody's step)."""
        session = self.sessions[piece.number]
        trainer = session.cfg.trainer
        one = trainer.devices != "auto" or torch.cuda.device_count() < 2
        return one and on_one_device(trainer, session.cfg.precision) and shares_passes(session.method_class)

    def _step(self, piece: _Piece) -> int:
        """The step it goes on from: only trainings at the same step share passes."""
        session = self.sessions[piece.number]
        path = starting_point(checkpoint_folder(session, list(piece.group)), piece.resume, session.cfg.fit.steps)
        return 0 if path is None else step_of(path)

    def _most(self, piece: _Piece) -> int:
        """How many such pieces may share a pass: as many rows as fill a device."""
        rows, _ = split_batch(self.sessions[piece.number].cfg.fit.batch_size, piece.micro, 1)
        return max(1, min(piece.most or MOST_ROWS, MOST_ROWS // (rows * len(piece.group))))

    def _enrolled(self, pieces: list[_Piece]) -> list[tuple[int, Trainee]]:
        """The pieces' methods with the numbers of their runs, while memory takes them; others leave and wait again.

        Raises:
            UserError: of a single piece.
        """
        found: list[tuple[int, Trainee]] = []
        room = Room(self.sessions[pieces[0].number].device)
        for place, piece in enumerate(pieces):
            if not room.for_another:
                self.waiting = pieces[place:] + self.waiting
                del pieces[place:]
                break
            try:
                trainee = enrol(self.sessions[piece.number], list(piece.group), piece.resume)
            except UserError as error:
                if len(pieces) == 1:
                    raise
                self._failed(piece.number, error)
                continue
            room.take(trainee.parameters_per_concept * len(piece.group) * BYTES_PER_NUMBER)
            found.append((piece.number, trainee))
        return found

    def _train(self, pieces: list[_Piece]) -> None:
        """Train some pieces in one loop.

        Raises:
            torch.OutOfMemoryError: nothing is lost: they go on from their newest checkpoints.
            StoppedError: told to stop; or, of a single piece, a loss was not finite.
            UserError: of a single piece.
        """
        enrolled = self._enrolled(pieces)
        ready = [each for each in enrolled if not each[1].method.finished]
        if len(ready) > 1:
            self._train_together(ready, pieces[0].micro)
        others = enrolled if len(ready) < 2 else [each for each in enrolled if each not in ready]
        for number, trainee in others:
            with speaks_for(trainee.session.folder):
                self.rows[number].append(_alone(trainee, pieces[0].micro, self.signals, self.command))

    def _train_together(self, ready: list[tuple[int, Trainee]], micro: int | None) -> None:
        trainees = [trainee for _, trainee in ready]
        stop = StopCallback(self.signals, trainees[0].checkpoints, self.command)
        start = time.monotonic()
        module, views = train_together(trainees, micro, stop)
        stop.raise_if_stopped()
        seconds = time.monotonic() - start - sum(trainee.seconds_aside for trainee in trainees)
        for place, (number, trainee) in enumerate(ready):
            if place in module.failed:
                self._failed(number, module.failed[place])
                continue
            view = views[place]
            accumulate = module.trainer.accumulate_grad_batches
            found = _row(trainee, view.global_step, 1, accumulate, seconds, view.callback_metrics)
            with speaks_for(trainee.session.folder):
                self.rows[number].append({**found, **_kept(trainee, view.global_step), "shared_by": len(ready)})

    def _smaller(self, pieces: list[_Piece]) -> list[_Piece]:
        """The same work in smaller passes: fewer trainings in one, then fewer images.

        Of one image each of a method's stacked concepts, the concepts go one by one.

        Raises:
            UserError: nothing is left to halve, or several processes would have to agree on it.
        """
        if len(pieces) > 1:
            most = len(pieces) // 2
            log.warning("out of memory with %d trainings in a pass: %d go together.", len(pieces), most)
            return [piece._replace(resume="auto", most=most) for piece in pieces]
        (piece,) = pieces
        session = self.sessions[piece.number]
        used, world = session.results["micro_batch_size"], session.results["world_size"]
        if used > 1 and world == 1:
            log.warning("out of memory: micro batch %d -> %d; the batch per step stays the same.", used, used // 2)
            return [piece._replace(resume="auto", micro=used // 2)]
        if len(piece.group) > 1 and world == 1:
            log.warning("out of memory with %d concepts in a pass: they go one by one.", len(piece.group))
            session.groups = [[index] for index in piece.group]
            micro = session.cfg.fit.micro_batch_size
            return [_Piece(piece.number, (index,), session.cfg.resume, micro, most=1) for index in piece.group]
        lower = f"fit.micro_batch_size={used // 2}, " if used > 1 else ""
        raise UserError(
            f"out of memory with {used} images at a time. Use {lower}model.optimise.gradient_checkpointing=true, "
            "precision=bf16, or a smaller model.size; then resume=auto goes on."
        )


def _alone(trainee: Trainee, micro: int | None, signals: StopSignals, resume_command: str) -> dict[str, Any]:
    """Train one piece in a loop of its own, on as many devices as are asked for."""
    session, method = trainee.session, trainee.method
    stop = StopCallback(signals, trainee.checkpoints, resume_command)
    trainer = make_trainer(session, [stop, *trainee.watchers(), StepProgress()], trainee.loggers())
    rows, accumulate = split_batch(session.cfg.fit.batch_size, micro, trainer.world_size)
    trainer.accumulate_grad_batches = accumulate
    data = trainee.data(rows, accumulate)
    begin([trainee], rows, trainer.world_size)
    start = time.monotonic()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*Found .* module.* in eval mode.*")  # the frozen stack: as it should be
        if not method.finished:
            trainer.fit(method, datamodule=data, ckpt_path=trainee.start, weights_only=True)
    stop.raise_if_stopped()
    seconds = time.monotonic() - start - trainee.seconds_aside
    kept = _kept(trainee, trainer.global_step) if trainer.is_global_zero else {"written": [], "monitor": None}
    trainer.strategy.barrier()
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    found = _row(trainee, trainer.global_step, trainer.world_size, accumulate, seconds, metrics)
    return found | kept | {"shared_by": 1}


def _kept(trainee: Trainee, steps: int) -> dict[str, Any]:
    """Write what a training of so many steps ends with; returns its files, its step and its scores."""
    session, method = trainee.session, trainee.method
    step = monitor.keep_best(session, trainee.group, method, steps)
    seconds = trainee.monitor.seconds if trainee.monitor else 0.0
    told = monitor.told(method, step, seconds)
    return {"written": write_artifacts(session, method, step), "artifact_steps": step, "monitor": told}


def _row(
    trainee: Trainee, steps: int, world: int, accumulate: int, seconds: float, metrics: Mapping[str, float]
) -> dict[str, Any]:
    """What became of a piece."""
    before = trainee.session.results.get("stages", {}).get("fit", {}).get("loss")
    return {
        "concepts": [concept.name for concept in trainee.method.concepts],
        "steps": steps,
        "ended_early": trainee.method.ended,
        "world_size": world,
        "micro_batch_size": trainee.session.results["micro_batch_size"],
        "accumulate": accumulate,
        "trainable_parameters": trainee.parameters_per_concept * len(trainee.group),
        "train_seconds": seconds,
        "loss": metrics.get("loss", before),  # of a training that was at its end already
    }


def write_artifacts(session: Session, method: Method, steps: int) -> list[artifact.Written]:
    """One safetensors per concept, and its files for other tools; returns what was written."""
    folder = session.folder / "artifacts"
    written = []
    for index, subject in enumerate(method.concepts):
        path = folder / f"{subject.name}.safetensors"
        artifact.write(path, method, index, session.method_settings(), steps, half=session.cfg.fit.half_artifacts)
        other = folder / subject.name
        other.mkdir(parents=True, exist_ok=True)
        exported = method.export(index, other, steps) if isinstance(method, Exportable) else []
        names = [path.relative_to(folder).as_posix() for path in exported]
        if not names:
            other.rmdir()
        written.append(artifact.Written(subject, names, method.said_elsewhere(index)))
    return written


def _write_card(session: Session, rows: list[dict[str, Any]]) -> None:
    written = [each for row in rows for each in row["written"]]
    name, stack = session.cfg.method._target_.rsplit(".", 1)[-1], session.stack
    steps = [row["artifact_steps"] for row in rows]
    text = artifact.card(name, stack.base, stack.note, steps, str(session.results["command"]), written)
    files.atomic_write(session.folder / "artifacts" / "README.md", text)


def load_artifacts(session: Session, group: list[int]) -> Method:
    """A method with trained concepts: the files named by `artifact=`, else those of the run folder.

    Raises:
        UserError: a file is missing or does not fit.
    """
    method = session.build_method(group)
    paths = session.given_artifacts
    if paths and len(paths) != len(session.data.concepts):
        raise UserError(f"artifact names {len(paths)} files for {len(session.data.concepts)} concepts: give one each.")
    for number, index in enumerate(group):
        name = session.data.concepts[index].name
        path = paths[index] if paths else session.folder / "artifacts" / f"{name}.safetensors"
        if not path.is_file():
            raise UserError(f"{path} does not exist: train first (stages=[fit,sample]), or give artifact=<file>.")
        if isinstance(method, ReadsPicture):  # ours brings its picture along; other tools' files may need the data's
            data = as_published(session.data, method)
            method.set_reference(number, first_pixels(data, data.concepts[index], session.stack.size))
        artifact.load_into(method, number, path)
    return method
