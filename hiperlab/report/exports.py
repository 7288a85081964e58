"""Files for other tools at a method's own cadence, while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from hiperlab.base.capability import Exportable


class CadencedExports(Callback):
    """After every optimizer step that the method asks for, writes each concept's files for other tools.

    Args:
        folder: the run's `artifacts` folder; a concept's files go to `folder/<name>/`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._seen = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on from where the run is."""
        self._seen = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Export at the optimizer-step boundary if the method wants this step."""
        step = trainer.global_step
        if step == self._seen:
            return  # between the micro batches of one step
        self._seen = step
        if not trainer.is_global_zero or not isinstance(pl_module, Exportable) or not pl_module.exports_at(step):
            return
        for index, subject in enumerate(pl_module.concepts):  # type: ignore[arg-type]
            folder = self.folder / subject.name
            folder.mkdir(parents=True, exist_ok=True)
            pl_module.export(index, folder, step)
