"""The tracking services of a run, from the settings of the group logger."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hiperlab.errors import UserError, near
from hiperlab.report.mlflow_tracker import MlflowTracker
from hiperlab.report.tensorboard_tracker import TensorboardTracker
from hiperlab.report.tracker import Identity, Tracker, Trackers
from hiperlab.report.trackio_tracker import TrackioTracker
from hiperlab.report.wandb_tracker import WandbTracker

SERVICES: Mapping[str, tuple[Callable[..., Tracker], Sequence[str], str]] = {  # its own settings, its package
    "wandb": (WandbTracker, ("mode", "entity", "init_timeout", "finish_timeout"), "wandb"),
    "trackio": (TrackioTracker, ("space",), "trackio"),
    "mlflow": (MlflowTracker, ("uri",), "mlflow"),
    "tensorboard": (TensorboardTracker, (), "tensorboard"),
}
SHARED = ("project", "name", "group", "job_type", "tags")  # what all services are told


def make_trackers(
    run_dir: Path, settings: Mapping[str, Any], name: str, tags: Sequence[str], config: Mapping[str, Any]
) -> Trackers:
    """The services that `logger.services` turns on.

    Args:
        run_dir: the run folder.
        settings: of the group logger.
        name: of the run where the settings give none.
        tags: added to those of the settings.
        config: what was composed, which each is told as it begins.

    Raises:
        UserError: a service or a setting that does not exist, or a service whose package is not installed.
    """
    services = settings.get("services") or {}
    if unknown := [service for service in services if service not in SERVICES]:
        raise UserError(f"logger.services.{unknown[0]}: no such service.{near(str(unknown[0]), [*SERVICES])}")
    chosen = [service for service, on in services.items() if on]
    known = {"services", *SHARED, *(key for service in services for key in SERVICES[service][1])}
    if odd := sorted(set(settings) - known):
        raise UserError(f"logger.{odd[0]} is no setting of logger={'+'.join(chosen) or 'csv'}.{near(odd[0], known)}")
    identity = Identity(
        project=str(settings.get("project") or "hiperlab"),
        name=settings.get("name") or name,
        group=settings.get("group"),
        job_type=settings.get("job_type"),
        tags=tuple(map(str, [*(settings.get("tags") or []), *tags])),
    )
    members = []
    for service in chosen:
        make, keys, package = SERVICES[service]
        if importlib.util.find_spec(package) is None:
            raise UserError(f"logger={service} needs the package {package}: pip install 'hiperlab[trackers]'.")
        members.append(make(run_dir, identity, **{key: settings[key] for key in keys if key in settings}))
        members[-1].config = config
    return Trackers(members)
