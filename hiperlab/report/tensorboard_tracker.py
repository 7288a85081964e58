"""TensorBoard, through Lightning's logger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from hiperlab.report.tracker import Identity, Tracker


class TensorboardTracker(Tracker):
    """Event files in `run_dir/tensorboard`; `tensorboard --logdir outputs` shows all runs below.

    Args:
        run_dir: the run folder.
        identity: how the run is called; TensorBoard calls a run by its folder.
    """

    service: ClassVar[str] = "tensorboard"
    shown: ClassVar[str] = "TensorBoard"

    def __init__(self, run_dir: str | Path, identity: Identity) -> None:
        super().__init__(run_dir, identity)
        self._purged: int | None = None

    @property
    def version(self) -> str:
        """A folder needs no id."""
        return ""

    def rewind(self, step: int) -> None:
        """Values at `step` and beyond, of an earlier attempt, are shown no more."""
        self._purged = step

    def start(self) -> Any:
        """Open a file of events."""
        from pytorch_lightning.loggers import TensorBoardLogger

        return TensorBoardLogger(self.run_dir, name="", version="tensorboard", purge_step=self._purged)

    def send_config(self, run: Any, values: Mapping[str, Any]) -> None:
        """The config as text: what Lightning would write beside it is the run folder's config.yaml."""
        lines = [f"| {name} | {_cell(value)} |" for name, value in values.items()]
        run.experiment.add_text("config", "\n".join(["| setting | value |", "|---|---|", *lines]))

    def send_metrics(self, run: Any, values: Mapping[str, float], step: int | None) -> None:
        """As `Tracker`."""
        run.log_metrics(dict(values), step)

    def send_images(self, run: Any, key: str, images: Sequence[Any], captions: Sequence[str], step: int | None) -> None:
        """One panel a picture; the caption is part of its name."""
        for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
            pixels = np.asarray(image.convert("RGB"))
            run.experiment.add_image(f"{key}/{number} {caption}", pixels, step, dataformats="HWC")

    def send_table(self, run: Any, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table as text; pictures in cells are panels beside it."""
        lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for number, row in enumerate(rows):
            cells = []
            for cell in row:
                if hasattr(cell, "convert"):
                    run.experiment.add_image(f"{key}/{number}", np.asarray(cell.convert("RGB")), dataformats="HWC")
                    cell = f"{key}/{number}"
                cells.append(_cell(cell))
            lines.append(f"| {' | '.join(cells)} |")
        run.experiment.add_text(key, "\n".join(lines))

    def send_summary(self, run: Any, values: Mapping[str, Any]) -> None:
        """The numbers among them, as single points."""
        for name, value in values.items():
            if isinstance(value, int | float):
                run.experiment.add_scalar(name, value)

    def end(self, run: Any, exit_code: int) -> None:
        """As `Tracker`; TensorBoard keeps no exit code."""
        run.experiment.close()


def _cell(value: Any) -> str:
    """Text that ends no cell of a Markdown table."""
    return str(value).replace("|", "\\|").replace("\n", " ")
