"""Whatever lies in a run folder in the place of what a run wrote: one line that names the file, never a traceback."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest

from hiperlab.run.main import main

JOB = [
    "method=ti", "model=tiny", "model.size=64", "data=cats", "data.resolution=64", "logger=csv", "trainer=cpu",
    "fit.steps=1", "fit.sample_every=0", "sampler.steps=1", "sample.prompts=1", "sample.seeds=[0]",
]  # fmt: skip
GARBAGE = {
    "random": os.urandom(300),
    "list": b"[]",
    "table": b'{"a": [1, {"b": null}]}\n',
    "half": None,
}
FILES = (
    ".lock", "artifacts/cats.safetensors", "checkpoints/config.yaml", "checkpoints/pictures.json",
    "checkpoints/step-000001.ckpt", "checkpoints/step-000001.ckpt.sha256", "metrics.jsonl", "overrides.yaml",
    "results.json", "samples/cats/00_0.png", "samples/samples.jsonl", "scores.jsonl",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main([*JOB, f"run_dir='{folder}'"]) == 0
    return folder


@pytest.mark.parametrize("kind", GARBAGE)
@pytest.mark.parametrize("name", FILES)
def test_garbage_in_its_place(finished, tmp_path, capsys, name, kind) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    path = folder / name
    content = GARBAGE[kind]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content is None else content)
    for stages in (["stages=[sample,score,summary]"], ["resume=auto", "fit.steps=2", "stages=[fit]"]):
        for handler in list(logging.getLogger().handlers):
            logging.getLogger().removeHandler(handler)
        code = main([*stages, f"run_dir='{folder}'"])
        err = capsys.readouterr().err
        assert code in (0, 2) and "Traceback" not in err, (stages, err[-600:])
