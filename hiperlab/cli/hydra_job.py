"""Inside a job: what Hydra was asked, and the command that asks for it again."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from hiperlab.cli.overrides import UNRECORDED, assign, without
from hiperlab.cli.process import config_dir


def config_flags(hydra_cfg: DictConfig) -> list[str]:
    """Where the job finds its configs: the same folders and primary config as the sweep."""
    flags = ["--config-name", str(hydra_cfg.job.config_name)]
    for source in hydra_cfg.runtime.config_sources:
        flag = {"main": "--config-path", "command-line": "--config-dir"}.get(source.provider)
        if flag is not None:
            flags += [flag, str(source.path)]
    return flags


def task_overrides() -> list[str]:
    """Inside a job: what was asked, resolved, as the run folder's overrides.yaml keeps it.

    Without run_dir, resume, stages and allowed_targets, which belong to a command, not to a run.
    """
    return without(list(HydraConfig.get().overrides.task), UNRECORDED)


def resume_command(run_dir: str | Path) -> str:
    """Inside a job: the command that goes on with this run."""
    flags = config_flags(HydraConfig.instance().cfg.hydra) if HydraConfig.initialized() else []  # type: ignore[union-attr]
    standard = {"--config-name": "config", "--config-path": str(config_dir())}
    shown = [word for pair in zip(flags[::2], flags[1::2]) if standard.get(pair[0]) != pair[1] for word in pair]
    plain = re.fullmatch(r"[\w./-]+", str(run_dir))
    where = f"run_dir={run_dir}" if plain else assign("run_dir", run_dir)
    return shlex.join(["python", "-m", "hiperlab.run", *shown, where, "resume=auto"])
