"""Methods of weights through the door: class pictures found again, runs resumed, other tools' files drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hiperlab.run.main import main

METHODS = ("lora", "dreambooth", "custom_diffusion")
SMALL = [
    "model=tiny", "model.size=64", "data.resolution=64", "logger=csv", "trainer=cpu", "fit.steps=3", "fit.batch_size=2",
    "fit.checkpoint_every=1", "fit.keep_checkpoints=true", "fit.sample_every=0", "sampler.steps=2", "sample.prompts=1",
    "sample.seeds=[0,1]", "method.prior.weight=1", "method.prior.count=2", "method.prior.steps=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("weights")


def run(folder: Path, name: str, *overrides: str) -> int:
    outputs = folder.parent
    weights = ["method.weights=cross"] if name == "dreambooth" else []
    return main([*SMALL, f"method={name}", *weights, *overrides, f"outputs_dir='{outputs}'", f"run_dir='{folder}'"])


@pytest.fixture(scope="module", params=METHODS)
def fitted(request, outputs) -> tuple[str, Path]:
    folder = outputs / request.param
    assert run(folder, request.param, "stages=[fit,sample]") == 0
    return request.param, folder


def test_it_trains_and_draws(fitted) -> None:
    name, folder = fitted
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line for line in lines if "loss" in line]
    assert len(losses) == 3 and all(line["loss/prior"] > 0 for line in losses)
    assert len(list((folder / "samples" / "cats").glob("*.png"))) == 2
    files = {path.relative_to(folder / "artifacts").as_posix() for path in (folder / "artifacts").rglob("*.*")}
    others = {
        "lora": [
            "cats/pytorch_lora_weights.safetensors",
            "cats/cats.safetensors",
            "cats/peft/adapter_model.safetensors",
        ],
        "dreambooth": [],
        "custom_diffusion": ["cats/delta.bin", "cats/pytorch_custom_diffusion_weights.bin", "cats/<cats>.bin"],
    }[name]
    assert files >= {"cats.safetensors", "README.md", *others}
    card = (folder / "artifacts" / "README.md").read_text()
    assert all(f"`{path}`" in card for path in others)


def test_class_pictures_are_shared(outputs, fitted) -> None:
    """LoRA and DreamBooth ask for the same ones; Custom Diffusion's caption and guidance are others."""
    found = sorted(path.parent.name for path in (outputs / "class_pictures").rglob("*.png"))
    assert len(found) == 2 * len(set(found)) and 1 <= len(set(found)) <= 2
    stamps = {path: path.stat().st_mtime_ns for path in (outputs / "class_pictures").rglob("*.png")}
    assert run(outputs / "again", fitted[0], "stages=[fit]", "fit.steps=1", "seed=5") == 0
    assert {path: path.stat().st_mtime_ns for path in (outputs / "class_pictures").rglob("*.png")} == stamps
    (outputs / "again").rename(outputs / f"again-{fitted[0]}")


def test_resumed_is_bit_identical(fitted, tmp_path) -> None:
    name, folder = fitted
    again = tmp_path / "run"
    assert run(again, name, "stages=[fit]", f"resume='{folder}/checkpoints/step-000001.ckpt'") == 0
    one, other = (load_file(path / "artifacts" / "cats.safetensors") for path in (folder, again))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("fitted", ["lora", "custom_diffusion"], indirect=True)
def test_other_tools_files_are_drawn(fitted, tmp_path) -> None:
    """The same picture from our artifact and from every exported file, with settings that do not fit it."""
    name, folder = fitted
    changes = ["method.rank=2"] if name == "lora" else []
    files = [path for path in (folder / "artifacts" / "cats").rglob("*.*") if path.suffix in (".safetensors", ".bin")]
    assert len(files) == 3
    for number, file in enumerate(files):
        place = tmp_path / str(number)
        place.mkdir()
        assert run(place, name, "stages=[sample]", f"artifact='{file}'", *changes) == 0
        for picture in (folder / "samples" / "cats").glob("*.png"):
            with Image.open(picture) as one, Image.open(place / "samples" / "cats" / picture.name) as two:
                apart = torch.tensor(list(one.tobytes())) - torch.tensor(list(two.tobytes()))
            assert int(apart.abs().max()) <= 1, file


def test_a_run_begun_one_by_one_goes_on_so(tmp_path, monkeypatch) -> None:
    """An earlier version trained LoRAs one after the other: their checkpoints lie in a folder each, and are found."""
    from hiperlab.method.lora import LoRA

    asked = ["stages=[fit]", "data.concepts=[cats,puppy]", "method.prior.weight=0"]
    monkeypatch.setattr(LoRA, "stacks_concepts", False)
    assert run(tmp_path / "run", "lora", *asked, "fit.steps=1") == 0
    monkeypatch.undo()
    assert run(tmp_path / "run", "lora", *asked, "fit.steps=2", "resume=auto") == 0
    said = (tmp_path / "run" / "run.log").read_text()
    assert "resuming from step-000001 of 2" in said and "2 trainings share their passes" in said
    assert not list((tmp_path / "run" / "checkpoints").glob("*.ckpt"))
    assert len(list((tmp_path / "run" / "checkpoints").glob("*/step-000002.ckpt"))) == 2


def test_several_concepts_share_passes(tmp_path) -> None:
    assert run(tmp_path / "run", "lora", "stages=[fit,sample]", "data.concepts=[cats,puppy]", "fit.steps=1") == 0
    assert {path.stem for path in (tmp_path / "run" / "artifacts").glob("*.safetensors")} == {"cats", "puppy"}
    words = {path.parent.name.split("-")[0] for path in (tmp_path / "class_pictures").rglob("*.png")}
    assert words == {"cat", "dog"}
    assert (tmp_path / "run" / "checkpoints" / "step-000001.ckpt").is_file(), "one training"
