"""Edit methods through the door: on concept data, resumed in any phase, and from the authors' files."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hiperlab.base import artifact
from hiperlab.data.concept import Concept, Edit
from hiperlab.data.dataset import DataSet
from hiperlab.data.edit import as_edits, at_most, edit_concept
from hiperlab.run.main import main
from hiperlab.run.session import _warn_of_plain_prompts

SMALL = [
    "model=tiny", "model.size=64", "data.resolution=64", "logger=csv", "trainer=cpu", "fit.steps=4",
    "fit.checkpoint_every=1", "fit.keep_checkpoints=true", "fit.sample_every=0", "sampler.steps=2", "sample.prompts=2",
    "sample.seeds=[0,1]",
]  # fmt: skip


def run(folder: Path, *overrides: str) -> int:
    return main([*SMALL, *overrides, f"run_dir='{folder}'"])


@pytest.fixture(scope="module")
def hiper(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("edit") / "hiper"
    assert (
        run(folder, "method=hiper", "method.export_every=2", "stages=[fit,sample,summary]", "fit.sample_every=2") == 0
    )
    return folder


@pytest.fixture(scope="module")
def imagic(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("edit") / "imagic"
    assert run(folder, "method=imagic", "method.embedding_share=0.5", "stages=[fit,sample]") == 0
    return folder


def test_hiper_learns_the_first_view(hiper) -> None:
    found = artifact.read(hiper / "artifacts" / "cats.safetensors")
    assert found.subject.source == "a photo of a cat" and found.steps == 4
    assert found.subject.targets and not any("<cats>" in text for text in found.subject.targets)
    assert found.tensors["hiper"].shape == (5, 32)
    names = sorted(path.name for path in (hiper / "artifacts" / "cats").iterdir())
    assert names == [f"hiper_embeddings_step{k}.pt" for k in (0, 2, 3)], "after 1 and 3 updates, and the last"
    last = torch.load(hiper / "artifacts" / "cats" / "hiper_embeddings_step3.pt", weights_only=True)
    assert torch.equal(last[0], found.tensors["hiper"])
    assert len(list((hiper / "samples" / "cats").glob("*.png"))) >= 4
    assert (hiper / "grids" / "train-000002.png").is_file()


def test_every_step_sees_the_same_latents(hiper) -> None:
    """The losses of a run differ by noise and timestep only; the checkpoint holds 160 numbers and two Adam moments."""
    lines = [json.loads(line) for line in (hiper / "metrics.jsonl").read_text().splitlines()]
    assert len([line for line in lines if "loss" in line]) == 4
    checkpoint = torch.load(hiper / "checkpoints" / "step-000004.ckpt", weights_only=True)
    assert {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()} == {"hiper": (1, 5, 32)}


def test_scales_are_drawn_from_one_fit(hiper) -> None:
    assert main(["stages=[sample]", "method.scale_edit=[0.8,30.0]", f"run_dir='{hiper}'"]) == 0
    records = [json.loads(line) for line in (hiper / "samples" / "samples.jsonl").read_text().splitlines()]
    assert {record["variant"] for record in records} == {"scale=0.8", "scale=30.0"}
    edits = [record for record in records if record["text"] != "a photo of a <cats>"]  # the source text has no scale
    pair = {each["variant"]: each for each in edits if each["text"] == edits[0]["text"] and each["seed"] == 0}
    with Image.open(hiper / pair["scale=0.8"]["path"]) as one, Image.open(hiper / pair["scale=30.0"]["path"]) as two:
        assert one.tobytes() != two.tobytes()


def test_authors_file_is_sampled(hiper, tmp_path) -> None:
    """An earlier step's file of the authors' form, as they choose steps by looking."""
    file = hiper / "artifacts" / "cats" / "hiper_embeddings_step3.pt"
    own = hiper / "artifacts" / "cats.safetensors"
    for name, path in (("theirs", file), ("ours", own)):
        (tmp_path / name).mkdir()
        assert run(tmp_path / name, "method=hiper", "stages=[sample]", f"artifact='{path}'") == 0
    pictures = sorted(path.relative_to(tmp_path / "ours") for path in (tmp_path / "ours" / "samples").rglob("*.png"))
    assert pictures
    for picture in pictures:
        with Image.open(tmp_path / "theirs" / picture) as one, Image.open(tmp_path / "ours" / picture) as other:
            assert one.tobytes() == other.tobytes()


def test_imagic_fits_one_target_at_a_time(imagic) -> None:
    targets = []
    for number in (0, 1):
        found = artifact.read(imagic / "artifacts" / f"cats-{number}.safetensors")
        assert found.subject.placeholder == f"<cats-{number}>" and found.subject.source == "a photo of a cat"
        targets += found.subject.targets
        moved = [name for name, value in found.tensors.items() if name.startswith("offsets.") and bool(value.any())]
        assert len(moved) == 80, "phase B was reached"
    assert len(set(targets)) == 2
    assert not (imagic / "artifacts" / "cats-2.safetensors").exists(), "no fit for a text that is not drawn"
    assert len(list((imagic / "samples" / "cats-0").glob("*eta-0.6.png"))) >= 2


@pytest.mark.parametrize(("name", "step"), [("hiper", 2), ("imagic", 1), ("imagic", 3)])
def test_resumed_is_bit_identical(name, step, hiper, imagic, tmp_path) -> None:
    """From before and after Imagic's change of phase."""
    folder = tmp_path / "run"
    shared = ["stages=[fit]", f"method={name}", "sample.prompts=1"]
    shared += ["method.embedding_share=0.5"] if name == "imagic" else []
    assert run(folder, *shared) == 0
    (concept,) = [path.stem for path in (folder / "artifacts").glob("*.safetensors")]
    whole = load_file(folder / "artifacts" / f"{concept}.safetensors")
    (folder / "artifacts" / f"{concept}.safetensors").unlink()
    assert run(folder, *shared, f"resume='{folder}/checkpoints/step-{step:06d}.ckpt'") == 0
    again = load_file(folder / "artifacts" / f"{concept}.safetensors")
    assert whole.keys() == again.keys() and all(torch.equal(whole[key], again[key]) for key in whole)


def dog() -> DataSet:
    picture = Image.new("RGB", (64, 64))
    edit = Edit("a standing dog", ("a sitting dog", "a cat on a sofa", "a dog"))
    return DataSet((edit_concept("rex", "<rex>", "dog", picture, "rex.png", edit),), "squeeze", 0.0)


def test_texts_without_the_noun_are_named(caplog) -> None:
    with caplog.at_level(logging.WARNING):
        _warn_of_plain_prompts(dog())
    assert "a cat on a sofa" in caplog.text and "a sitting" not in caplog.text and "unpersonalised" in caplog.text


def test_the_noun_is_not_said_twice() -> None:
    """With data.class_noun=prompts a concept's prompts are "a {} dog on a sofa"."""
    picture = Image.new("RGB", (64, 64))
    concept = Concept("rex", "<rex>", "dog", (picture,), ("a",), ("a photo of {}",), ("a {} dog on a sofa", "a {}"))
    (made,) = as_edits(DataSet((concept,), "squeeze", 0.0)).concepts
    assert made.edit and made.edit.targets == ("a dog on a sofa", "a dog")
    assert made.prompts == ("a {} on a sofa", "a {}")


def test_first_targets_only() -> None:
    (kept,) = at_most(dog(), 2).concepts
    assert kept.edit and kept.edit.targets == ("a sitting dog", "a cat on a sofa")
    assert kept.prompts == ("a sitting {}", "a cat on a sofa")
    assert len(at_most(dog(), None).concepts[0].prompts) == 3
