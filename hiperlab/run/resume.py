"""Going on with an earlier run: from where, and only if it is asked the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.utils import get_class
from omegaconf import OmegaConf

from hiperlab import files
from hiperlab.errors import UserError
from hiperlab.report.checkpoint import newest_valid, resume_path, step_of
from hiperlab.run.session import Session

# A resumed run must be asked the same in these; the rest (steps, devices, logging, sampling) may change.
IDENTITY = ("method", "model", "data", "precision", "seed", "fit.batch_size", "fit.gradient_clip")
FREE = ("data.prompts", "model.optimise", "model.note")


def check_resume(session: Session) -> None:
    """Say what is wrong with training in this folder before anything in it is touched.

    Raises:
        UserError: see `starting_point`; or the run is to be resumed under other settings (each key with both values).
    """
    for group in session.groups:
        starting_point(checkpoint_folder(session, group), session.cfg.resume, session.cfg.fit.steps)
    path = _record(session)
    if session.cfg.resume is None or not path.is_file():
        return
    before, now = _flat(OmegaConf.load(path)), _flat(session.cfg)
    sampling = get_class(session.cfg.method._target_).sampling_settings  # type: ignore[attr-defined]
    free = (*FREE, *(f"method.{name}" for name in sampling))
    changed = [
        f"{key} (was {before.get(key)!r}, now {now.get(key)!r})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and _under(key, IDENTITY) and not _under(key, free)
    ]
    if changed:
        raise UserError(
            f"cannot resume {session.folder} under other settings: {'; '.join(changed[:5])}. "
            "Put them back, or start a new run."
        )


def remember(session: Session, fresh: bool) -> None:
    """Keep what this training was asked, for `check_resume`; what a resumed part is asked does not replace it."""
    path = _record(session)
    if files.is_rank_zero() and (fresh or not path.is_file()):
        files.atomic_write(path, OmegaConf.to_yaml(session.cfg, resolve=True))


def _record(session: Session) -> Path:
    return session.folder / "checkpoints" / "config.yaml"


def checkpoint_folder(session: Session, group: list[int]) -> Path:
    """Where the checkpoints of a group lie: one folder, or one per concept when they are taken one by one."""
    folder = session.folder / "checkpoints"
    return folder if len(group) == len(session.data.concepts) else folder / session.data.concepts[group[0]].name


def log_folder(session: Session, group: list[int]) -> Path:
    """Where a group's metrics and training samples go: the run folder, or one per concept when one by one."""
    if len(group) == len(session.data.concepts):
        return session.folder
    return session.folder / "concepts" / session.data.concepts[group[0]].name


def starting_point(folder: Path, resume: str | None, steps: int) -> Path | None:
    """The checkpoint to go on from, None for a fresh start.

    Raises:
        UserError: a fresh start over an earlier run's checkpoints; a checkpoint that is broken or beyond `steps`.
    """
    if resume is None and (found := newest_valid(folder)) is not None:
        raise UserError(
            f"{folder} already holds training up to step {step_of(found)}. Add resume=auto to go on, "
            "or choose another run_dir."
        )
    path = resume_path(resume, folder)
    if path is not None:
        done = step_of(path)
        if done > steps:
            raise UserError(f"{path} is at step {done}, beyond fit.steps={steps}. Ask for at least {done} steps.")
    return path


def _under(key: str, roots: tuple[str, ...]) -> bool:
    return any(key == root or key.startswith(f"{root}.") for root in roots)


def _flat(cfg: Any, prefix: str = "") -> dict[str, Any]:
    values: Any = OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else cfg
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        found |= _flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return found
