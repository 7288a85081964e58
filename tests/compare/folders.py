"""Run folders as runs leave them, with made-up numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

PROMPTS = ("a photo of {}", "{} on the beach", "{} in the snow")
STAMP = {"protocol": "mini", "protocol_hash": "abc", "trained": True, "weights": "w"}
CONFIG = {
    "sampler": {"scheduler": "DDIMScheduler", "steps": 25, "guidance": 4.0}, "sample": {"seeds": [0], "batch_size": 8},
    "model": {"name": "mini", "path": "mini", "note": "n"}, "precision": {"unet": "float32", "vae": "float32"},
}  # fmt: skip


def run(
    folder: Path,
    method: str,
    scores: dict[str, float],
    *,
    data: str = "cats",
    concepts: Sequence[str] = ("cats",),
    prompts: Sequence[str] = PROMPTS,
    seeds: Sequence[int] = (0,),
    training_seed: int = 0,
    asked: Sequence[str] = (),
    steps: int = 100,
    pictures: bool = True,
    variant: str = "",
    spread: float = 0.01,
    config: dict[str, Any] | None = None,
    **stamp: Any,
) -> Path:
    """A finished run; a score grows by `spread` with each concept, prompt and seed."""
    (folder / "samples").mkdir(parents=True)
    rows, records = [], []
    for c, concept in enumerate(concepts):
        for p, prompt in enumerate(prompts):
            for s, seed in enumerate(seeds):
                path = f"samples/{c}_{p}_{seed}.png"
                shared = {"concept": concept, "prompt": prompt, "seed": seed, "variant": variant}
                records.append({**shared, "text": prompt.replace("{}", f"<{concept}>"), "path": path})
                if pictures:
                    Image.new("RGB", (16, 16), (60 * c % 256, 60 * p % 256, 60 * s % 256)).save(folder / path)
                for metric, value in scores.items():
                    lower = metric.endswith("distance")
                    number = {"metric": metric, "value": value + spread * (c + p + s), "lower_is_better": lower}
                    rows.append({"kind": "picture", **shared, "picture": path, **number, **STAMP, **stamp})
    write_lines(folder / "scores.jsonl", rows)
    write_lines(folder / "samples" / "samples.jsonl", records)
    (folder / "overrides.yaml").write_text(yaml.safe_dump([f"method={method}", f"data={data}", *asked]))
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | (config or {})))
    fit = {
        "train_seconds": 12.5 * len(concepts),
        "artifact_bytes": 4000 * len(concepts),
        "peak_memory": {"process": 1e9},
    }
    results = {
        "status": "finished", "method": method, "data": data, "model": "mini", "concepts": list(concepts),
        "seed": training_seed, "steps": steps, "trainable_parameters": 768 * len(concepts),
        "stages": {"fit": fit, "sample": {"seconds_per_picture": 0.5}},
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def change(file: Path, **values: Any) -> None:
    """Change columns of every line of a file of lines."""
    write_lines(file, [{**json.loads(line), **values} for line in file.read_text().splitlines()])
