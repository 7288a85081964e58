"""Runs that W&B keeps -> folders that `runs.read` takes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hiperlab import files
from hiperlab.errors import UserError
from hiperlab.metric.rows import COMPARED, RESULTS_ARTIFACT


def download(project: str, folder: Path, api: Any = None) -> list[Path]:
    """Fetch the results of a project's finished runs; their pictures stay with W&B.

    Args:
        project: "entity/project".
        folder: takes one folder per run, named by its id.
        api: W&B's; None for `wandb.Api()`, with the login and server of this machine.

    Returns:
        The run folders.

    Raises:
        UserError: W&B cannot be asked, or the project holds no results of hiperlab.
    """
    if project.count("/") != 1 or not all(project.split("/")):
        raise UserError(f"--wandb {project}: expected entity/project.")
    import wandb

    found = []
    try:
        for run in (api or wandb.Api()).runs(project):
            if not str(run.id).isalnum():
                raise UserError(f"--wandb {project}: a run is called {run.id!r}, which is no id of hiperlab's.")
            kept = [each for each in run.logged_artifacts() if each.type == RESULTS_ARTIFACT]
            if kept:
                found.append(_fetch(kept[-1], folder / str(run.id)))
    except UserError:
        raise
    except Exception as error:  # W&B raises of many kinds: no network, no login, no such project
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"--wandb {project}: W&B cannot be asked ({first}). `wandb login` first?") from None
    if not found:
        raise UserError(f"--wandb {project} holds no results of hiperlab: sync runs first (wandb sync <run>/wandb/*).")
    return found


def _fetch(artifact: Any, target: Path) -> Path:
    """What of an artifact a comparison reads; nothing else is taken, a file's name chooses no path."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(artifact.download(root=place))
        for name in COMPARED:
            if (root / name).is_file():
                files.atomic_write(target / name, (root / name).read_bytes())
    return target
