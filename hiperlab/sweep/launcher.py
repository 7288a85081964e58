"""The launcher behind `-m`: fresh processes, one per GPU, and one job's end is no other's.

A process runs one job, or several that can share passes of the frozen network (`hiperlab.sweep.fold`).

In-process sweeps fail in ways nobody sees: with DDP, Lightning restarts the whole `-m …` command line for the other
ranks, which then draw other hyper-parameters than rank 0. Here a job's command line is its own resolved overrides.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from hiperlab.errors import StoppedError, UserError
from hiperlab.sweep import outcome as sweep
from hiperlab.sweep.fold import folded
from hiperlab.sweep.job import Job, Running, make_job, outcome, start
from hiperlab.sweep.submitted import mates

HANG_UP = getattr(signal, "SIGHUP", None)  # the terminal was closed; not on every system
SIGNALS = [number for number in (signal.SIGINT, signal.SIGTERM, HANG_UP) if number is not None]


def visible_gpus() -> list[str]:
    """The GPUs this process may use, as CUDA_VISIBLE_DEVICES names them; found without importing torch."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() and name.strip() != "-1"]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    count = sum(line.startswith("GPU ") for line in listed.stdout.splitlines()) if listed.returncode == 0 else 0
    return [str(index) for index in range(count)]


def devices_needed(cfg: DictConfig, gpus: Sequence[str]) -> int:
    """GPUs that a job asks for: 0 on the CPU, 1 for "auto", all of them for -1.

    Raises:
        UserError: more than there are, or GPUs named one by one.
    """
    accelerator = OmegaConf.select(cfg, "trainer.accelerator", default="auto")
    devices: Any = OmegaConf.select(cfg, "trainer.devices", default="auto")
    if accelerator == "cpu" or not gpus:
        return 0
    if devices in (-1, "-1"):
        return len(gpus)
    if OmegaConf.is_list(devices):
        raise UserError(
            f"trainer.devices={list(devices)} names GPUs, but a sweep hands them out: give a number, "
            "and choose the GPUs with CUDA_VISIBLE_DEVICES."
        )
    need = int(devices) if str(devices).isdigit() else 1
    if need > len(gpus):
        raise UserError(f"trainer.devices={need}, but {len(gpus)} GPU(s) are visible. Lower it or show more GPUs.")
    return need


class Devices:
    """Who may start: GPUs are handed out whole; on a CPU one job at a time unless `slots` says otherwise."""

    def __init__(self, gpus: Sequence[str], slots: int | None) -> None:
        self.free = list(gpus)
        self.slots = slots
        self.busy = 0
        self.on_cpu = 0

    def take(self, need: int) -> list[str] | None:
        """GPUs for a job that needs so many ([] for the CPU), or None: not now."""
        if self.slots is not None and self.busy >= self.slots:
            return None
        if need > len(self.free) or (need == 0 and self.on_cpu >= (self.slots or 1)):
            return None
        taken, self.free = self.free[:need], self.free[need:]
        self.busy += 1
        self.on_cpu += need == 0
        return taken

    def give_back(self, gpus: Sequence[str]) -> None:
        """A job ended."""
        self.free += gpus
        self.busy -= 1
        self.on_cpu -= not gpus


@contextmanager
def listening(heard: Callable[[int], None]) -> Iterator[None]:
    """While inside, SIGINT, SIGTERM and SIGHUP only call `heard`. Without effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, _: FrameType | None) -> None:
        heard(number)

    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class JobPool:
    """Runs jobs until all have ended or a signal came; the first signal is passed on, the second kills."""

    def __init__(self, sweep_dir: Path, devices: Devices, timeout_min: float | None, grace_s: float) -> None:
        self.sweep_dir, self.devices = sweep_dir, devices
        self.timeout_s = None if timeout_min is None else timeout_min * 60
        self.grace_s = grace_s
        self.signal: int | None = None
        self.running: list[Running] = []
        self.waiting: list[list[Job]] = []
        self.done: dict[str, sweep.Outcome] = {}

    def on_signal(self, number: int) -> None:
        """Signal handler."""
        first, self.signal = self.signal is None, self.signal or number
        for job in self.running:
            job.send_signal(signal.SIGTERM if number == HANG_UP else number) if first else job.kill()

    def run(self, groups: Sequence[Sequence[Job]]) -> list[sweep.Outcome]:
        """The outcomes, in the order of the jobs.

        Args:
            groups: jobs of one process each.
        """
        every = [job for group in groups for job in group]
        names = list(dict.fromkeys(job.name for job in every))  # the same point twice is one job
        total = len(names)
        for group in groups:
            own = list({job.name: job for job in group if job.name in names}.values())
            names = [name for name in names if name not in {job.name for job in own}]
            self.waiting += [own] if own else []
        with listening(self.on_signal):
            while self.waiting or self.running:
                if self.signal is None:
                    self.waiting = [jobs for jobs in self.waiting if not self._begin(jobs, total)]
                elif self.waiting:
                    for job in (job for jobs in self.waiting for job in jobs):
                        self._end(outcome(job, "not started"), total)
                    self.waiting = []
                for running in list(self.running):
                    self._check_on(running, total)
                if self.running:
                    time.sleep(0.05)
        return [self.done[job.name] for job in every]

    def _begin(self, jobs: list[Job], total: int) -> bool:
        """Skip or start a process of jobs; False when it has to wait."""
        if self.signal is not None:
            return False
        for job in list(jobs):
            if sweep.is_complete(job.folder, job.stages):
                self._end(outcome(job, "skipped", value=sweep.objective(job.folder)), total)
                jobs.remove(job)
        if not jobs:
            return True
        gpus = self.devices.take(jobs[0].devices)
        if gpus is None:
            return False
        self.running.append(start(jobs, gpus or None))
        if self.signal is not None:  # it came while the process was starting
            self.running[-1].send_signal(self.signal)
        where = f" on GPU {','.join(gpus)}" if gpus else ""
        together = f" in one process of {len(jobs)}, log: {self.running[-1].log.name}" if len(jobs) > 1 else ""
        for job in jobs:
            print(f"[{len(self.done)}/{total}] started  {job.name}{where}{together}", flush=True)
        return True

    def _check_on(self, running: Running, total: int) -> None:
        code = running.process.poll()
        now = time.monotonic()
        if code is None:
            limit = None if self.timeout_s is None else self.timeout_s * len(running.jobs)
            if limit is not None and running.told is None and now - running.started > limit:
                running.told = now
                running.send_signal(signal.SIGTERM)
            elif running.told is not None and now - running.told > self.grace_s:
                running.kill()
            return
        running.end()
        self.running.remove(running)
        self.devices.give_back(running.gpus)
        if code < 0 and len(running.jobs) > 1 and running.told is None and self.signal is None:
            again = [job for job in running.jobs if job.name not in running.ended()]
            why = f"killed by {signal.Signals(-code).name}"
            print(f"a process of {len(running.jobs)} jobs was {why}: {len(again)} go on in one each", flush=True)
            self.waiting += [[job] for job in again]
            running.jobs = [job for job in running.jobs if job not in again]
        for ended in running.outcomes(code, self.signal is not None):
            self._end(ended, total)

    def _end(self, ended: sweep.Outcome, total: int) -> None:
        self.done[ended.job] = ended
        sweep.record(self.sweep_dir, ended)
        why = f": {ended.error}" if ended.error else ""
        took = f" in {ended.seconds:.0f} s" if ended.seconds else ""
        print(f"[{len(self.done)}/{total}] {ended.status:<8} {ended.job}{took}{why}", flush=True)


def run_jobs(
    groups: Sequence[Sequence[Job]],
    sweep_dir: Path,
    devices: Devices,
    timeout_min: float | None = None,
    grace_s: float = 120.0,
) -> list[sweep.Outcome]:
    """Run processes of jobs side by side as far as the devices allow.

    Raises:
        StoppedError: a signal came; every running job was told, and ended, before this is raised.
    """
    pool = JobPool(sweep_dir, devices, timeout_min, grace_s)
    done = pool.run(groups)
    if pool.signal is not None:
        raise StoppedError(f"stopped by {signal.Signals(pool.signal).name}", 128 + pool.signal)
    return done


class JobEnded(JobReturn):
    """A JobReturn that can be asked for its value whatever became of the job: a failed one is None, not an exception.

    Hydra's own raises when a sweeper reads it, which would end the sweep with the first failure.
    """

    @property
    def return_value(self) -> Any:
        """The objective, or None."""
        return self._return_value

    @return_value.setter
    def return_value(self, value: Any) -> None:
        self._return_value = value


class FreshProcesses(Launcher):
    """Hydra launcher; `hydra_plugins.hiperlab_process` makes it known to Hydra.

    Args:
        slots: most jobs at a time; null = one per GPU, or one on a CPU.
        timeout_min: a job that takes longer is told to stop, and counts as failed; null = no limit.
        grace_s: how long it may then take to save.
    """

    def __init__(self, slots: int | None, timeout_min: float | None, grace_s: float) -> None:
        self.slots, self.timeout_min, self.grace_s = slots, timeout_min, grace_s

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra's hook; the task function is not used: the job runs in its own process."""
        self.context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run a batch of jobs and wait for it."""
        gpus = visible_gpus()
        jobs, configs = [], []
        for overrides in job_overrides:
            cfg = self.context.config_loader.load_sweep_config(self.config, list(overrides))
            jobs.append(make_job(self.config.hydra, cfg, list(overrides), devices_needed(cfg, gpus)))
            configs.append(cfg)
        sweep_dir = Path(str(self.config.hydra.sweep.dir))
        groups = folded(jobs, configs, max(1, len(gpus)))
        ended_jobs = run_jobs(groups, sweep_dir, Devices(gpus, self.slots), self.timeout_min, self.grace_s)
        by_name = {each.job: each for each in ended_jobs}
        done = [by_name[job.name] for job in jobs]
        returns = []
        for job, cfg, ended in zip(jobs, configs, done):
            status = JobStatus.COMPLETED if ended.status in sweep.DONE else JobStatus.FAILED
            result = JobEnded(job.overrides, cfg, working_dir=str(job.folder), task_name=job.name, status=status)
            result.return_value = ended.objective
            returns.append(result)
        return returns


def foreign_job(cfg: DictConfig) -> float | None:
    """What submitit and the basic launcher run: a fresh process of the job and its mates, whatever process it is in.

    A failed job returns None and is recorded; raising here would take the other jobs with it.
    """
    hydra_cfg = HydraConfig.get()
    job = make_job(hydra_cfg, cfg, OmegaConf.to_container(hydra_cfg.overrides.task))  # type: ignore[arg-type]
    done = run_jobs([mates(job)], Path(str(hydra_cfg.sweep.dir)), Devices([], None))
    return done[0].objective
