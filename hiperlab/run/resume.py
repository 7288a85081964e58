"""Going on with an earlier run: from where, and only if it is asked the same."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hiperlab import files
from hiperlab.data.concept import Concept
from hiperlab.data.images import digests
from hiperlab.errors import UserError, near
from hiperlab.hub import first_line
from hiperlab.report.checkpoint import newest_valid, resume_path, step_of
from hiperlab.run.session import Session

log = logging.getLogger(__name__)

# A resumed run must be asked the same in these; the rest (steps, devices, logging, sampling) may change.
IDENTITY = ("method", "model", "data", "precision", "seed", "fit.batch_size", "fit.gradient_clip", "fit.stop")
# But for these: they are of drawing, or say where something lies. Pictures are compared by their content.
FREE = (
    "data.prompts", "data.dir", "data.image", "data.file", "data.held_out", "data.references", "model.optimise",
    "model.note", "method.prior.folder", "method.cache",
)  # fmt: skip
MONITORED = ("monitor", "fit.monitor", "metric", "sampler")  # where a score chooses: its values must compare
MAY_CHANGE = ("fit.monitor.patience", "fit.monitor.min_delta", "fit.monitor.keep", "fit.monitor.every")
RECORD, PICTURES = "config.yaml", "pictures.json"  # what a training was asked and trained on, beside its checkpoints


def check_resume(session: Session) -> None:
    """Say what is wrong with training in this folder before anything in it is touched.

    Raises:
        UserError: see `starting_point`; or the run is to be resumed under other settings (each key with both values)
            or with other pictures (each by its name).
    """
    cfg = session.cfg
    if cfg.resume_data not in ("refuse", "accept"):
        raise UserError(f"resume_data={cfg.resume_data} is unknown.{near(str(cfg.resume_data), ('refuse', 'accept'))}")
    found = [starting_point(checkpoint_folder(session, group), cfg.resume, cfg.fit.steps) for group in session.groups]
    if cfg.resume is None:
        return
    for folder in dict.fromkeys(_record_folder(path) if path else _own_folder(session) for path in found):
        if not (folder / RECORD).is_file():
            if any(found):
                log.warning("%s holds no %s: nobody can say whether the settings are the same.", folder, RECORD)
            continue
        _check_settings(session, folder)
        _check_pictures(session, folder)


def _check_settings(session: Session, folder: Path) -> None:
    before, now = _flat(_record(folder / RECORD, OmegaConf.load)), _flat(session.cfg)
    sampling = get_class(session.cfg.method._target_).sampling_settings  # type: ignore[attr-defined]
    free = (*FREE, *MAY_CHANGE, *(f"method.{name}" for name in sampling))
    scored = before.get("monitor") is not None or now["monitor"] is not None
    same = (*IDENTITY, *MONITORED) if scored else IDENTITY
    asked = [key for key in sorted(before.keys() | now.keys()) if _under(key, same) and not _under(key, free)]
    # A later version's settings: the earlier one did what their defaults do.
    if new := [f"{key}={now[key]}" for key in asked if key not in before]:
        log.info("the earlier run did not know %s; it takes the value now.", ", ".join(new))
    changed = [
        f"{key} (was {before[key]!r}, now {now.get(key)!r})"
        for key in asked
        if key in before and before[key] != now.get(key)
    ]
    if changed:
        raise UserError(
            f"cannot resume {folder.parent} under other settings: {'; '.join(changed[:5])}. "
            "Put them back, or start a new run."
        )


def _record(path: Path, read: Callable[[Path], Any]) -> Any:
    """What lies beside a checkpoint, a mapping.

    Raises:
        UserError: it is damaged.
    """
    try:
        found = read(path)
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise _damaged(path, first_line(error)) from error
    if not isinstance(found, dict | DictConfig):
        raise _damaged(path, f"expected a table, found {type(found).__name__}")
    return found


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path} is damaged ({why}). Delete it to go on without comparing with it.")


def _check_pictures(session: Session, folder: Path) -> None:
    """Compare the pictures by their content; names and places may change."""
    path = folder / PICTURES
    if not path.is_file():  # of a version that kept none
        return
    before = _record(path, lambda file: json.loads(file.read_text(encoding="utf-8")))
    now = _pictures(session)
    if not all(isinstance(each, dict) for each in before.values()):
        raise _damaged(path, "expected a table for each concept")
    said = []
    for concept in before.keys() & now.keys():
        old, new = before[concept], now[concept]
        said += [f"{name} is missing or changed" for name, digest in old.items() if digest not in new.values()]
        said += [f"{name} is new or changed" for name, digest in new.items() if digest not in old.values()]
        if not said and list(old.values()) != list(new.values()):
            said.append(f"those of {concept} stand in another order")
    said += [f"concept {name} is missing" for name in before.keys() - now.keys()]
    said += [f"concept {name} is new" for name in now.keys() - before.keys()]
    if not said:
        return
    message = f"the pictures differ from those of {folder.parent}: {'; '.join(dict.fromkeys(said[:5]))}"
    if session.cfg.resume_data == "refuse":
        raise UserError(f"{message}. Put them back, or go on with resume_data=accept.")
    log.warning("%s. Accepted: resume_data=accept.", message)
    session.update(resumed_with_other_pictures=said)


def remember(session: Session, fresh: bool) -> None:
    """Keep what this training was asked, for `check_resume`; what a resumed part is asked does not replace it."""
    folder = _own_folder(session)
    if files.is_rank_zero() and (fresh or not (folder / RECORD).is_file()):
        files.atomic_write(folder / RECORD, OmegaConf.to_yaml(session.cfg, resolve=True))
        files.write_json(folder / PICTURES, _pictures(session))


def _own_folder(session: Session) -> Path:
    return session.folder / "checkpoints"


def _record_folder(checkpoint: Path) -> Path:
    """Where the record of a checkpoint lies: beside it, or one above where concepts were taken one by one."""
    beside = checkpoint.parent
    return beside if (beside / RECORD).is_file() or not (beside.parent / RECORD).is_file() else beside.parent


def _pictures(session: Session) -> dict[str, dict[str, str]]:
    """Content of every picture, with its caption and mask, by concept and name, in the order of training."""
    return {
        concept.name: dict(zip(concept.sources, _contents(concept), strict=True)) for concept in session.data.concepts
    }


def _contents(concept: Concept) -> list[str]:
    """A digest of each picture and of what lies beside it; of the picture alone where nothing does."""
    none = (None,) * len(concept.views)
    found = []
    for picture, caption, mask in zip(
        digests(concept.views), concept.captions or none, concept.masks or none, strict=True
    ):
        beside = f"{caption or ''}\n{files.sha256(mask) if mask else ''}".strip()
        found.append(hashlib.sha256(f"{picture}\n{beside}".encode()).hexdigest()[:16] if beside else picture)
    return found


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
