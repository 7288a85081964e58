"""Weights & Biases."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from hiperlab.errors import StoppedError, UserError
from hiperlab.metric.rows import RESULTS_ARTIFACT
from hiperlab.report.tracker import Identity, Tracker, brief

log = logging.getLogger(__name__)
_MODES = ("offline", "online", "disabled")


class WandbTracker(Tracker):
    """A W&B run.

    Offline it writes to `run_dir/wandb` without any network; `wandb sync` uploads it later, under the id kept in the
    run folder, so that syncing twice makes no second run. Online, when the server cannot be reached, it falls back to
    offline.

    Args:
        run_dir: the run folder.
        identity: how the run is called.
        mode: offline, online or disabled.
        entity: user or team; None means the logged-in one.
        init_timeout: seconds to wait for the server.
        finish_timeout: seconds to wait for the upload at the end; what is missing by then can be synced later.
    """

    service: ClassVar[str] = "wandb"
    shown: ClassVar[str] = "W&B"

    def __init__(
        self,
        run_dir: str | Path,
        identity: Identity,
        mode: str = "offline",
        entity: str | None = None,
        init_timeout: float = 20.0,
        finish_timeout: float = 60.0,
    ) -> None:
        super().__init__(run_dir, identity)
        if mode not in _MODES:
            raise UserError(f"logger.mode={mode}: expected one of {', '.join(_MODES)}.")
        self.mode, self.entity = mode, entity
        self._timeouts = (init_timeout, finish_timeout)
        self._dead = mode == "disabled"

    def start(self) -> Any:
        """Begin online or offline as told."""
        try:
            return self._init("online" if self.mode == "online" else "offline")
        except (Exception, SystemExit) as error:
            if self.mode != "online" or isinstance(error, StoppedError | ImportError):
                raise
            log.warning("W&B cannot be reached (%s): logging offline; upload later with `wandb sync`.", brief(error))
            _forget_service()  # it still holds the run's id, and would refuse it
            return self._init("offline")

    def send_config(self, run: Any, values: Mapping[str, Any]) -> None:
        """As `Tracker`."""
        run.config.update(values, allow_val_change=True)

    def send_metrics(self, run: Any, values: Mapping[str, float], step: int | None) -> None:
        """As `Tracker`."""
        run.log(_stepped(dict(values), step))

    def send_images(self, run: Any, key: str, images: Sequence[Any], captions: Sequence[str], step: int | None) -> None:
        """As `Tracker`."""
        import wandb

        panel = [wandb.Image(image, caption=text) for image, text in zip(images, captions, strict=True)]
        run.log(_stepped({key: panel}, step))

    def send_table(self, run: Any, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """As `Tracker`."""
        import wandb

        data = [[wandb.Image(cell) if hasattr(cell, "convert") else cell for cell in row] for row in rows]
        run.log({key: wandb.Table(columns=list(columns), data=data)})

    def send_summary(self, run: Any, values: Mapping[str, Any]) -> None:
        """As `Tracker`."""
        run.summary.update(values)

    def send_files(self, run: Any, texts: Mapping[str, str]) -> None:
        """An artifact of type `RESULTS_ARTIFACT`, which `hiperlab.compare --wandb entity/project` reads back."""
        import wandb

        artifact = wandb.Artifact(f"{RESULTS_ARTIFACT}-{self.version}", type=RESULTS_ARTIFACT)
        for name, text in texts.items():
            with artifact.new_file(name, encoding="utf-8") as file:
                file.write(text)
        run.log_artifact(artifact)

    def end(self, run: Any, exit_code: int) -> None:
        """Wait for the upload no longer than the timeout."""
        failed: list[BaseException] = []

        def finish() -> None:
            try:
                run.finish(exit_code=exit_code)
            except (Exception, SystemExit) as error:
                failed.append(error)

        thread = threading.Thread(target=finish, daemon=True)  # finish() may wait for a dead network for ever
        thread.start()
        thread.join(self._timeouts[1])
        if thread.is_alive():
            raise TimeoutError(f"no answer in {self._timeouts[1]:g} s")
        if failed:
            raise failed[0]

    def gave_up(self) -> None:
        """End W&B's own process."""
        _forget_service()

    def _init(self, mode: Literal["offline", "online"]) -> Any:
        import wandb

        settings = wandb.Settings(
            init_timeout=self._timeouts[0],
            finish_timeout=self._timeouts[1],
            silent=True,
            quiet=True,
            console="off",  # wrapping stdout breaks progress bars and slows printing
            disable_git=True,
            disable_code=True,
            save_code=False,
            disable_job_creation=True,
            x_disable_machine_info=True,  # machine names and hardware stay at home
        )
        run = wandb.init(
            project=self.identity.project,
            name=self.identity.name,
            entity=self.entity,
            group=self.identity.group,
            job_type=self.identity.job_type,
            tags=[tag[:64] for tag in self.identity.tags],  # W&B refuses longer ones
            mode=mode,
            id=self.version,
            resume="allow",
            reinit="create_new",  # several runs in one process (notebook) must not share one
            dir=str(self.run_dir),
            settings=settings,
        )
        run.define_metric("global_step")
        run.define_metric("*", step_metric="global_step", step_sync=True)
        return run


def _stepped(values: dict[str, Any], step: int | None) -> dict[str, Any]:
    return values if step is None else {**values, "global_step": step}


def _forget_service() -> None:
    """End W&B's service; one that is gone would otherwise make W&B's exit hook print a traceback."""
    with contextlib.suppress(Exception), open(os.devnull, "w") as void, contextlib.redirect_stderr(void):
        import wandb

        wandb.teardown(exit_code=1)
