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
from hiperlab.metric.score import REAL
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
    folder = Path(run_dir)
    name = " · ".join(str(results[key]) for key in ("method", "data", "model") if results.get(key)) or folder.name
    body = [
        f"<h1>{page.escape(name)}</h1>",
        f'<p class="soft">hiperlab run {page.escape(folder.name)}</p>',
        page.notes(list(notes)),
        _what(folder, results),
        page.section("Scores", _scores(results.get("scores") or aggregate(rows)), _per_prompt(rows)),
        page.section("Pictures", *_pictures(folder)),
        page.section("Training", *_losses(folder), *_training_samples(folder)),
        page.section("Cost", *_cost(folder, results)),
        _environment(folder),
    ]
    target = folder / "report.html"
    files.atomic_write(target, page.page(f"hiperlab: {name}", body))
    return target


def _what(folder: Path, results: Mapping[str, Any]) -> str:
    concepts = ", ".join(map(str, results.get("concepts") or ()))
    names = ("status", "method", "model", "data", "seed", "steps")
    command = str(results.get("command") or "")
    config = folder / "config.yaml"
    return page.section(
        "What was run",
        page.facts([*((name, results.get(name)) for name in names), ("concepts", concepts)]),
        f'<pre class="command">{page.escape(command)}</pre>' if command else "",
        page.details("Composed config", config.read_text(encoding="utf-8") if config.is_file() else ""),
    )


def _scores(scores: Sequence[Mapping[str, Any]]) -> str:
    """The table of `metric.table.aggregate`, further columns (such as a variant) first."""
    known = {"metric", "concept", "mean", "low", "high", "n", "missed", "ceiling"}
    known |= {
        "protocol",
        "protocol_hash",
        "trained",
        "weights",
        "lower_is_better",
    }  # said in the caption, or in the run's notes
    more = [name for name in (scores[0] if scores else ()) if name not in known]
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
            score.get("concept", ""),
        ]
        lines.append([*names, *numbers, _number(score.get("ceiling"))])
    protocols = sorted({f"{s['protocol']} ({s['protocol_hash']})" for s in scores if s.get("protocol")})
    caption = (
        (f"Protocol {', '.join(protocols)}. " if protocols else "")
        + "Mean over pictures; interval by bootstrap over prompts; missed: pictures a judge could not score. "
        + "↓ marks scores of which less is better. "
        + "Real pictures: the references scored against each other, about as high as a score can honestly get."
    )
    classes = ["total" if score.get("concept") == "all" else "" for score in scores]
    return page.table(head, lines, caption, classes)


def _per_prompt(rows: Sequence[Mapping[str, Any]]) -> str:
    """Means per concept and prompt, one column per metric, folded away."""
    values: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in rows:
        if row.get("prompt") and row.get("picture") != REAL and row.get("value") is not None:
            place = values.setdefault((str(row.get("concept", "")), str(row["prompt"])), {})
            place.setdefault(str(row.get("metric", "score")), []).append(float(row["value"]))
    metrics = sorted({metric for place in values.values() for metric in place})
    lines = [
        [concept, prompt, *(_number(fmean(place[metric])) if metric in place else "–" for metric in metrics)]
        for (concept, prompt), place in values.items()
    ]
    table = page.table(["concept", "prompt", *metrics], lines)
    return f"<details><summary>Per prompt</summary>{table}</details>" if table else ""


def _pictures(folder: Path) -> list[str]:
    """Every grid but those drawn while training."""
    paths = sorted(path for path in folder.glob("grids/*.png") if not path.name.startswith("train-"))
    return [page.figure(path, folder, path.stem) for path in paths]


def _training_samples(folder: Path, most: int = 8) -> list[str]:
    """A strip over steps: the first, the last and evenly chosen ones between."""
    paths = sorted([*folder.glob("grids/train-*.png"), *folder.glob("concepts/*/grids/train-*.png")])
    if not paths:
        return []
    count = min(most, len(paths))
    chosen = sorted({round(i * (len(paths) - 1) / max(1, count - 1)) for i in range(count)})
    steps = [(paths[i], int(paths[i].stem.removeprefix("train-"))) for i in chosen]
    left_out = f" ({len(paths)} were drawn, all are in grids/)" if len(chosen) < len(paths) else ""
    figures = [page.figure(path, folder, f"after {step} steps") for path, step in steps]
    return [f"<h3>Samples while training{left_out}</h3>", page.flow(figures)]


def _losses(folder: Path) -> list[str]:
    """The run's curve, or one per concept where they were trained one by one."""
    return [_loss(folder), *(_loss(part, f" ({part.name})") for part in sorted(folder.glob("concepts/*")))]


def _loss(folder: Path, whose: str = "") -> str:
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row and row.get("step") is not None]
    drawn = curve([row["step"] for row in rows], [row["loss"] for row in rows], "loss")
    if not drawn:
        return ""
    caption = f"Loss{page.escape(whose)} of each step (pale), running mean. It depends mostly on the timesteps drawn."
    return f"<figure>{drawn}<figcaption>{caption}</figcaption></figure>"


def _cost(folder: Path, results: Mapping[str, Any]) -> list[str]:
    seconds = results.get("seconds") or {}
    memory = results.get("peak_memory") or {}
    trained = results.get("trainable_parameters")
    artifacts = sorted(path for path in folder.glob("artifacts/*") if path.is_file() and path.suffix != ".md")
    cards: list[tuple[str, Any]] = [(f"{stage}, seconds", f"{float(value):.1f}") for stage, value in seconds.items()]
    cards += [(f"peak memory, {kind}", _bytes(value)) for kind, value in memory.items()]
    cards += [("trained parameters", f"{trained:,}".replace(",", "\N{THIN SPACE}") if trained is not None else None)]
    lines = [[path.name, _bytes(path.stat().st_size)] for path in artifacts]
    return [page.facts(cards), page.table(["artifact", "size"], lines)]


def _environment(folder: Path) -> str:
    path = folder / "environment.json"
    if not path.is_file():
        return ""
    values = json.loads(path.read_text(encoding="utf-8"))
    git = values.get("git") or {}
    state = git.get("commit", "")[:12] + (" with local changes" if git.get("dirty") else "")
    plain = {"commit": state, **{key: values.get(key) for key in ("hiperlab", "python", "device", "platform")}}
    versions = "\n".join(f"{name} {version}" for name, version in (values.get("packages") or {}).items() if version)
    return page.section("Environment", page.facts(plain.items()), page.details("Package versions", versions))


def _number(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.3f}"


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
