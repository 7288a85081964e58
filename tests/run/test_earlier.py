"""Runs and artifacts of November 2026 (tests/earlier): what can still be drawn is, what cannot says why."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hiperlab import __version__
from hiperlab.run import main as door
from tests.earlier import keep

EARLIER = Path(__file__).parents[1] / "earlier"


@pytest.fixture
def again(tmp_path, monkeypatch):
    """Call the command line on a copy of an earlier run."""
    monkeypatch.chdir(tmp_path)

    def call(name: str, *words: str) -> tuple[int, Path]:
        folder = tmp_path / name
        shutil.copytree(EARLIER / name, folder)
        return door.main([f"run_dir={folder}", *words]), folder

    return call


VERSIONS = sorted(path.name for path in EARLIER.iterdir() if re.fullmatch(r"\d+\.\d+\.\d+", path.name))


def test_every_release_has_a_run_to_resume() -> None:
    released = re.findall(r"^## \[?(\d+\.\d+\.\d+)", (EARLIER.parents[1] / "CHANGELOG.md").read_text(), re.M)
    assert {*released, __version__} <= {*VERSIONS}, "python -m tests.earlier.keep writes this version's"


@pytest.mark.parametrize("version", VERSIONS)
def test_a_run_of_an_earlier_version_is_resumed(version, again) -> None:
    """It stopped half way; gone on with by this version, it learns what the whole run learnt."""
    code, folder = again(version, "resume=auto")
    whole = load_file(EARLIER / version / "whole.safetensors")
    assert code == 0 and (folder / "metrics.jsonl").read_text().count('"loss"') == keep.WHOLE
    assert f"resuming from step-{keep.HALF:06d}" in (folder / "run.log").read_text()
    found = load_file(folder / "artifacts" / "cats.safetensors")
    assert found.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=0)
        assert value.abs().max() > 1e-3, "a tolerance that sees a difference"


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_an_earlier_run_draws_what_it_drew(again) -> None:
    code, folder = again("lora_tiny", "stages=[sample,summary]", "sample.prompts=1")
    assert code == 0
    kept = EARLIER / "lora_tiny" / "samples" / "cats" / "00_0.png"
    assert np.abs(pixels(folder / "samples" / "cats" / "00_0.png") - pixels(kept)).max() <= 1


def test_an_artifact_whose_settings_have_earlier_names_loads(again, tmp_path) -> None:
    """Its settings name `hiperlab.editing.PromptToPrompt`, and its tensors `place` and `made`."""
    code, folder = again("null_text_tiny", "stages=[sample,summary]", "sample.seeds=[1]")
    assert code == 0 and len(list((folder / "samples" / "standing_dog").glob("*_1.png"))) == 2


def test_earlier_settings_build_the_method_again(tmp_path, monkeypatch) -> None:
    """Drawn together, concepts are built from the settings they were kept with: these name `hiperlab.prior.Prior`."""
    monkeypatch.chdir(tmp_path)
    kept = EARLIER / "lora_tiny" / "artifacts" / "cats.safetensors"
    words = [f"artifacts=[{kept}]", 'sample.texts=["a photo of a <cats>"]', "model=tiny", "stages=[sample]"]
    assert door.main([*words, "sample.seeds=[0]", "sampler.steps=2", "logger=csv", "run_dir=run"]) == 0
    assert len(list((tmp_path / "run" / "samples").rglob("*.png"))) == 1


def test_what_the_first_miniature_learnt_is_refused_by_name(again, capsys) -> None:
    code, _ = again("ti_mini", "stages=[sample]", "sample.seeds=[1]")
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and "the first miniature (64 px, predicts noise)" in said and "Train it again" in said
