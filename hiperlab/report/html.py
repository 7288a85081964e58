"""report.html: one page that says what was run, how good it was, what it looks like and what it cost.

Everything on it comes from the run folder and from what the caller hands over; a missing part is left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from hiperlab import files
from hiperlab.metric.rows import ALL, PICTURE, TableRow, columns, score_row, table_row
from hiperlab.metric.table import aggregate
from hiperlab.report import page
from hiperlab.report.curve import curve
from hiperlab.report.loggers import read_metrics


def write_report(
    run_dir: str | Path,
    results: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
) -> Path:
    """Write `run_dir/report.html`.

    Args:
        run_dir: the run folder; config.yaml, environment.json, metrics.jsonl, grids/*.png and artifacts/* are read.
        results: as in results.json, all optional: status, method, model, data, seed, command, steps, concepts
            (names), seconds {stage: s}, peak_memory {"process"|"cuda": bytes}, trainable_parameters, and scores, the
            table of `metric.table.aggregate`; without it the table is made of `rows`.
        rows: the lines of scores.jsonl, one per picture and metric.
        notes: what a reader must know first: random weights, an untrained scorer, drawn pictures.

    Returns:
        Where the page lies.
    """
    folder, rows = Path(run_dir), [score_row(row) for row in rows]
    name = " · ".join(str(results[key]) for key in ("method", "data", "model") if results.get(key)) or folder.name
    concepts = ", ".join(map(str, results.get("concepts") or ()))
    what = [(key, results.get(key)) for key in ("status", "method", "model", "data", "seed", "steps")]
    config = folder / "config.yaml"
    strips = sorted([*folder.glob("grids/train-*.png"), *folder.glob("concepts/*/grids/train-*.png")])
    html = page.render(
        "report.html",
        name=name,
        folder=folder.name,
        must_know=notes,
        what=[*what, ("concepts", concepts)],
        command=results.get("command"),
        config=config.read_text(encoding="utf-8") if config.is_file() else "",
        scores=_scores([table_row(row) for row in results.get("scores") or aggregate(rows)]),
        prompts=_per_prompt(rows),
        pictures=_pictures(folder),
        losses=_losses(folder),
        monitored=_monitored(folder, results),
        samples=_training_samples(folder, strips),
        drawn_samples=len(strips),
        cost=_cost(results),
        artifacts=_artifacts(folder),
        **_environment(folder),
    )
    target = folder / "report.html"
    files.atomic_write(target, html)
    return target


def _scores(scores: Sequence[Mapping[str, Any]]) -> page.Table:
    """The table of `metric.table.aggregate`, further columns (such as a variant) first."""
    more = [name for name in (scores[0] if scores else ()) if name not in columns(TableRow)]
    head = [*more, "metric", "concept", "mean", "95 % interval", "n", "missed", "real pictures"]
    lines = []
    for score in scores:
        low, high = score.get("low"), score.get("high")
        interval = "–" if low is None or high is None else f"[{low:.3f}, {high:.3f}]"
        judge = "" if score.get("trained", True) else " (untrained judge)"
        numbers = [_number(score.get("mean")), interval, score.get("n", "–"), score.get("missed", 0)]
        names = [
            *(score.get(name, "") for name in more),
            f"{score['metric']}{' ↓' if score.get('lower_is_better') else ''}{judge}",
            score.get("concept") or ALL,
        ]
        lines.append([*names, *numbers, _number(score.get("ceiling"))])
    protocols = sorted({f"{s['protocol']} ({s['protocol_hash']})" for s in scores if s.get("protocol")})
    caption = (
        (f"Protocol {', '.join(protocols)}. " if protocols else "")
        + "Mean over pictures; interval by bootstrap over prompts; missed: pictures a judge could not score. "
        + "↓ marks scores of which less is better. "
        + "Real pictures: the references scored against each other, about as high as a score can honestly get."
    )
    classes = ["total" if score["kind"] == ALL else "" for score in scores]
    return page.Table(head, lines, caption, classes)


def _per_prompt(rows: Sequence[Mapping[str, Any]]) -> page.Table:
    """Means per concept and prompt, one column per metric."""
    values: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in rows:
        if row["kind"] == PICTURE and row.get("value") is not None:
            scores = values.setdefault((str(row["concept"]), str(row["prompt"])), {})
            scores.setdefault(str(row["metric"]), []).append(float(row["value"]))
    metrics = sorted({metric for scores in values.values() for metric in scores})
    lines = [
        [concept, prompt, *(_number(fmean(scores[metric])) if metric in scores else "–" for metric in metrics)]
        for (concept, prompt), scores in values.items()
    ]
    return page.Table(["concept", "prompt", *metrics], lines)


def _pictures(folder: Path) -> list[page.Figure]:
    """Every grid but those drawn while training."""
    paths = sorted(path for path in folder.glob("grids/*.png") if not path.name.startswith("train-"))
    return [page.figure(path, folder, path.stem) for path in paths]


def _training_samples(folder: Path, strips: Sequence[Path], most: int = 8) -> list[page.Figure]:
    """Over steps: the first, the last and evenly chosen ones between."""
    if not strips:
        return []
    count = min(most, len(strips))
    chosen = sorted({round(i * (len(strips) - 1) / max(1, count - 1)) for i in range(count)})
    return [page.figure(strips[i], folder, f"after {int(strips[i].stem.removeprefix('train-'))} steps") for i in chosen]


def _losses(folder: Path) -> list[tuple[str, str]]:
    """The run's curve, or one per concept where they were trained one by one, each with whose it is."""
    found = [(whose, _over_steps(part, "loss")) for whose, part in _trained(folder)]
    return [(whose, drawn) for whose, drawn in found if drawn]


def _monitored(folder: Path, results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """A curve of each concept's scores while it was trained, with what was scored and what came of it."""
    told = ((results.get("stages") or {}).get("fit") or {}).get("monitor") or {}
    score = told.get("score")
    names = {name: each for name, each in told.items() if isinstance(each, Mapping)}
    found = []
    for whose, part in _trained(folder):
        each = names.get(part.name) or next(iter(names.values()), {})
        if score and (drawn := _over_steps(part, f"monitor/{score}", smoothed=False)):
            found.append((f"{score}{whose}", drawn, str(each.get("artifact_step", "–"))))
    return found


def _trained(folder: Path) -> list[tuple[str, Path]]:
    """The run's folder, and one per concept where they were trained one by one, each with whose it is."""
    return [("", folder), *((f" ({part.name})", part) for part in sorted(folder.glob("concepts/*")))]


def _over_steps(folder: Path, key: str, smoothed: bool = True) -> str:
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if key in row and row.get("step") is not None]
    return curve([row["step"] for row in rows], [row[key] for row in rows], key, smoothed)


def _cost(results: Mapping[str, Any]) -> list[tuple[str, Any]]:
    trained = results.get("trainable_parameters")
    cards: list[tuple[str, Any]] = [
        (f"{stage}, seconds", f"{float(value):.1f}") for stage, value in (results.get("seconds") or {}).items()
    ]
    cards += [(f"peak memory, {kind}", _bytes(value)) for kind, value in (results.get("peak_memory") or {}).items()]
    cards += [("trained parameters", f"{trained:,}".replace(",", "\N{THIN SPACE}") if trained is not None else None)]
    return cards


def _artifacts(folder: Path) -> page.Table:
    artifacts = sorted(path for path in folder.glob("artifacts/*") if path.is_file() and path.suffix != ".md")
    return page.Table(["artifact", "size"], [[path.name, _bytes(path.stat().st_size)] for path in artifacts])


def _environment(folder: Path) -> dict[str, Any]:
    """Where it ran, as cards, and the versions of its packages as text."""
    path = folder / "environment.json"
    if not path.is_file():
        return {"environment": [], "packages": ""}
    values = json.loads(path.read_text(encoding="utf-8"))
    git = values.get("git") or {}
    state = git.get("commit", "")[:12] + (" with local changes" if git.get("dirty") else "")
    plain = {"commit": state, **{key: values.get(key) for key in ("hiperlab", "python", "device", "platform")}}
    versions = "\n".join(f"{name} {version}" for name, version in (values.get("packages") or {}).items() if version)
    return {"environment": list(plain.items()), "packages": versions}


def _number(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.3f}"


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
