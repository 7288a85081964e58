"""Run folders: where a run goes, which earlier run it continues, and what that run was asked."""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from hiperlab import files
from hiperlab.cli.overrides import UNRECORDED, merge, parse, values, without
from hiperlab.errors import UserError

HANDED = "HIPERLAB_RUN_DIR"  # rank 0 decides the folder; the ranks that Lightning starts read it here
WRITTEN = ("outputs_dir", "method.cache", "method.prior.folder")  # folders that a run writes into beside its own
FREE = (  # may differ when a run is resumed
    *WRITTEN,
    "run_dir",
    "resume",
    "resume_data",
    "stages",
    "logger",
    "trainer",
    "allowed_targets",
)


def recorded(folder: Path) -> list[str]:
    """The overrides of an earlier run. The folder may come from elsewhere: nothing that steers Hydra is taken over.

    Raises:
        UserError: the file is not a list of overrides.
    """
    path = folder / "overrides.yaml"
    try:
        lines = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} cannot be read as a list of overrides: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise UserError(f"{path} is not a list of overrides such as ['method=ti', 'seed=1'].")
    own = [line for override, line in zip(parse(lines), lines) if not override.is_hydra_override()]
    return without(own, UNRECORDED)


def with_earlier(lines: Sequence[str]) -> list[str]:
    """Put the overrides of the run folder named by `run_dir=` (if it holds a run) in front of the new ones.

    The folder may come from elsewhere: a folder to write into is taken over only where the run lies in it.
    """
    run_dir = values(lines).get("run_dir")
    if run_dir is None or not (Path(str(run_dir)) / "overrides.yaml").is_file():
        return list(lines)
    folder = Path(str(run_dir))
    earlier, given = recorded(folder), values(lines)
    left = [line for line in earlier if _leads_away(folder, earlier, line)]
    for line in left:
        if line.partition("=")[0].lstrip("+") not in given:
            print(f"hiperlab: {folder} asks for {line}, which is not where it lies: left out. Give it again to use it.")
    return merge([line for line in earlier if line not in left], lines)


def _leads_away(folder: Path, lines: Sequence[str], line: str) -> bool:
    """Whether an override of a run folder would have files written where the folder has no say."""
    (override,) = parse([line])
    for key in WRITTEN:
        if override.is_delete() or not f"{key}.".startswith(f"{override.key_or_group}."):
            continue
        value: Any = override.value()
        for name in key.removeprefix(override.key_or_group).split(".")[1:]:
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is not None and not _may_write(folder, lines, str(value), whole=key == "outputs_dir"):
            return True
    return False


def _may_write(folder: Path, lines: Sequence[str], text: str, whole: bool) -> bool:
    """Whether a recorded path is the outputs folder that the run lies in (`whole`), or inside it or the run folder."""
    here = folder.resolve()
    above = here.parents[1:3]  # <outputs_dir>/<names>/<run>, <outputs_dir>/sweeps/<sweep>/<job>
    begin, _, rest = text.partition("/")
    if not whole and begin in ("${outputs_dir}", "${run_dir}"):
        return ".." not in Path(rest).parts and "${" not in rest
    path = Path(text).expanduser().resolve()
    outputs = Path(str(values(lines).get("outputs_dir", "outputs"))).expanduser().resolve()
    roots = (here, outputs) if outputs in above else (here,)
    return path in above if whole else any(path.is_relative_to(root) for root in roots)


def results(folder: Path) -> dict[str, Any]:
    """A run's results.json, or {} when it is absent or unreadable (a run that was killed early)."""
    try:
        found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _meaning(lines: Sequence[str]) -> dict[str, str]:
    """Key -> value as text, without what a resumed run may change: two commands with equal meaning are one run."""
    kept = [o for o in parse(without(lines, FREE)) if not o.is_hydra_override()]
    return {o.key_or_group: "~" if o.is_delete() else o.get_value_element_as_str() for o in kept}


def unfinished(parent: Path, lines: Sequence[str]) -> Path | None:
    """The newest run below `parent` that was asked the same and has not finished."""
    wanted = _meaning(lines)
    for record in sorted(parent.glob("*/overrides.yaml"), key=lambda path: path.parent.name, reverse=True):
        try:
            same = _meaning(recorded(record.parent)) == wanted
        except UserError as error:
            print(f"hiperlab: skipped while looking for a run to resume: {error}", file=sys.stderr)
            continue
        if same and results(record.parent).get("status") != "finished":
            return record.parent
    return None


def choose_run_dir(cfg: Mapping[str, Any], choices: Mapping[str, Any], lines: Sequence[str]) -> Path:
    """The folder of this run: given, continued, handed down by rank 0, or new.

    Args:
        cfg: composed config (run_dir, outputs_dir, resume, stages).
        choices: Hydra's group choices; method, data and model name the parent folder.
        lines: overrides of this command.

    Raises:
        UserError: stages without fit, and neither a folder that holds a run nor kept concepts; several processes that
            cannot agree on a folder.
    """
    if cfg.get("run_dir") is not None:
        folder = Path(str(cfg["run_dir"]))
    elif _rank() > 0 and os.environ.get(HANDED):
        folder = Path(os.environ[HANDED])
    else:
        _refuse_many_processes()
        folder = _continued_or_new(cfg, choices, lines)
    stages = list(cfg.get("stages") or [])
    given = cfg.get("artifact") or cfg.get("artifacts")  # files from elsewhere need no earlier run
    if stages and "fit" not in stages and not given and not folder.is_dir():
        asked = f"run_dir={folder} does not exist" if cfg.get("run_dir") else "no run_dir is given"
        raise UserError(
            f"stages=[{','.join(stages)}] works on an earlier run, but {asked}. "
            "Give run_dir=<folder of that run> or artifact=<file>, or add fit to the stages."
        )
    return folder


def remove_unused(folder: Path) -> None:
    """Remove a new run folder in which nothing was begun: there is a log and a lock, but no settings of a run.

    A folder above it goes, too, if it was made for this one.
    """
    if not folder.is_dir() or (folder / "overrides.yaml").exists():
        return
    with suppress(OSError):  # somebody else's file in it: it stays
        for name in (files.LOG_NAME, files.LOCK_NAME):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()
        folder.parent.rmdir()


def _continued_or_new(cfg: Mapping[str, Any], choices: Mapping[str, Any], lines: Sequence[str]) -> Path:
    names = [str(choices.get(group) or "none").replace("/", "-") for group in ("method", "data", "model")]
    if cfg.get("artifacts"):
        names[0] = "together"
    parent = Path(str(cfg.get("outputs_dir", "outputs"))) / "_".join(names)
    if cfg.get("resume") == "auto":
        earlier = unfinished(parent, lines)
        if earlier is not None:
            print(f"hiperlab: resume=auto continues {earlier}")
            return earlier
        print(f"hiperlab: resume=auto found no unfinished run of this command below {parent}; starting a new one")
    return parent / f"{datetime.now():%Y-%m-%d_%H-%M-%S}-{secrets.token_hex(2)}"


def _rank() -> int:
    text = os.environ.get("LOCAL_RANK", "0")
    return int(text) if text.isdigit() else 0


def started_in_parallel() -> bool:
    """Whether torchrun, srun or a command per node started this process beside others of the same run."""
    env = os.environ
    by_srun = int(env.get("SLURM_NTASKS") or 1) > 1 and "SLURM_PROCID" in env
    return by_srun or int(env.get("WORLD_SIZE") or 1) > 1 or "NODE_RANK" in env


def _refuse_many_processes() -> None:
    """They would each invent a folder of their own."""
    if started_in_parallel():
        raise UserError("Several processes share this run: give run_dir=<folder> so that all of them use the same one.")
