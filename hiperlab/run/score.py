"""The score and summary stages: rows, tables, and a page to look at."""

from __future__ import annotations

import json
import logging
from typing import Any

from PIL import Image

from hiperlab import files
from hiperlab.errors import UserError, near
from hiperlab.metric.rows import ALL, COMPARED, PICTURE, read_scores
from hiperlab.metric.score import score as score_pictures
from hiperlab.metric.table import aggregate
from hiperlab.report.environment import peak_memory
from hiperlab.report.html import write_report
from hiperlab.report.loggers import write_csv
from hiperlab.run.references import edits
from hiperlab.run.sample import read_manifest
from hiperlab.run.session import Session
from hiperlab.run.unrelated import read_unrelated

log = logging.getLogger(__name__)


def score(session: Session) -> None:
    """Score every sampled picture; scores whose weights are missing are named and left for later.

    Raises:
        UserError: nothing was sampled yet.
    """
    with session.stage("score") as found:
        records = read_manifest(session.folder)
        if not records:
            raise UserError(f"{session.folder} holds no samples to score: run stages=[sample,score] first.")
        references = {concept.name: concept.views for concept in session.data.concepts}
        held_out = {concept.name: concept.held_out for concept in session.data.concepts}
        known = [record for record in records if record["concept"] in references]
        scored = score_pictures(
            known, references, session.protocol, root=session.folder, device=session.device,
            edits=edits(session.data.concepts, session.cfg.model.size), held_out=held_out,
            unrelated=[record for record in read_unrelated(session.folder) if record["concept"] in references],
        )  # fmt: skip
        for message in scored.messages:
            log.warning("%s", message)
        files.write_jsonl(session.folder / "scores.jsonl", scored.rows)
        found |= {"rows": len(scored.rows), "protocol": session.protocol.name, "hash": session.protocol.hash}
        session.update(score_messages=scored.messages, scores=aggregate(scored.rows, by=("variant",)))


def check_objective(session: Session) -> None:
    """Before anything is trained for it.

    Raises:
        UserError: `objective` names a score that the protocol lacks.
    """
    wanted, choices = session.cfg.objective, ["loss", *session.protocol.members]
    if wanted is not None and wanted not in choices:
        raise UserError(f"objective={wanted} is no score.{near(str(wanted), choices)}")


def objective(session: Session) -> float | None:
    """What an optimiser maximises: the final loss negated, or a score's mean over all concepts."""
    wanted = session.cfg.objective
    if wanted is None:
        return None
    if wanted == "loss":
        loss = session.results.get("stages", {}).get("fit", {}).get("loss")
        return None if loss is None else -float(loss)
    table = session.results.get("scores", [])
    means = {row["variant"]: row["mean"] for row in table if row["metric"] == wanted and row["kind"] == ALL}
    return means.get("", next(iter(means.values()), None))  # the plain pictures count, if any were drawn


def summary(session: Session) -> None:
    """results.json, metrics.csv, report.html, and the same to the tracking services."""
    with session.stage("summary"):
        session.update(objective=objective(session), notes=session.notes, peak_memory=peak_memory())
        for metrics in (*session.folder.glob("metrics.jsonl"), *session.folder.glob("concepts/*/metrics.jsonl")):
            write_csv(metrics)
        rows = read_scores(session.folder)
        ended = {**session.results, "status": "finished"}  # these are the run's last acts, so they may say how it ends
        write_report(session.folder, ended, rows, session.notes)
        if session.trackers.members:
            _to_trackers(session, rows, ended)


def _to_trackers(session: Session, rows: list[dict[str, Any]], ended: dict[str, Any]) -> None:
    """Scores, the grids, one table row per picture, and what a comparison reads."""
    table = session.results.get("scores", [])
    means = {
        "/".join(filter(None, ["score", row["metric"], row["concept"] or ALL, row.get("variant")])): row["mean"]
        for row in table
    }
    by_picture: dict[tuple[str, str], dict[str, Any]] = {}
    for row in (row for row in rows if row["kind"] == PICTURE):
        by_picture.setdefault((row["concept"], row["picture"]), {})[row["metric"]] = row["value"]
    names = sorted({row["metric"] for row in table})
    records = read_manifest(session.folder)
    session.trackers.summary({**means, "objective": session.results.get("objective")})
    cells = []
    for record in records:
        with Image.open(session.folder / record["path"]) as picture:
            values = [by_picture.get((record["concept"], record["path"]), {}).get(name) for name in names]
            cells.append(
                [record["concept"], record["text"], record["seed"], record["variant"], picture.copy(), *values]
            )
    if cells:
        session.trackers.log_table("samples", ["concept", "prompt", "seed", "variant", "picture", *names], cells)
    for grid in sorted((session.folder / "grids").glob("*.png")):
        if not grid.name.startswith("train-"):
            with Image.open(grid) as picture:
                session.trackers.log_images(f"grid/{grid.stem}", [picture.copy()], [grid.stem])
    texts = {name: (session.folder / name).read_text("utf-8") for name in COMPARED if (session.folder / name).is_file()}
    session.trackers.log_files(texts | {"results.json": json.dumps(ended, indent=1, default=str)})
    session.trackers.finish()
