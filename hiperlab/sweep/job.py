"""One job of a sweep: a fresh process with its own resolved overrides and log, and nothing inherited by accident."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from omegaconf import DictConfig

from hiperlab import files
from hiperlab.cli.hydra_job import config_flags
from hiperlab.cli.overrides import assign, parse, without
from hiperlab.cli.run_dir import HANDED, results
from hiperlab.sweep import outcome as sweep

PARENT = "HIPERLAB_SWEEP_PID"
JOB = "HIPERLAB_JOB"  # "module:function" instead of the stages; for tests and for running something else in a sweep
FOLDED = "--folded"  # `python -m hiperlab.run --folded <file>`: several jobs in one process, see `fold`
# A job must find out about ranks by itself: inherited ones make it wait for processes that are not its own.
_LEAKS = re.compile(
    r"(LOCAL_RANK|RANK|NODE_RANK|GROUP_RANK|ROLE_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|GROUP_WORLD_SIZE|ROLE_WORLD_SIZE"
    r"|MASTER_ADDR|MASTER_PORT|TORCHELASTIC_.*|HYDRA_(?!FULL_ERROR$).*|PL_GLOBAL_SEED)$"
)
_SLURM_TASK = re.compile(r"SLURM_(NTASKS.*|NPROCS|TASKS_PER_NODE|PROCID|LOCALID|NODEID|STEP_.*)$")
_STEERING = re.compile(r"[+~]*hydra[./](launcher|sweeper|sweep|run|mode|job\.config|output_subdir|job\.name)\b")
_ERROR_LINE = re.compile(r"(\w+\.)*\w*(Error|Exception|Interrupt)\b")
# Our launcher files share their name with the plugin's own schema, which Hydra then fills in: just what we want.
# Here, because this module is also what a submitit worker imports first.
warnings.filterwarnings("ignore", message=r"\s*'hydra/(launcher|sweeper)/.*validated against ConfigStore schema")


@dataclass(frozen=True)
class Job:
    """What to start, where, and what it needs.

    Args:
        name: unique in its sweep.
        overrides: the job's own overrides (no hydra ones).
        folder: its run folder.
        command: the whole command line.
        stages: stages it is to run.
        devices: GPUs it needs; 0 on a CPU.
    """

    name: str
    overrides: list[str]
    folder: Path
    command: list[str]
    stages: list[str]
    devices: int = 0


def make_job(hydra_cfg: DictConfig, cfg: DictConfig, overrides: Sequence[str], devices: int = 0) -> Job:
    """The job of one point of a sweep.

    Args:
        hydra_cfg: Hydra's own node, of the sweep or of the job: folders, config sources, passed-on overrides.
        cfg: the job's composed config (sweep, stages).
        overrides: the job's resolved overrides.
        devices: GPUs it needs.
    """
    sweep_dir = Path(str(hydra_cfg.sweep.dir))
    fixed = list(hydra_cfg.job.config.override_dirname.exclude_keys)
    own = without(overrides, ("sweep", "run_dir"))
    name = sweep.job_name(sweep_dir, own, fixed)
    folder = sweep_dir / name
    command = [sys.executable, "-m", "hiperlab.run", *config_flags(hydra_cfg)]
    command += [line for line in hydra_cfg.overrides.hydra if not _STEERING.match(line)]
    command += [*own, assign("run_dir", folder), assign("sweep", cfg.sweep), "hydra.mode=RUN"]
    if not any(o.key_or_group == "resume" for o in parse(own)):
        command.append("resume=auto")
    return Job(name, own, folder, command, list(cfg.get("stages") or []), devices)


def environment(gpus: Sequence[str] | None) -> dict[str, str]:
    """This process's environment without ranks, folders and Hydra's own; with the GPUs given to the job."""
    env = {key: value for key, value in os.environ.items() if not _LEAKS.match(key) and key != HANDED}
    if os.environ.get("SLURM_NTASKS", "1") == "1":  # one task: the job starts its own ranks, srun did not
        env = {key: value for key, value in env.items() if not _SLURM_TASK.match(key)}
    if gpus is not None:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    env[PARENT] = str(os.getpid())
    return env


def last_error(log: Path, start: int) -> str:
    """The line of a log that says why: the last that names an exception, else the last one."""
    try:
        with log.open("rb") as file:
            file.seek(max(start, log.stat().st_size - 65536))
            text = file.read().decode("utf-8", "replace")
    except FileNotFoundError:  # somebody removed the folder of a running job
        return f"{log} is gone"
    lines = [re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line).strip() for line in re.split(r"[\r\n]+", text)]
    lines = [line for line in lines if line][-60:]
    named = [line for line in lines if _ERROR_LINE.match(line)]
    return (named or lines or [""])[-1][:300]


@dataclass
class Running:
    """A started process with the jobs that it runs: one, or several that are folded into it.

    Args:
        jobs: what it runs.
        gpus: handed out to it.
        process: the process.
        log: its output.
        starts: where this attempt's part of each job's own job.log begins, by name.
        codes: the file in which a process of several jobs keeps each one's exit code; None for one job.
    """

    jobs: list[Job]
    gpus: list[str]
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    starts: dict[str, int]
    codes: Path | None = None
    started: float = field(default_factory=time.monotonic)
    count: int = 1  # jobs that it began with
    told: float | None = None  # when it was told to stop because of its time limit

    def send_signal(self, number: int) -> None:
        """Send a signal to the process itself, not to its helpers: it passes it on to its ranks and saves."""
        if self.process.poll() is None:
            self.process.send_signal(number)

    def end(self) -> None:
        """Clear what a dead process left behind: ranks without a leader hold the GPU and wait for ever."""
        self.log.close()
        if sys.platform == "win32":  # no process groups
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            for _ in range(20):
                try:
                    os.killpg(self.process.pid, 0 if _ else number)
                except ProcessLookupError:
                    return
                time.sleep(0.1)

    def kill(self) -> None:
        """Stop the whole group at once."""
        if sys.platform == "win32":
            self.process.kill()
            return
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def outcomes(self, code: int, stopping: bool) -> list[sweep.Outcome]:
        """What became of each job, read from exit codes and results.json."""
        if self.codes is None:
            return [self._outcome(self.jobs[0], code, stopping)]
        codes = self.ended()
        return [self._outcome(job, codes.get(job.name, code or 1), stopping) for job in self.jobs]

    def ended(self) -> dict[str, int]:
        """Exit codes of the jobs of a process of several that have ended, by name."""
        if self.codes is None or not self.codes.is_file():
            return {}
        return dict(json.loads(self.codes.read_text(encoding="utf-8")))

    def _outcome(self, job: Job, code: int, stopping: bool) -> sweep.Outcome:
        folder, status, error = job.folder, "failed", ""
        said = last_error(folder / "job.log", self.starts[job.name])
        written = results(folder).get("status")
        if self.told is not None and code != 0:
            error = f"told to stop after its time limit ({self.told - self.started:.0f} s)"
        elif code == 0 and written == "finished":
            status = "finished"
        elif code in (130, 143) or (stopping and (code < 0 or written == "stopped")):
            status, error = "stopped", said
        elif code == 0:
            done = results(folder).get("stages", [])
            missing = [stage for stage in job.stages if stage not in done]
            undone = f"; not done: {', '.join(missing)}" if missing else ""
            error = f"ended without a finished results.json (status: {written}{undone})"
        elif code < 0:
            error = f"killed by {signal.Signals(-code).name}"
        else:
            error = said or f"exit code {code}"
        seconds = (time.monotonic() - self.started) / self.count  # each one's part
        value = sweep.objective(folder) if status == "finished" else None
        return outcome(job, status, seconds, error, value)


def outcome(job: Job, status: str, seconds: float = 0.0, error: str = "", value: float | None = None) -> sweep.Outcome:
    """An outcome of a job of this command."""
    invocation = os.environ.get(sweep.INVOCATION, "")
    return sweep.Outcome(job.name, job.overrides, status, round(seconds, 1), str(job.folder), error, value, invocation)


def start(jobs: list[Job], gpus: list[str] | None) -> Running:
    """Start a process in its own group with its own log: of one job, or of several that are folded together."""
    for job in jobs:
        job.folder.mkdir(parents=True, exist_ok=True)
    command, codes, path, about = jobs[0].command, None, jobs[0].folder / "job.log", ""
    if len(jobs) > 1:
        command, codes, path = fold(jobs)
        about = f"in one process with {len(jobs) - 1} others: {path}\n"
    starts = {}
    for job in jobs:
        with (job.folder / "job.log").open("ab") as own:
            own.write(f"$ {shlex.join(job.command)}\n{about}".encode())
            starts[job.name] = own.tell()
    log = path.open("ab")
    if len(jobs) > 1:
        log.write(f"$ {shlex.join(command)}\n".encode())
        log.flush()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment(gpus),
        start_new_session=True,
    )
    return Running(jobs, gpus or [], process, log, starts, codes, count=len(jobs))


def fold(jobs: list[Job]) -> tuple[list[str], Path, Path]:
    """What one process of several jobs needs: its command, the file of exit codes that it writes, and its log.

    They lie in `<sweep>/.jobs/<command>/`; each job's own job.log says where.
    """
    folder = sweep.notes(jobs[0].folder.parent, os.environ.get(sweep.INVOCATION, ""))
    code = hashlib.blake2b("\n".join(job.name for job in jobs).encode(), digest_size=4).hexdigest()
    asked, codes, log = (folder / f"folded-{code}.{ending}" for ending in ("request", "codes", "log"))
    files.write_json(asked, {job.name: job.command[job.command.index("hiperlab.run") + 1 :] for job in jobs})
    codes.unlink(missing_ok=True)
    return [sys.executable, "-m", "hiperlab.run", FOLDED, str(asked)], codes, log


def follow_parent() -> None:
    """In a job: be told to stop (SIGTERM, so it saves) when the sweep that started it dies, however it dies. Linux."""
    parent = os.environ.pop(PARENT, "")
    if not parent.isdigit() or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # 1 = PR_SET_PDEATHSIG
    if os.getppid() != int(parent):  # it died before we could ask
        os.kill(os.getpid(), signal.SIGTERM)
