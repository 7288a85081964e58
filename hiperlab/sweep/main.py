"""A sweep through the door: check every choice once, name it, run it, print the table."""

from __future__ import annotations

import os
import secrets
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra._internal.hydra import Hydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hiperlab import files
from hiperlab.cli.compose import Request, check_config, check_plugins, compose, variants
from hiperlab.cli.overrides import assign, merge, parse, values, without
from hiperlab.cli.run_dir import started_in_parallel
from hiperlab.errors import StoppedError, UserError
from hiperlab.sweep import outcome as sweep
from hiperlab.sweep.launcher import foreign_job

# It does not hand out GPUs, and DDP inside its process would restart the whole sweep's command line.
ONE_DEVICE = "hydra._internal.core_plugins.basic_launcher."


def run_sweep(hydra: Hydra, request: Request) -> int:
    """Run a sweep to its end.

    Returns:
        0 if every job is finished, 1 if one failed, 130 or 143 after a signal.

    Raises:
        UserError: anything that can be known before the first job starts.
    """
    _refuse(request.overrides)
    master = compose(hydra, request, request.overrides, RunMode.MULTIRUN)
    check_plugins(master)
    params = OmegaConf.select(master, "hydra.sweeper.params") or {}
    asked = merge([f"{key}={value}" for key, value in params.items()], without(request.overrides, ("hydra.mode",)))
    for lines in variants(hydra, asked):
        cfg = compose(hydra, request, [*lines, "hydra.mode=RUN"])
        check_config(cfg, request, hydra, lines)
        _refuse_devices(master, cfg)
    own = [o for o in parse(asked, hydra.config_loader) if not o.is_hydra_override()]
    fixed = sorted({o.key_or_group for o in own if not o.is_sweep_override()})
    name = sweep.sweep_name([o.input_line or "" for o in own], values(asked).get("sweep", cfg.get("sweep")))
    folder = Path(str(cfg.get("outputs_dir", "outputs"))) / "sweeps" / name
    lines = [
        *without(request.overrides, ("sweep", "hydra.mode")),
        assign("sweep", name),
        "hydra.mode=MULTIRUN",
        assign("hydra.sweep.dir", folder),
        f"hydra.job.config.override_dirname.exclude_keys=[{','.join([*fixed, 'sweep'])}]",
    ]
    print(f"hiperlab: sweep {name} in {folder}", flush=True)
    return _run(hydra, request, lines, folder, [*fixed, "sweep"])


def _run(hydra: Hydra, request: Request, lines: list[str], folder: Path, fixed: list[str]) -> int:
    """Hand over to Hydra's sweeper and sum up, however it ends."""
    invocation, began = secrets.token_hex(8), time.time()
    os.environ[sweep.INVOCATION] = invocation
    stopped: BaseException | None = None
    try:
        hydra.multirun(request.config_name, foreign_job, lines, with_log_configuration=False)
    except (StoppedError, KeyboardInterrupt) as error:
        stopped = error
    except (HydraException, OmegaConfBaseException) as error:
        raise _user_error(error) from error
    finally:
        rows = sweep.outcomes(folder, invocation)
        if rows:
            _sum_up(folder, rows, fixed, time.time() - began)
    if stopped is not None:
        print("hiperlab: stopped; the same command goes on where it was left", file=sys.stderr)
        return stopped.code if isinstance(stopped, StoppedError) else 130
    return 0 if all(row.status in sweep.DONE for row in rows) else 1


def _user_error(error: BaseException) -> UserError:
    """The mistake inside Hydra's wrapping, or Hydra's own words in one line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return cause
        cause = cause.__cause__
    return UserError(f"The sweep does not compose: {' '.join(str(error).split())[:600]}")


def _sum_up(folder: Path, rows: Sequence[sweep.Outcome], fixed: Sequence[str], seconds: float) -> None:
    """Print the table and keep it as sweep.json."""
    print(sweep.table(rows, fixed), flush=True)
    command = shlex.join(["python", "-m", "hiperlab.run", *sys.argv[1:]])
    jobs = [asdict(row) for row in rows]
    content = {"sweep": folder.name, "command": command, "seconds": round(seconds, 1), "jobs": jobs}
    files.write_json(folder / "sweep.json", content)
    done = [Path(row.folder) for row in rows if row.status in sweep.DONE]
    if any((job / "scores.jsonl").is_file() for job in done):
        _compare(folder, [Path(row.folder) for row in rows])  # a failed job is named as left out


def _compare(folder: Path, jobs: Sequence[Path]) -> None:
    """Write and print the comparison. Whatever goes wrong there is a line: the jobs are done, and the sweep is, too."""
    from hiperlab.compare.write import compare  # only now: a sweep that measured nothing needs no pictures

    try:
        print(f"\n{compare(jobs, folder)}", flush=True)
    except Exception as error:
        why = " ".join(str(error).split())[:600]
        what = why if isinstance(error, UserError) else f"{type(error).__name__}: {why}"
        again = shlex.join(["python", "-m", "hiperlab.compare", str(folder)])
        print(f"\nno comparison: {what} ({again} tries again)", flush=True)


def _refuse(lines: Sequence[str]) -> None:
    """What no sweep can mean."""
    if any(o.key_or_group == "run_dir" for o in parse(lines)):
        raise UserError("run_dir cannot be given to a sweep: each job has its own folder. Name the sweep with sweep=….")
    if "LOCAL_RANK" in os.environ or started_in_parallel():
        raise UserError(
            "A sweep starts its own processes: start it once, without torchrun or srun (its jobs may use DDP)."
        )


def _refuse_devices(master: DictConfig, cfg: DictConfig) -> None:
    """Several devices per job need a launcher that hands them out."""
    launcher = str(master.hydra.launcher.get("_target_", ""))
    devices: Any = OmegaConf.select(cfg, "trainer.devices", default=1)
    one = devices in (1, "1", "auto", None) or (OmegaConf.is_list(devices) and len(devices) == 1)
    nodes = OmegaConf.select(cfg, "trainer.num_nodes", default=1)
    if launcher.startswith(ONE_DEVICE) and not (one and nodes in (1, None)):
        raise UserError(
            f"trainer.devices={devices} in a sweep needs hydra/launcher=process (or submitit_slurm): "
            "the basic launcher does not hand out devices."
        )
