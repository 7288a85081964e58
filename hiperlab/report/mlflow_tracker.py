"""MLflow, through Lightning's logger."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from hiperlab import files
from hiperlab.report.tracker import Identity, Tracker

LONGEST = 6000  # characters of a parameter that MLflow takes


class MlflowTracker(Tracker):
    """An MLflow run.

    Args:
        run_dir: the run folder.
        identity: how the run is called; the project is MLflow's experiment, group, job type and tags are its tags.
        uri: of the tracking server or store; None for MLFLOW_TRACKING_URI, or MLflow's own choice.
    """

    service: ClassVar[str] = "mlflow"
    shown: ClassVar[str] = "MLflow"

    def __init__(self, run_dir: str | Path, identity: Identity, uri: str | None = None) -> None:
        super().__init__(run_dir, identity)
        self.uri = uri

    def start(self) -> Any:
        """Begin the run, or go on with the one that the run folder names."""
        import mlflow
        from pytorch_lightning.loggers import MLFlowLogger

        identity = self.identity
        tags = {"group": identity.group, "job_type": identity.job_type, "tags": ", ".join(identity.tags)}
        logger = MLFlowLogger(
            experiment_name=identity.project,
            run_name=identity.name,
            tracking_uri=self.uri or mlflow.get_tracking_uri(),
            tags={name: value for name, value in tags.items() if value},
            run_id=self.version or None,
        )
        files.atomic_write(self._id_path, str(logger.run_id))  # the server gives it
        return logger

    @property
    def version(self) -> str:
        """The run's id, which the server gave; "" before the run began."""
        return self._id_path.read_text(encoding="ascii").strip() if self._id_path.is_file() else ""

    @property
    def _id_path(self) -> Path:
        return self.run_dir / f"{self.service}_id"

    def send_config(self, run: Any, values: Mapping[str, Any]) -> None:
        """As `Tracker`; a run that goes on keeps the values it has, which MLflow never changes."""
        known = run.experiment.get_run(run.run_id).data.params
        fresh = {name: str(value)[:LONGEST] for name, value in values.items() if name not in known}
        run.log_hyperparams(fresh)

    def send_metrics(self, run: Any, values: Mapping[str, float], step: int | None) -> None:
        """As `Tracker`."""
        run.log_metrics(dict(values), step)

    def send_images(self, run: Any, key: str, images: Sequence[Any], captions: Sequence[str], step: int | None) -> None:
        """Pictures as artifacts, their captions beside them."""
        folder = key if step is None else f"{key}/{step:06d}"
        for number, image in enumerate(images):
            run.experiment.log_image(run.run_id, image, artifact_file=f"{folder}/{number:02d}.png")
        run.experiment.log_text(run.run_id, json.dumps(list(captions), indent=1), f"{folder}/captions.json")

    def send_table(self, run: Any, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A CSV; pictures in cells lie beside it and are named in it."""
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(columns)
        for number, row in enumerate(rows):
            cells = []
            for place, cell in enumerate(row):
                if hasattr(cell, "convert"):
                    name = f"{key}/{number:04d}_{place}.png"
                    run.experiment.log_image(run.run_id, cell, artifact_file=name)
                    cell = name
                cells.append(cell)
            writer.writerow(cells)
        run.experiment.log_text(run.run_id, text.getvalue(), f"{key}.csv")

    def send_summary(self, run: Any, values: Mapping[str, Any]) -> None:
        """The numbers among them."""
        run.log_metrics({name: value for name, value in values.items() if isinstance(value, int | float)})

    def send_files(self, run: Any, texts: Mapping[str, str]) -> None:
        """Artifacts under results/."""
        for name, text in texts.items():
            run.experiment.log_text(run.run_id, text, f"results/{name}")

    def end(self, run: Any, exit_code: int) -> None:
        """As `Tracker`."""
        run.experiment.set_terminated(run.run_id, "FAILED" if exit_code else "FINISHED")
