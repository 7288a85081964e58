"""What every tracking service is to a run: guarded, so that whatever happens to it costs one warning line.

A service is one file: it starts, takes numbers, pictures and tables, and ends. `Trackers` are those that a run logs to.
"""

from __future__ import annotations

import logging
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from hiperlab import files
from hiperlab.errors import StoppedError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Identity:
    """How services call a run.

    Attributes:
        project: runs that are compared stand in one; MLflow's experiment.
        name: shown name of the run.
        group: runs of one sweep share it.
        job_type: train, eval or compare.
        tags: for filtering, such as the Hydra choices method and data.
    """

    project: str = "hiperlab"
    name: str | None = None
    group: str | None = None
    job_type: str | None = None
    tags: Sequence[str] = ()


class Tracker(Logger, ABC):
    """A service's run that gives up after its first failure, says so once, and leaves the local logs complete.

    Args:
        run_dir: the run folder; `<service>_id` in it keeps the run's id, so that resumed segments are one run.
        identity: how the run is called.
    """

    service: ClassVar[str]  # its name in logger.services and in files
    shown: ClassVar[str]  # its name in messages

    def __init__(self, run_dir: str | Path, identity: Identity) -> None:
        super().__init__()
        self.run_dir, self.identity = Path(run_dir), identity
        self.config: Mapping[str, Any] = {}  # told as the run begins
        self._run: Any = None
        self._dead = False

    # ---- what a service writes ---------------------------------------------------------------------------------------

    @abstractmethod
    def start(self) -> Any:
        """Begin the run, or go on with the one of `version`."""

    @abstractmethod
    def send_config(self, run: Any, values: Mapping[str, Any]) -> None:
        """The composed config, by dotted names."""

    @abstractmethod
    def send_metrics(self, run: Any, values: Mapping[str, float], step: int | None) -> None:
        """Numbers; `step` counts optimizer steps."""

    @abstractmethod
    def send_images(self, run: Any, key: str, images: Sequence[Any], captions: Sequence[str], step: int | None) -> None:
        """PIL pictures with captions."""

    @abstractmethod
    def send_table(self, run: Any, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table; cells may be PIL pictures."""

    @abstractmethod
    def send_summary(self, run: Any, values: Mapping[str, Any]) -> None:
        """The run's final numbers, by dotted names."""

    def send_files(self, run: Any, texts: Mapping[str, str]) -> None:
        """Text files by their paths below the run folder, for services that keep files."""

    @abstractmethod
    def end(self, run: Any, exit_code: int) -> None:
        """Close the run; it may wait for an upload."""

    def gave_up(self) -> None:
        """Clean up after a failure."""

    # ---- what a run calls --------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The project, as Lightning's own loggers say."""
        return self.identity.project

    @property
    def version(self) -> str:
        """The run's id, kept in the run folder."""
        path = self.run_dir / f"{self.service}_id"
        if path.is_file():
            return path.read_text(encoding="ascii").strip()
        name = uuid.uuid4().hex[:8]
        files.atomic_write(path, name)
        return name

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Record the composed config, flattened: {"method": {"lr": 1}} becomes "method.lr"."""
        values = vars(params) if hasattr(params, "__dict__") else params
        self._guarded("config", lambda run: self.send_config(run, flatten(values)))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Send numbers; `step` counts optimizer steps."""
        values = {name: value for name, value in metrics.items() if name != "epoch"}  # there is one endless epoch
        self._guarded("log", lambda run: self.send_metrics(run, values, step))

    @rank_zero_only
    def log_images(self, key: str, images: Sequence[Any], captions: Sequence[str], step: int | None = None) -> None:
        """Send a panel of PIL pictures with captions."""
        self._guarded("log_images", lambda run: self.send_images(run, key, images, captions, step))

    @rank_zero_only
    def log_table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Send a table; PIL pictures in cells become pictures."""
        self._guarded("log_table", lambda run: self.send_table(run, key, columns, rows))

    @rank_zero_only
    def summary(self, values: Mapping[str, Any]) -> None:
        """Set the numbers that a service's run table shows."""
        self._guarded("summary", lambda run: self.send_summary(run, flatten(values)))

    @rank_zero_only
    def log_files(self, texts: Mapping[str, str]) -> None:
        """Send text files, by their paths below the run folder."""
        self._guarded("log_files", lambda run: self.send_files(run, texts))

    @rank_zero_only
    def finish(self, exit_code: int = 0) -> None:
        """End the run."""
        if self._run is not None:
            self._guarded("finish", lambda run: self.end(run, exit_code))
            self._run, self._dead = None, True

    def _guarded(self, what: str, call: Callable[[Any], Any]) -> None:
        """Make one call; whatever it raises ends the service and not the run. Ctrl-C and our own stop pass through."""
        if self._dead:
            return
        try:
            if self._run is None:
                self._run = self.start()
                if self.config:
                    self.send_config(self._run, flatten(self.config))
            call(self._run)
        except StoppedError:
            raise
        except (Exception, SystemExit) as error:
            self.give_up(what, error)

    def give_up(self, what: str, error: BaseException) -> None:
        """No more of this service in this run."""
        log.warning(
            "%s failed in %s (%s): no more %s in this run; metrics.jsonl is complete.",
            self.shown, what, brief(error), self.shown,
        )  # fmt: skip
        begun, self._run, self._dead = self._run is not None, None, True
        if begun:
            self.gave_up()


class Trackers(Logger):
    """The services of one run: each call goes to all, and one that fails leaves the others alone.

    Args:
        members: the services, may be none.
    """

    def __init__(self, members: Sequence[Tracker]) -> None:
        super().__init__()
        self.members = list(members)

    @property
    def name(self) -> str:
        """The project, as Lightning's own loggers say."""
        return self.members[0].name if self.members else ""

    @property
    def version(self) -> str:
        """The run's id of the first service."""
        return self.members[0].version if self.members else ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """As `Tracker`."""
        for member in self.members:
            member.log_hyperparams(params)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """As `Tracker`."""
        for member in self.members:
            member.log_metrics(metrics, step)

    def log_images(self, key: str, images: Sequence[Any], captions: Sequence[str], step: int | None = None) -> None:
        """As `Tracker`."""
        for member in self.members:
            member.log_images(key, images, captions, step)

    def log_table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """As `Tracker`."""
        for member in self.members:
            member.log_table(key, columns, rows)

    def summary(self, values: Mapping[str, Any]) -> None:
        """As `Tracker`."""
        for member in self.members:
            member.summary(values)

    def log_files(self, texts: Mapping[str, str]) -> None:
        """As `Tracker`."""
        for member in self.members:
            member.log_files(texts)

    def finish(self, exit_code: int = 0) -> None:
        """As `Tracker`."""
        for member in self.members:
            member.finish(exit_code)

    def rewind(self, step: int) -> None:
        """Training goes on at this step: services that can drop what they had beyond it."""
        for member in self.members:
            if hasattr(member, "rewind"):
                member.rewind(step)


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested containers -> one dict of plain values with dotted names; lists of plain values stay lists."""
    if isinstance(values, Mapping):
        pairs = [(str(name), value) for name, value in values.items()]
    elif isinstance(values, list | tuple) and any(isinstance(value, Mapping | list | tuple) for value in values):
        pairs = [(str(index), value) for index, value in enumerate(values)]
    else:
        plain = values is None or isinstance(values, bool | int | float | str)
        value = list(map(_plain, values)) if isinstance(values, list | tuple) else values if plain else str(values)
        return {prefix: value}
    flat: dict[str, Any] = {}
    for name, value in pairs:
        flat |= flatten(value, f"{prefix}.{name}" if prefix else name)
    return flat


def brief(error: BaseException) -> str:
    """An error in one line."""
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0][:200]}" if first else type(error).__name__


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
