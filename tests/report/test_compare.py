"""A sweep's comparison: runs of different seeds are one line, protocols never mix, pictures stand side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from hiperlab.errors import UserError
from hiperlab.report.compare import Job, compare


def job(
    folder: Path, method: str, seed: int, values: list[float], protocol_hash: str = "abc", trained: bool = True
) -> Job:
    (folder / "samples").mkdir(parents=True)
    rows, records = [], []
    for number, value in enumerate(values):
        path = f"samples/{number}.png"
        Image.new("RGB", (16, 16), (number * 40, 0, 0)).save(folder / path)
        shared = {"concept": "cats", "prompt": f"prompt {number} {{}}", "seed": 0, "variant": ""}
        stamp = {"protocol": "p", "protocol_hash": protocol_hash, "trained": trained, "weights": "w"}
        for metric in ("clip_text", "clip_text_copy"):
            rows.append({**shared, "picture": path, "metric": metric, "value": value, **stamp})
        records.append({**shared, "path": path})
    (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "samples" / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return Job({"method": method, "seed": str(seed)}, folder)


def test_seeds_are_pooled_and_settings_kept_apart(tmp_path) -> None:
    jobs = [
        job(tmp_path / "a", "ti", 0, [0.1, 0.3]),
        job(tmp_path / "b", "ti", 1, [0.2, 0.4]),
        job(tmp_path / "c", "neti", 0, [0.5, 0.5]),
    ]
    text = compare(tmp_path, jobs)
    lines = text.splitlines()
    assert lines[0].split() == ["method", "clip_text", "pictures"]
    ti, neti = lines[1].split(), lines[2].split()
    assert ti[0] == "ti" and ti[1] == "0.250" and ti[-1] == "4"
    assert neti[0] == "neti" and neti[1] == "0.500" and neti[-1] == "2"
    assert "UNTRAINED" not in text
    with Image.open(tmp_path / "comparison.png") as picture:
        assert picture.width > 3 * 16 and picture.height > 2 * 16
    assert "comparison.png" in (tmp_path / "comparison.html").read_text()
    assert {row["kind"] for row in json.loads((tmp_path / "comparison.json").read_text())} == {"concept", "all"}


def test_untrained_judges_and_mixed_protocols(tmp_path) -> None:
    assert "UNTRAINED" in compare(tmp_path, [job(tmp_path / "a", "ti", 0, [0.1], trained=False)])
    mixed = [job(tmp_path / "b", "ti", 0, [0.1]), job(tmp_path / "c", "neti", 0, [0.1], protocol_hash="other")]
    with pytest.raises(UserError, match="protocol"):
        compare(tmp_path, mixed)


def test_nothing_scored_says_nothing(tmp_path) -> None:
    assert compare(tmp_path, [Job({"method": "ti"}, tmp_path / "empty")]) == ""
