"""Metrics on the run's own disk, complete without any service: metrics.jsonl while it runs, metrics.csv at its end."""

from __future__ import annotations

import csv
import errno
import io
import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from hiperlab import files

log = logging.getLogger(__name__)


class JsonlLogger(Logger):
    """One flushed line per logged step: {"step": 7, "time": 1700000000.0, "loss": 0.12, ...}.

    `step` is the number of optimizer steps taken before the value was measured, as Lightning counts for every logger.
    A value that is not finite is written as null.

    Args:
        run_dir: the run folder.
        csv: write metrics.csv, all columns in one table, when the run ends.
    """

    def __init__(self, run_dir: str | Path, csv: bool = True) -> None:
        super().__init__()
        self.path = Path(run_dir) / "metrics.jsonl"
        self.csv = csv
        self._file: IO[bytes] | None = None
        self._warned = False

    @property
    def name(self) -> str:
        """Lightning asks for one."""
        return "jsonl"

    @property
    def version(self) -> str:
        """Lightning asks for one."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one line and hand it to the system, so that a killed process loses nothing."""
        values = {name: _plain(value) for name, value in metrics.items() if name != "epoch"}  # one endless epoch
        line = json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n"
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                _drop_torn_line(self.path)
                self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - open as long as the run
            if self._file.write(line.encode()) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:  # a full disk: training is worth more than its curve
            self._close()  # the next line begins with what a torn one left
            if not self._warned:
                log.warning("%s cannot be written (%s): training goes on, the curve has a gap.", self.path, error)
            self._warned = True

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drop what a previous attempt measured after `step` optimizer steps: those steps are about to be repeated."""
        self._close()
        rows = read_metrics(self.path)
        kept = [row for row in rows if row.get("step") is None or row["step"] < step]
        if len(kept) < len(rows):
            files.atomic_write(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the file and write the table."""
        self._close()
        if self.csv and self.path.is_file():
            write_csv(self.path)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class RewindLogs(Callback):
    """Tells every logger that can rewind at which step training really starts, before the first new line."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop lines beyond the resumed step; on a fresh start all lines of an earlier attempt."""
        for logger in trainer.loggers:
            if hasattr(logger, "rewind"):
                logger.rewind(trainer.global_step)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; lines torn by a crash are left out, a missing file has none."""
    rows = []
    if Path(path).is_file():
        for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                rows.append(row)
    return rows


def write_csv(path: str | Path) -> Path:
    """Write metrics.jsonl as a table beside it: step and time first, then every column that ever occurred."""
    rows = read_metrics(path)
    names = dict.fromkeys(["step", "time", *sorted({name for row in rows for name in row})])
    text = io.StringIO()
    writer = csv.DictWriter(text, list(names), restval="")
    writer.writeheader()
    writer.writerows(rows)
    target = Path(path).with_suffix(".csv")
    files.atomic_write(target, text.getvalue())
    return target


def _plain(value: Any) -> Any:
    """A number JSON can hold."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _drop_torn_line(path: Path) -> None:
    """Cut a last line without its newline: the process died while writing it."""
    if not path.is_file():
        return
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        with open(path, "r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)
