"""What the exported folder says about itself: card.json for programs, README.md for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hiperlab import files
from hiperlab.miniature.plan import Workshop
from hiperlab.report.environment import environment


def write(shop: Workshop, folder: Path, records: Mapping[str, Mapping[str, Any]]) -> None:
    """Write both files.

    Args:
        shop: of the training.
        folder: the export.
        records: stage.json of every stage that was begun.
    """
    keep = ("status", "steps", "samples", "seconds", "device", "settings", "check")
    earlier = json.loads((shop.base / "card.json").read_text(encoding="utf-8"))
    # what was not trained here keeps the record of the miniature it came from
    stages = {name: {**found, "from_base": True} for name, found in earlier["stages"].items()}
    stages |= {name: {key: found[key] for key in keep if key in found} for name, found in records.items()}
    for found in stages.values():
        start = found.get("settings", {}).get("start")
        if start:  # a card travels, folders do not
            found["settings"] = {**found["settings"], "start": Path(start).name}
    known = {
        "name": "mini",
        "size": shop.size,
        "seed": shop.seed,
        "environment": {key: value for key, value in environment().items() if key != "command"},  # it names folders
        "commit": shop.settings.get("commit"),
        "note": shop.settings.get("note"),
        "stages": stages,
    }
    files.write_json(folder / "card.json", known)
    files.atomic_write(folder / "README.md", text(known))


def text(known: Mapping[str, Any]) -> str:
    """The card for people."""
    git = known["environment"]["git"]
    commit = (
        f"{git['commit'][:12]}{' with changes' if git['dirty'] else ''}" if git else f"{known['commit'] or 'unknown'}"
    )
    data = known["stages"].get("data", {}).get("check", {}).get("pictures", {})
    counts = ", ".join(f"{count} {name}" for name, count in data.items()) or "unknown"
    lines = [
        "# The miniature",
        "",
        f"A small Stable Diffusion for {known['size']} px pictures of hiperlab's procedural world, half precision. "
        "Plain `diffusers.StableDiffusionPipeline.from_pretrained(folder)` loads it; so does `model=pretrained "
        f"model.path=folder model.size={known['size']}`. It knows that world and nothing else.",
        "",
        f"- Data: drawn by `hiperlab.world` with seed {known['seed']} ({counts} pictures). `main`, `calm` (one camera) "
        "and `two` (two subjects) train the miniature, `judge` and `judge_two` (other subjects) its judges; `held` and "
        "`pairs` show subjects that nothing was trained on.",
        f"- Code: commit {commit}, torch {known['environment']['packages']['torch']}, "
        f"on {known['environment']['device']}.",
        "- Judges: `judges/clip` (open_clip's form), `judges/identity`, `judges/attributes`, trained on subjects of "
        "their own.",
        "- Names: `namer.safetensors` makes the vectors that stood for subjects in a share of the training's captions.",
        *([f"- Note: {known['note']}"] if known.get("note") else []),
        "- Scores measured from this folder alone: `report.md`, made by `stages=[report]`.",
        "",
        "| stage | ended by | steps | minutes | its own check |",
        "|---|---|---|---|---|",
    ]
    for name, found in known["stages"].items():
        ended = f"{found['status']}, earlier" if found.get("from_base") else found["status"]
        minutes = f"{found['seconds'] / 60:.1f}" if "seconds" in found else ""
        check = ", ".join(f"{key} {value}" for key, value in found.get("check", {}).items())
        lines.append(f"| {name} | {ended} | {found.get('steps', '')} | {minutes} | {check} |")
    return "\n".join(lines) + "\n"
