"""Sweeps through submitit: what folds into one process is submitted as one job."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

from hiperlab import files
from hiperlab.sweep import outcome as sweep
from hiperlab.sweep.fold import folded
from hiperlab.sweep.job import Job, make_job

if TYPE_CHECKING:
    from hydra.plugins.launcher import Launcher
else:
    Launcher = object


class Submitted(Launcher):
    """In front of a launcher of hydra-submitit-launcher: each of its jobs runs the jobs of one process.

    The worker is given the first job and finds the others in a file beside the sweep's (`mates`).
    """

    config: Any
    hydra_context: Any
    params: dict[str, Any]

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submit a batch of jobs and wait for it; a job's return value is its objective."""
        configs = [
            self.hydra_context.config_loader.load_sweep_config(self.config, list(each)) for each in job_overrides
        ]
        jobs = [make_job(self.config.hydra, cfg, list(each)) for cfg, each in zip(configs, job_overrides, strict=True)]
        places = {job.name: place for place, job in reversed(list(enumerate(jobs)))}
        groups = folded(jobs, configs, int(self.params.get("array_parallelism") or 1))
        for group in groups:
            if len(group) > 1:
                plain = [{**asdict(job), "folder": str(job.folder)} for job in group]
                files.write_json(_mates_path(group[0]), plain)
        first = [list(job_overrides[places[group[0].name]]) for group in groups]
        returned = super().launch(first, initial_job_idx)  # type: ignore[safe-super]
        found: dict[str, JobReturn] = {}
        for group, ended in zip(groups, returned, strict=True):
            found[group[0].name] = ended
            for job in group[1:]:
                found[job.name] = _ended(job, configs[places[job.name]])
        return [found[job.name] for job in jobs]


def mates(job: Job) -> list[Job]:
    """The jobs that were submitted as one with this one, itself included."""
    path = _mates_path(job)
    if not path.is_file():
        return [job]
    return [Job(**{**each, "folder": Path(each["folder"])}) for each in json.loads(path.read_text(encoding="utf-8"))]


def _mates_path(job: Job) -> Path:
    return sweep.notes(job.folder.parent, os.environ.get(sweep.INVOCATION, "")) / f"{job.name}.mates"


def _ended(job: Job, cfg: DictConfig) -> JobReturn:
    """What a job that another one's worker ran would have returned."""
    ended = JobReturn(job.overrides, cfg, working_dir=str(job.folder), task_name=job.name, status=JobStatus.COMPLETED)
    ended.return_value = sweep.objective(job.folder)
    return ended
