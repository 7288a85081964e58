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


def said() -> dict[str, float]:
    """What its own report says."""
    return {row["key"]: row["value"] for row in json.loads((MINI / "report.json").read_text())}


def test_it_is_light_and_has_a_card() -> None:
    files = [path for path in MINI.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 45e6 and max(path.stat().st_size for path in files) <= 16e6
    assert not [path.name for path in files if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")], "safetensors only"
    card = json.loads((MINI / "card.json").read_text())
    assert card["size"] == 128 and card["environment"]["git"]["commit"]
    assert {"decoder", "unet", "identity", "reader", "scorer"} <= card["stages"].keys()
    assert "| what | measured |" in (MINI / "report.md").read_text()
    assert all(row["value"] is not None for row in json.loads((MINI / "report.json").read_text()))


def test_it_is_a_stable_diffusion_with_sixteen_cross_attentions() -> None:
    stack = pretrained("mini", "hiperlab:weights/mini", 128)
    assert stack.layers == 16 and stack.trained and stack.base.prediction_type == "v_prediction"
    assert stack.word_embedding("cat").shape == (stack.base.width,)


@pytest.fixture(scope="module")
def held() -> tuple:
    return report.drawn("held", 1, 100, 128)


def test_its_autoencoder_and_judges_see_held_out_pictures(held) -> None:
    """The bars are measured on 400 (report.md); here a hundred must come near what the report says."""
    pixels, labels = held
    pairs = report.drawn("pairs", 2, 80, 128)[0]
    found = report.measure_coding(MINI, pixels, pairs)
    for key, room in (("coded_psnr", 0.7), ("coded_identity", 0.02), ("coded_identity_worst", 0.02)):
        assert found[key] == pytest.approx(said()[key], abs=room)
    assert report.measure_reader(MINI, pixels, labels) == pytest.approx(said()["reader_accuracy"], abs=4)


def test_its_judges_load_as_encoders() -> None:
    identity = FolderIdentity("hiperlab:weights/mini/judges/identity").load("identity")
    reader = FolderReader("hiperlab:weights/mini/judges/attributes").load("reader")
    from hiperlab.world.subjects import views

    own, other = identity.images(views("cats", 128)), identity.images(views("robot", 128))
    assert (own @ own.T).mean() > (own @ other.T).mean() + 0.3
    assert reader.texts(["a photo of a cat on the beach"]).sum() == 5  # kind, place, plain style, light, nothing worn


def test_its_samples_show_what_prompts_say() -> None:
    """Twenty-two plain prompts in a fast sampling; the bars are measured on more, with 25 steps."""
    texts = {name: part[:22] for name, part in report.questions(132).items()}
    texts = {name: part if name == "plain" else part[:1] for name, part in texts.items()}
    pipe = report.load_pipeline(MINI, torch.device("cpu"))
    images = {name: report.sample(pipe, part, 15, 4.0, 22) for name, part in texts.items()}
    found = report.measure_samples(MINI, images, texts)
    assert found["plain_kind"] >= 80 and found["plain_place"] >= 90, found


def test_its_domain_of_cats_is_what_e4t_starts_from() -> None:
    path = MINI / "e4t" / "cat.safetensors"
    assert path.stat().st_size <= 8e6
    stack = pretrained("mini", "hiperlab:weights/mini", 128)
    kept = artifact.read(path)
    assert kept.subject.word == "cat" and kept.settings["phase"] == "pretrain"
    stack.base.check(kept.base, "the domain")
    method = build("e4t", stack, [SUBJECTS[0]], model_folder="hiperlab:weights/mini")
    assert SUBJECTS[0].word == "cat"
    weight = method.trainable_state()["head.final_linear.weight"][0]
    assert torch.equal(weight, kept.tensors["head.final_linear.weight"].float())
