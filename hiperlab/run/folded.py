"""Several jobs of a sweep in one process: one frozen model, trainings that share its passes, each its own run folder.

A job's run folder, config, logs, checkpoints and results are those of a process of its own; its exit code is kept in a
file for the sweep that started this process.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from hiperlab import files
from hiperlab.cli.compose import compose
from hiperlab.cli.flags import arguments
from hiperlab.cli.overrides import values
from hiperlab.cli.process import told
from hiperlab.cli.targets import trusted
from hiperlab.errors import StoppedError, UserError
from hiperlab.report.signals import StopSignals
from hiperlab.run import stages
from hiperlab.run.asked import asked, within_run
from hiperlab.run.fit import fit_all
from hiperlab.run.sample import sample_all
from hiperlab.run.session import Session, configure_logging, open_session, speaks_for

log = logging.getLogger(__name__)


@dataclass
class _Job:
    """One of the jobs.

    Args:
        name: in its sweep.
        argv: its command line, behind `python -m hiperlab.run`.
        session: its run, once it has begun.
        hydra: Hydra's config of it.
    """

    name: str
    argv: list[str]
    session: Session | None = None
    hydra: Any = None
    allowed: list[str] = field(default_factory=list)


class _Jobs:
    """All jobs, and what became of each.

    Args:
        path: the file that names them; the exit codes are kept beside it.
    """

    def __init__(self, path: Path) -> None:
        asked_for = json.loads(path.read_text(encoding="utf-8"))
        self.all = [_Job(name, list(argv)) for name, argv in asked_for.items()]
        self.path = path.with_suffix(".codes")
        self.codes: dict[str, int] = {}

    @property
    def at_work(self) -> list[_Job]:
        """Those that have begun and not ended."""
        return [job for job in self.all if job.session is not None and job.name not in self.codes]

    def ended(self, job: _Job, code: int) -> None:
        """Keep a job's exit code."""
        self.codes[job.name] = code
        files.write_json(self.path, self.codes)

    @contextmanager
    def guarded(self, job: _Job) -> Iterator[None]:
        """Inside, everything is this job's: its command line, its log, its failure, which ends no other.

        Raises:
            StoppedError: the process was told to stop.
        """
        before, sys.argv = sys.argv, [sys.argv[0], *job.argv]
        hydra = HydraConfig.instance().cfg
        if job.hydra is not None:
            HydraConfig.instance().cfg = job.hydra
        try:
            with trusted(job.allowed), speaks_for(job.session.folder) if job.session else nullcontext():
                yield
        except Exception as error:
            text, code = told(error)
            self.say(job, text)
            self.ended(job, code)
            if isinstance(error, StoppedError) and code != 1:
                raise
        finally:
            sys.argv = before
            HydraConfig.instance().cfg = hydra

    def say(self, job: _Job, text: str) -> None:
        """A line in the job's own log, and in this process's."""
        print(f"{job.name}: {text}", file=sys.stderr, flush=True)
        folder = Path(values([word for word in job.argv if word.startswith("run_dir=")])["run_dir"])
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "job.log").open("a", encoding="utf-8") as file:
            file.write(f"{text}\n")


def run_folded(path: Path) -> int:
    """Run the jobs that a file names.

    Args:
        path: JSON: name -> command line behind `python -m hiperlab.run`; each has a `run_dir`.

    Returns:
        0 if all of them ended well, else 1.

    Raises:
        StoppedError: told to stop; everything is saved.
    """
    jobs = _Jobs(path)
    with ExitStack() as locks, StopSignals() as signals:
        try:
            for job in jobs.all:
                with jobs.guarded(job):
                    _begin(job, locks)
                    if job.session is None:
                        jobs.ended(job, 0)
            _load(jobs)
            _shared(jobs, "fit", lambda sessions: fit_all(sessions, signals, "the sweep's command"))
            _shared(jobs, "sample", sample_all)
            for job in jobs.at_work:
                _finish(jobs, job)
        except BaseException as error:
            for job in jobs.at_work:  # none of them may be left as running
                with suppress(type(error)), jobs.guarded(job), _marked(job):
                    raise
            raise
    return int(any(jobs.codes.values()))


def _begin(job: _Job, locks: ExitStack) -> None:
    """Compose a job, take its folder and check what it asks for; its session stays None where nothing is to do."""

    def task(cfg: Any) -> Session | None:
        job.hydra = HydraConfig.instance().cfg
        session = open_session(cfg)
        locks.enter_context(files.RunLock(session.folder))
        return session if stages.begin(session) else None

    with asked(arguments(job.argv)) as (hydra, request):
        job.allowed = request.allowed_targets
        job.session = within_run(hydra, request, compose(hydra, request, request.overrides), task)


@contextmanager
def _marked(job: _Job) -> Iterator[None]:
    assert job.session is not None
    with stages.recorded(job.session):
        yield


def _load(jobs: _Jobs) -> None:
    """Load the model once, for all."""
    at_work = jobs.at_work
    if not at_work:
        return
    first = at_work[0]
    configure_logging(*(job.session.folder for job in at_work if job.session))
    with jobs.guarded(first), _marked(first):
        assert first.session is not None
        stack = first.session.stack
    if first.name in jobs.codes:  # the same model for all: none of them can go on
        for job in at_work[1:]:
            with jobs.guarded(job), _marked(job):
                raise UserError(f"the model could not be loaded, see {first.name}.")
        return
    for job in at_work:
        assert job.session is not None
        job.session.use_stack(stack)
        job.session.update(model_note=stack.note)


def _shared(jobs: _Jobs, stage: str, work: Callable[[list[Session]], dict[int, Exception]]) -> None:
    """A stage of all jobs that ask for it; those that fail in it end."""
    chosen = [(job, job.session) for job in jobs.at_work if job.session and stage in job.session.cfg.stages]
    if not chosen:
        return
    configure_logging(*(session.folder for _, session in chosen))
    with trusted(chosen[0][0].allowed):
        failures = work([session for _, session in chosen])
    for number, error in failures.items():
        job, _ = chosen[number]
        with jobs.guarded(job), _marked(job):
            raise error


def _finish(jobs: _Jobs, job: _Job) -> None:
    """The stages behind the pictures, of one job."""
    session = job.session
    assert session is not None
    configure_logging(session.folder)
    with jobs.guarded(job):
        with stages.recorded(session):
            stages.judge(session)
        stages.end(session)
        jobs.ended(job, 0)
