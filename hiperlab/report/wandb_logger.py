"""Weights & Biases, guarded: whatever happens to it costs one warning line and never the run."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from hiperlab import files
from hiperlab.errors import StoppedError, UserError

log = logging.getLogger(__name__)
_MODES = ("offline", "online", "disabled")


class GuardedWandb(Logger):
    """A W&B run that gives up after its first failure, says so once, and leaves the local logs complete.

    Offline it writes to `run_dir/wandb` without any network; `wandb sync` uploads it later. Online, when the server
    cannot be reached, it falls back to offline.

    Args:
        run_dir: the run folder; `wandb_id` in it keeps the run's id, so that resumed segments are one run.
        mode: offline, online or disabled.
        project: W&B project.
        name: shown name of the run.
        entity: user or team; None means the logged-in one.
        group: runs of one sweep share it.
        job_type: train, eval or compare.
        tags: for filtering, such as the Hydra choices method and data.
        init_timeout: seconds to wait for the server.
        finish_timeout: seconds to wait for the upload at the end; what is missing by then can be synced later.
    """

    def __init__(
        self,
        run_dir: str | Path,
        mode: str = "offline",
        project: str = "hiperlab",
        name: str | None = None,
        entity: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        tags: Sequence[str] = (),
        init_timeout: float = 20.0,
        finish_timeout: float = 60.0,
    ) -> None:
        super().__init__()
        if mode not in _MODES:
            raise UserError(f"logger.mode={mode}: expected one of {', '.join(_MODES)}.")
        self.run_dir = Path(run_dir)
        self.mode = mode
        self._identity: dict[str, Any] = {
            "project": project,
            "name": name,
            "entity": entity,
            "group": group,
            "job_type": job_type,
        }
        self._identity["tags"] = [tag[:64] for tag in tags]  # W&B refuses longer ones
        self._timeouts = (init_timeout, finish_timeout)
        self._run: Any = None
        self._dead = mode == "disabled"

    @property
    def name(self) -> str:
        """The project, as Lightning's own W&B logger says."""
        return str(self._identity["project"])

    @property
    def version(self) -> str:
        """The run's id, kept in the run folder."""
        path = self.run_dir / "wandb_id"
        if path.is_file():
            return path.read_text(encoding="ascii").strip()
        name = uuid.uuid4().hex[:8]
        files.atomic_write(path, name)
        return name

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Record the composed config, flattened: {"method": {"lr": 1}} becomes "method.lr"."""
        values = vars(params) if hasattr(params, "__dict__") else params
        self._guarded("config", lambda run: run.config.update(flatten(values), allow_val_change=True))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Send numbers; `step` counts optimizer steps."""
        values = {name: value for name, value in metrics.items() if name != "epoch"}  # there is one endless epoch
        self._guarded("log", lambda run: run.log(_stepped(values, step)))

    @rank_zero_only
    def log_images(self, key: str, images: Sequence[Any], captions: Sequence[str], step: int | None = None) -> None:
        """Send a panel of PIL pictures with captions."""

        def send(run: Any) -> None:
            import wandb

            panel = [wandb.Image(image, caption=text) for image, text in zip(images, captions, strict=True)]
            run.log(_stepped({key: panel}, step))

        self._guarded("log_images", send)

    @rank_zero_only
    def log_table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Send a table; PIL pictures in cells become pictures."""

        def send(run: Any) -> None:
            import wandb

            data = [[wandb.Image(cell) if hasattr(cell, "convert") else cell for cell in row] for row in rows]
            run.log({key: wandb.Table(columns=list(columns), data=data)})

        self._guarded("log_table", send)

    @rank_zero_only
    def summary(self, values: Mapping[str, Any]) -> None:
        """Set the numbers that W&B's run table shows."""
        self._guarded("summary", lambda run: run.summary.update(flatten(values)))

    @rank_zero_only
    def finish(self, exit_code: int = 0) -> None:
        """End the run; waits for the upload no longer than the timeout."""
        if self._run is None:
            return

        def end() -> None:
            self._guarded("finish", lambda run: run.finish(exit_code=exit_code))

        thread = threading.Thread(target=end, daemon=True)  # finish() may wait for a dead network for ever
        thread.start()
        thread.join(self._timeouts[1])
        if thread.is_alive():
            self._give_up("finish", TimeoutError(f"no answer in {self._timeouts[1]:g} s"))
        self._run, self._dead = None, True

    def _guarded(self, what: str, call: Callable[[Any], Any]) -> None:
        """Make one call; whatever it raises ends W&B and not the run. Ctrl-C and our own stop pass through."""
        if self._dead:
            return
        try:
            if self._run is None:
                self._run = self._start()
            call(self._run)
        except StoppedError:
            raise
        except (Exception, SystemExit) as error:
            self._give_up(what, error)

    def _start(self) -> Any:
        try:
            return self._init("online" if self.mode == "online" else "offline")
        except (Exception, SystemExit) as error:
            if self.mode != "online" or isinstance(error, StoppedError | ImportError):
                raise
            log.warning("W&B cannot be reached (%s): logging offline; upload later with `wandb sync`.", _brief(error))
            _forget_service()  # it still holds the run's id, and would refuse it
            return self._init("offline")

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
            **self._identity,
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

    def _give_up(self, what: str, error: BaseException) -> None:
        log.warning("W&B failed in %s (%s): no more W&B in this run; metrics.jsonl is complete.", what, _brief(error))
        run, self._run, self._dead = self._run, None, True
        if run is not None:
            _forget_service()


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


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _stepped(values: dict[str, Any], step: int | None) -> dict[str, Any]:
    return values if step is None else {**values, "global_step": step}


def _brief(error: BaseException) -> str:
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0][:200]}" if first else type(error).__name__


def _forget_service() -> None:
    """End W&B's service; one that is gone would otherwise make W&B's exit hook print a traceback."""
    with contextlib.suppress(Exception), open(os.devnull, "w") as void, contextlib.redirect_stderr(void):
        import wandb

        wandb.teardown(exit_code=1)
