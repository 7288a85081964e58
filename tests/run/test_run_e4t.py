"""E4T through the door: a domain is pre-trained, one picture is tuned from its artifact, pictures need no data."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from hiperlab.data.images import to_pixels
from hiperlab.data.world import load_named
from hiperlab.run.main import main
from hiperlab.run.trainee import first_pictures, first_pixels
from tests.data.test_world_data import SETTINGS

SMALL = [
    "model=tiny", "model.size=64", "data.resolution=64", "logger=csv", "trainer=cpu", "fit.batch_size=2",
    "fit.checkpoint_every=2", "fit.sample_every=0", "sampler.steps=2", "sample.prompts=1", "sample.seeds=[0]",
]  # fmt: skip


def run(folder: Path, *overrides: str) -> list[dict]:
    assert main([*SMALL, *overrides, f"outputs_dir='{folder.parent}'", f"run_dir='{folder}'"]) == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def test_a_domain_then_one_picture(tmp_path) -> None:
    domain = tmp_path / "domain"
    steps = run(
        domain, "experiment=e4t_pretrain", "data=world_domain", "data.subjects=3", "stages=[fit]", "fit.steps=2",
        "method.export_files=true",
    )  # fmt: skip
    assert len(steps) == 2 and all(line["loss/reg"] > 0 for line in steps)
    learnt = domain / "artifacts" / "cat-domain.safetensors"
    one = tmp_path / "one"
    tuning = ["method=e4t", "data=cats", "method.tune=offsets", f"method.domain='{learnt}'"]
    assert len(run(one, *tuning, "stages=[fit,sample]", "fit.steps=1")) == 1
    start, tuned = load_file(learnt), load_file(one / "artifacts" / "cats.safetensors")
    assert start.keys() == tuned.keys()
    moved = (tuned["head.final_linear.weight"] - start["head.final_linear.weight"]).abs().max()
    assert 0 < moved < 1e-4, "one step from the domain"
    (cats,) = load_named("cats", **SETTINGS).concepts
    assert torch.equal(tuned["picture"], to_pixels(cats.views[0], 64, "squeeze", flip=False)), (
        "the first view, unmirrored"
    )
    assert len(list((one / "samples" / "cats").glob("*.png"))) == 1

    # A pre-trained checkpoint of the reimplementation brings no picture: the data's first one is encoded.
    theirs = learnt.parent / "cat-domain"
    (theirs / "domain.png").unlink()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    settings = ["method=e4t", "data=cats", "method.phase=pretrain", f"artifact='{theirs / 'weight_offsets.pt'}'"]
    assert main([*SMALL, *settings, "stages=[sample]", f"outputs_dir='{tmp_path}'", f"run_dir='{foreign}'"]) == 0
    assert len(list((foreign / "samples" / "cats").glob("*.png"))) == 1


def test_training_on_the_first_picture_alone() -> None:
    data = load_named(["cats", "puppy"], **SETTINGS)
    alone = first_pictures(data)
    assert [len(concept.views) for concept in alone.concepts] == [1, 1] and alone.flip == 0
    assert [len(concept.views) for concept in data.concepts] == [5, 5], "the scores still see all references"
    for before, after in zip(data.concepts, alone.concepts, strict=True):
        assert after.views[0] is before.views[0] and after.sources == before.sources[:1]
        assert first_pixels(alone, after, 64).shape == (3, 64, 64)
