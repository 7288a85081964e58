"""The shipped miniature: it loads with the libraries it is laid out for, weighs what it may, is as good as it says."""

from __future__ import annotations

import json

import pytest
import torch

from hiperlab.base import artifact
from hiperlab.files import expand
from hiperlab.metric.world.recipe import FolderIdentity, FolderReader
from hiperlab.miniature import report
from hiperlab.model.load import pretrained
from tests.composed import SUBJECTS, build

MINI = expand("hiperlab:weights/mini")


def test_it_is_light_and_has_a_card() -> None:
    files = [path for path in MINI.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40e6
    assert not [path.name for path in files if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")], "safetensors only"
    card = json.loads((MINI / "card.json").read_text())
    assert card["size"] == 64 and card["commit"] and not card["missing_judges"]
    assert {"vae", "clip", "critic", "unet", "identity", "reader", "scorer"} <= card["stages"].keys()
    assert "| what | measured |" in (MINI / "report.md").read_text()
    assert all(row["value"] is not None for row in json.loads((MINI / "report.json").read_text()))


def test_it_is_a_stable_diffusion_with_sixteen_cross_attentions() -> None:
    stack = pretrained("mini", "hiperlab:weights/mini", 64)
    assert stack.layers == 16 and stack.trained and stack.base.prediction_type == "epsilon"
    assert stack.word_embedding("cat").shape == (stack.base.width,)


@pytest.fixture(scope="module")
def held() -> tuple:
    return report.drawn("held", 1, 100, 64)


def test_its_autoencoder_and_judges_see_held_out_pictures(held) -> None:
    """The bars are measured on 400 (report.md); here a hundred must come near what the report says."""
    pixels, captions, labels = held
    said = {row["key"]: row["value"] for row in json.loads((MINI / "report.json").read_text())}
    assert report.measure_vae(MINI, pixels) == pytest.approx(said["vae_psnr"], abs=0.7)
    assert report.measure_clip(MINI, pixels, captions) > said["clip_retrieval"] - 5  # of 100, not of 400: easier
    assert report.measure_reader(MINI, pixels, labels) == pytest.approx(said["reader_accuracy"], abs=4)


def test_its_judges_load_as_encoders() -> None:
    identity = FolderIdentity("hiperlab:weights/mini/judges/identity").load("identity")
    reader = FolderReader("hiperlab:weights/mini/judges/attributes").load("reader")
    from hiperlab.world.subjects import views

    own, other = identity.images(views("cats", 64)), identity.images(views("robot", 64))
    assert (own @ own.T).mean() > (own @ other.T).mean() + 0.3
    assert reader.texts(["a photo of a cat on the beach"]).sum() == 5  # kind, place, plain style, light, nothing worn


def test_its_samples_show_what_prompts_say() -> None:
    """Kind, place and style above chance (9, 9 and 12 %) in a fast sampling; the bars are measured with 50 steps."""
    texts = report.prompts(24)
    images = report.sample(report.load_pipeline(MINI, torch.device("cpu")), texts, 20, 5.0, 24)
    found = report.measure_samples(MINI, images, texts)
    assert found["sample_kind"] >= 50, found
    assert found["sample_place"] >= 80 and found["sample_style"] >= 60, found


def test_its_domain_of_cats_is_what_e4t_starts_from() -> None:
    path = MINI / "e4t" / "cat.safetensors"
    assert path.stat().st_size <= 8e6
    stack = pretrained("mini", "hiperlab:weights/mini", 64)
    kept = artifact.read(path)
    assert kept.subject.word == "cat" and kept.settings["phase"] == "pretrain" and kept.base == stack.base
    method = build("e4t", stack, [SUBJECTS[0]], model_folder="hiperlab:weights/mini")
    assert SUBJECTS[0].word == "cat"
    weight = method.own_tensors()["head.final_linear.weight"][0]
    assert torch.equal(weight, kept.tensors["head.final_linear.weight"].float())
