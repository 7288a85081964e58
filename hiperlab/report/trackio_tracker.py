"""Trackio: a dashboard on one's own machine, without an account. Lightning has no logger for it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from hiperlab.report.tracker import Identity, Tracker


class TrackioTracker(Tracker):
    """A Trackio run in the user's Trackio folder (TRACKIO_DIR); `trackio show --project hiperlab` opens it.

    Trackio goes on with a run by its name, so the shown name ends in the run's own id.

    Args:
        run_dir: the run folder.
        identity: how the run is called; tags and the job's type go into the config, Trackio has no others.
        space: a Hugging Face Space to log to instead, "user/name"; None for this machine.
    """

    service: ClassVar[str] = "trackio"
    shown: ClassVar[str] = "Trackio"

    def __init__(self, run_dir: str | Path, identity: Identity, space: str | None = None) -> None:
        super().__init__(run_dir, identity)
        self.space = space

    def start(self) -> Any:
        """Begin the run, or go on with it."""
        import trackio

        identity = self.identity
        with _silent():
            return trackio.init(
                project=identity.project,
                name=f"{identity.name or 'run'}-{self.version}",
                group=identity.group,
                space_id=self.space,
                config={"tags": list(identity.tags), "job_type": identity.job_type},
                resume="allow",
                embed=False,
                auto_log_gpu=False,  # machine names and hardware stay at home
                auto_log_cpu=False,
            )

    def send_config(self, run: Any, values: Mapping[str, Any]) -> None:
        """As `Tracker`."""
        run.config.update(values)

    def send_metrics(self, run: Any, values: Mapping[str, float], step: int | None) -> None:
        """As `Tracker`."""
        run.log(dict(values), step=step)

    def send_images(self, run: Any, key: str, images: Sequence[Any], captions: Sequence[str], step: int | None) -> None:
        """One panel a picture: Trackio has no lists of pictures."""
        import trackio

        for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
            run.log({f"{key}/{number}": trackio.Image(image, caption=caption)}, step=step)

    def send_table(self, run: Any, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """As `Tracker`."""
        import trackio

        data = [[trackio.Image(cell) if hasattr(cell, "convert") else cell for cell in row] for row in rows]
        run.log({key: trackio.Table(columns=list(columns), data=data)})

    def send_summary(self, run: Any, values: Mapping[str, Any]) -> None:
        """The numbers among them; Trackio has no summary of a run."""
        run.log({name: value for name, value in values.items() if isinstance(value, int | float)})

    def end(self, run: Any, exit_code: int) -> None:
        """As `Tracker`; Trackio keeps no exit code."""
        with _silent():
            run.finish()


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Trackio prints how to open its dashboard at every start, also of a sweep's jobs."""
    with open(os.devnull, "w") as void, contextlib.redirect_stdout(void):
        yield
