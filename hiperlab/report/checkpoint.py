"""Checkpoints that are whole or absent, and the callback that decides when to write one.

`checkpoints/step-000123.ckpt` holds the state after 123 optimizer steps; `step-000123.ckpt.sha256` lies beside it.
A checkpoint without a matching checksum counts as broken, so a crash between the two files is harmless.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import CheckpointIO

from hiperlab import files
from hiperlab.errors import DiskFullError, StoppedError, UserError
from hiperlab.formats.pickles import check_archive

log = logging.getLogger(__name__)
NEEDED = ("state_dict", "optimizer_states", "global_step", "loops", "pytorch-lightning_version")
_NAME = re.compile(r"step-(\d{6,})\.ckpt")


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's door to the disk: temporary file in the same folder, fsync, rename, checksum; safe loading."""

    def __init__(self) -> None:
        self._deferred: list[Exception] | None = None

    @contextlib.contextmanager
    def deferred(self) -> Iterator[list[Exception]]:
        """Collect a failed save instead of raising it: Lightning's barrier after a save must see every rank."""
        self._deferred = []
        try:
            yield self._deferred
        finally:
            self._deferred = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write the checkpoint and then its checksum; what was there before stays until the new one is whole."""
        try:
            files.atomic_write(path, lambda file: torch.save(checkpoint, file), tensor_bytes(checkpoint))
            files.write_sidecar(path)
        except (OSError, DiskFullError) as error:
            if self._deferred is None:
                raise
            self._deferred.append(error)

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Check every byte, then load tensors and plain values only, whatever `weights_only` says.

        Raises:
            UserError: missing, broken, holding something other than tensors and plain values, or not Lightning's.
        """
        reason = files.broken(path)
        if reason is not None:
            raise UserError(f"checkpoint {path} cannot be used: {reason}. Use an earlier one, or resume=auto.")
        check_archive(Path(path))
        try:
            content = torch.load(path, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            detail = str(error).splitlines()[0]
            raise UserError(f"checkpoint {path} holds more than tensors and plain values: {detail}") from error
        lacking = [key for key in NEEDED if not isinstance(content, dict) or key not in content]
        if lacking:
            raise UserError(
                f"checkpoint {path} lacks {', '.join(lacking)}: another program wrote it, and training cannot go on "
                "from it. A learnt concept is drawn with artifact=<file> stages=[sample]."
            )
        return content

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint, its checksum first: half a deletion leaves a file that counts as broken."""
        for part in (files.sidecar(path), Path(path)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part)


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(tensor_bytes(each) for each in inner)


def path_of(folder: str | Path, step: int) -> Path:
    """Where the checkpoint after `step` optimizer steps lies."""
    return Path(folder) / f"step-{step:06d}.ckpt"


def step_of(path: str | Path) -> int:
    """The optimizer steps behind a checkpoint, from its name.

    Raises:
        UserError: the file is not named like a hiperlab checkpoint.
    """
    match = _NAME.fullmatch(Path(path).name)
    if match is None:
        raise UserError(f"{path} is not named like a checkpoint (step-000123.ckpt); do not rename checkpoints.")
    return int(match[1])


def steps_in(folder: str | Path) -> list[int]:
    """Steps of the checkpoints in a folder, ascending, broken ones included; empty if there is no folder."""
    if not Path(folder).is_dir():
        return []
    return sorted(int(match[1]) for name in os.listdir(folder) if (match := _NAME.fullmatch(name)))


def newest_valid(folder: str | Path) -> Path | None:
    """The newest checkpoint whose every byte is right; warns of each newer, broken one. None if there is none."""
    for step in reversed(steps_in(folder)):
        path = path_of(folder, step)
        reason = files.broken(path)
        if reason is None:
            return path
        log.warning("checkpoint %s is passed over: %s; falling back to the one before.", path, reason)
    return None


def resume_path(resume: str | None, folder: str | Path) -> Path | None:
    """Translate `resume=` into a checkpoint: None or "auto" (newest valid, None if none) or an explicit path.

    Raises:
        UserError: an explicit path that is missing or broken. It never falls back: the user named that very file.
    """
    if resume is None:
        return None
    if resume == "auto":
        return newest_valid(folder)
    reason = files.broken(resume)
    if reason is not None:
        found = newest_valid(Path(resume).parent)
        hint = f" The newest good one beside it is {found.name}." if found else ""
        raise UserError(f"resume={resume}: {reason}.{hint} resume=auto takes the newest good one.")
    step_of(resume)
    return Path(resume)


class StepCheckpoints(Checkpoint):
    """Saves every `every` optimizer steps, at the end and when told to stop; keeps the newest good ones.

    A save that fails (full disk) is warned about and training goes on with the previous good one; only if the last
    save fails does the run stop with an error.

    Args:
        folder: the run's `checkpoints` folder.
        every: optimizer steps between checkpoints; 0 saves at the end only.
        keep: how many of the newest good ones stay.
        keep_all: keep every one (the papers' cadence, for curves over training).
    """

    def __init__(self, folder: str | Path, every: int, keep: int = 2, keep_all: bool = False) -> None:
        if every < 0 or keep < 1:
            raise UserError(f"checkpoint every={every} and keep={keep}: every must be 0 or more, keep 1 or more.")
        self.folder = Path(folder)
        self.every = every
        self.keep = keep
        self.keep_all = keep_all
        self.good: list[int] = []  # steps known to be whole: written by us, or resumed from
        self._seen = 0

    @property
    def last_good(self) -> Path | None:
        """The newest checkpoint known to be whole."""
        return path_of(self.folder, self.good[-1]) if self.good else None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take note of what was resumed, and set later checkpoints aside: they belong to another history."""
        self._seen = trainer.global_step
        resumed = path_of(self.folder, trainer.global_step)
        self.good = [trainer.global_step] if trainer.global_step and resumed.is_file() else []
        if trainer.is_global_zero:
            self._set_aside(trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Save at the optimizer-step boundary if one is due. The stopping callback runs before this one."""
        step = trainer.global_step
        if step == self._seen:
            return  # between the micro batches of one step
        self._seen = step
        last = trainer.should_stop or step == trainer.max_steps
        if last or (self.every and step % self.every == 0):
            self.save(trainer, last=last)

    def save(self, trainer: Trainer, last: bool = False) -> Path:
        """Write the current state; every rank must call it.

        Raises:
            StoppedError: the last save failed.
        """
        path = path_of(self.folder, trainer.global_step)
        writer = trainer.strategy.checkpoint_io
        assert isinstance(writer, AtomicCheckpointIO), "give the Trainer plugins=[AtomicCheckpointIO()]"
        with writer.deferred() as errors:
            trainer.save_checkpoint(path, weights_only=False)  # the whole state: it is to be resumed
        failure = trainer.strategy.broadcast(str(errors[0]) if errors else "", 0)
        if failure:
            kept = f"the last good checkpoint is {self.last_good}" if self.good else "there is no earlier checkpoint"
            message = f"checkpoint {path.name} could not be written: {failure.rstrip('.')}; {kept}."
            if last:
                raise StoppedError(message, 1)
            log.warning("%s Training goes on.", message)
            return path
        self.good = [step for step in self.good if step != trainer.global_step] + [trainer.global_step]
        if trainer.is_global_zero and not self.keep_all:
            self._prune(writer)
        return path

    def _prune(self, writer: AtomicCheckpointIO) -> None:
        """Delete all but the newest `keep` good ones, those of earlier sessions and broken ones included."""
        self.good = self.good[-self.keep :]
        for step in steps_in(self.folder):
            if step not in self.good and step < self.good[-1]:
                writer.remove_checkpoint(path_of(self.folder, step))

    def _set_aside(self, step: int) -> None:
        """Rename checkpoints beyond `step`, so that a later resume=auto continues this history and not that one."""
        for later in (each for each in steps_in(self.folder) if each > step):
            path = path_of(self.folder, later)
            log.warning("training continues from step %d: %s is set aside as %s.replaced.", step, path, path.name)
            with contextlib.suppress(FileNotFoundError):
                os.replace(files.sidecar(path), f"{path}.replaced.sha256")
            os.replace(path, f"{path}.replaced")
