"""Encoders: preprocessing, determinism, weights that are wrong or absent."""

import dataclasses
import json
import time
from pathlib import Path

import huggingface_hub
import open_clip
import pytest
import timm
import torch
from huggingface_hub import constants
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors.torch import save_file

from hiperlab.errors import UserError
from hiperlab.hub import hub_problem
from hiperlab.metric import weights
from hiperlab.metric.encoder import FolderClip, HubClip, HubSigLip, HubVision
from hiperlab.metric.extractor import content
from hiperlab.metric.preprocess import Preprocess, make_transform
from hiperlab.metric.random_weights import RandomClip
from hiperlab.metric.weights import MissingWeightsError, hub_file
from tests.metric.conftest import load_protocol, noise

CLIP_CFG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch):
    """An empty hub cache and no connection."""
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # whatever the environment says
    hub_problem.cache_clear()
    yield
    hub_problem.cache_clear()


@pytest.mark.parametrize("size", [(224, 224), (512, 512), (300, 500), (90, 61)])
def test_preprocessing_is_open_clips_own(size: tuple[int, int]) -> None:
    ours = load_protocol("dreambooth").encoders["clip"]
    assert isinstance(ours, HubClip)
    theirs = image_transform_v2(PreprocessCfg(size=224), is_train=False)
    picture = noise(3, size)
    torch.testing.assert_close(make_transform(ours.preprocess)(picture), theirs(picture), rtol=0, atol=0)


def test_dino_sees_resize_256_crop_224() -> None:
    ours = load_protocol("dreambooth").encoders["dino"]
    assert isinstance(ours, HubVision)
    pixels = make_transform(ours.preprocess)(noise(4, (512, 400)))
    assert pixels.shape == (3, 224, 224)
    assert timm.models.get_pretrained_cfg(ours.model).mean == ours.preprocess.mean  # type: ignore[union-attr]


def test_twin_is_deterministic_and_leaves_the_global_state_alone() -> None:
    twin = load_protocol("twin")
    before = torch.get_rng_state()
    one, two = (load_protocol("twin").load("clip") for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert one.weights == two.weights != twin.load("dino").weights
    assert torch.equal(one.images([noise(1)]), two.images([noise(1)]))
    assert torch.equal(one.texts(["a cat"]), two.texts(["a cat"]))
    assert not torch.equal(one.texts(["a cat"]), one.texts(["a dog"]))
    assert load_protocol("twin", encoders={"clip": {"seed": 1}}).load("clip").weights != one.weights
    assert not any(parameter.requires_grad for parameter in one.parameters())


def test_embeddings_do_not_depend_on_the_batch_or_autocast(twin) -> None:
    pictures = [noise(i) for i in range(5)]
    for key in twin.encoders:
        features = twin.load(key)
        whole = features.images(pictures)
        torch.testing.assert_close(whole.norm(dim=-1), torch.ones(5))
        torch.testing.assert_close(torch.cat([features.images([p]) for p in pictures]), whole, rtol=0, atol=1e-6)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(features.images(pictures), whole)


def test_a_runs_precision_neither_moves_a_score_nor_is_moved(twin) -> None:
    features = twin.load("clip")
    plain = features.images([noise(1)])
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(features.images([noise(1)]), plain)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_a_folder_with_a_clip(tmp_path: Path, flat: bool, ending: str) -> None:
    network = open_clip.CLIP(**CLIP_CFG)
    config = CLIP_CFG if flat else {"model_cfg": CLIP_CFG, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    if ending == "safetensors":
        save_file(network.state_dict(), tmp_path / "m.safetensors")
    else:
        torch.save(network.state_dict(), tmp_path / "m.pt")
    features = FolderClip(path=str(tmp_path)).load("metric.encoders.clip")
    cfg = PreprocessCfg(size=32) if flat else PreprocessCfg(size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
    pixels = image_transform_v2(cfg, is_train=False)(noise(1))[None]
    with torch.no_grad():
        torch.testing.assert_close(features.images([noise(1)]), network.eval().encode_image(pixels, normalize=True))
        tokens = open_clip.tokenize(["a cat"])
        torch.testing.assert_close(features.texts(["a cat"]), network.encode_text(tokens, normalize=True))


def test_a_timm_encoder_from_local_files(tmp_path: Path) -> None:
    dino = load_protocol("dreambooth").encoders["dino"]
    assert isinstance(dino, HubVision)
    tiny = dataclasses.replace(dino, model="vit_tiny_patch16_224.augreg_in21k")  # a quarter of the time
    network = timm.create_model(tiny.model, num_classes=0)
    for file, write in (("a.safetensors", save_file), ("b.pth", torch.save)):
        write(network.state_dict(), str(tmp_path / file))
    loaded = [HubVision(tiny.model, str(tmp_path / f), tiny.preprocess).load("k") for f in ("a.safetensors", "b.pth")]
    assert loaded[0].weights == loaded[1].weights  # the same tensors in another file are the same judge
    pixels = make_transform(tiny.preprocess)(noise(2))[None]
    with torch.no_grad():
        expected = torch.nn.functional.normalize(network.eval()(pixels), dim=-1)
    torch.testing.assert_close(loaded[0].images([noise(2)]), expected)


def test_content_names_tensors_and_settings() -> None:
    layer = torch.nn.Linear(2, 2)
    before = content(layer)
    assert before == content(layer) != content(layer, "other transform")
    with torch.no_grad():
        layer.weight[0, 0] += 1
    assert content(layer) != before


def test_missing_weights_say_in_one_line_what_to_do(no_hub: None) -> None:
    start = time.monotonic()
    messages = load_protocol("dreambooth").fetch()
    assert time.monotonic() - start < 20
    assert len(messages) == 2
    for words in ("clip_text, clip_image (dreambooth)", "ViT-B-32-quickgelu/openai", "open_clip_model.safetensors",
                  "timm/vit_base_patch32_clip_224.openai", "metric.encoders.clip.path=", "no connection"):  # fmt: skip
        assert words in messages[0]
    assert "metric.encoders.dino.path=" in messages[1] and "\n" not in "".join(messages)
    with pytest.raises(MissingWeightsError):
        load_protocol("dreambooth").load("dino")


def test_offline_is_not_even_tried(monkeypatch: pytest.MonkeyPatch, no_hub: None) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MissingWeightsError, match="HF_HUB_OFFLINE is set"):
        hub_file("a/b", ["model.safetensors"], "b", "metric.encoders.b.path")


def test_the_cache_comes_before_the_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cached = {"second.bin": str(tmp_path / "second.bin")}
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, name: cached.get(name))
    monkeypatch.setattr(weights, "hub_problem", lambda: pytest.fail("asked the hub"))
    assert hub_file("a/b", ["first.safetensors", "second.bin"], "b", "k") == tmp_path / "second.bin"


def test_a_hub_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch, no_hub: None) -> None:
    class Silent:
        def head(self, *_, **__):
            time.sleep(3)

    monkeypatch.setattr(huggingface_hub, "get_session", lambda: Silent())
    monkeypatch.setattr("hiperlab.hub.PROBE_SECONDS", 0.2)
    assert "did not answer" in (hub_problem() or "")


def test_wrong_names_and_files_are_named(tmp_path: Path) -> None:
    pre = Preprocess(224, 224, "bicubic", (0.5,) * 3, (0.5,) * 3)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no")
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, other)
    (tmp_path / "two").mkdir()
    for name in "ab":
        save_file({"x": torch.zeros(1)}, tmp_path / "two" / f"{name}.safetensors")
    for encoder, words in (
        (HubClip("ViT-B-33", "openai", None, pre), "Did you mean"),
        (HubClip("ViT-B-32", "openia", None, pre), "Did you mean openai"),
        (HubClip("ViT-B-32", "openai", None, pre), "'-quickgelu'"),
        (HubClip("ViT-B-32-quickgelu", "openai", str(broken), pre), "does not hold ViT-B-32-quickgelu/openai"),
        (HubClip("ViT-B-32-quickgelu", "openai", str(tmp_path / "none"), pre), "does not exist"),
        (HubVision("vit_small_patch16_224.dino", str(other), pre), "does not hold vit_small_patch16_224.dino"),
        (HubVision("vit_small_patch16_224.dino", str(broken), pre), "cannot be read"),
        (HubVision("vit_small_patch16_224.dino", str(tmp_path / "two"), pre), "several checkpoints"),
        (HubVision("vit_smal_patch16_224.dino", None, pre), "Did you mean vit_small_patch16_224.dino"),
        (FolderClip(None), "metric.encoders.e.path=<folder>"),
        (FolderClip(str(tmp_path)), "open_clip_config.json"),
    ):
        with pytest.raises(UserError) as caught:
            encoder.load("metric.encoders.e")
        assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_twins_tokenizer_needs_no_connection(no_hub: None) -> None:
    pre = Preprocess(32, 32, "bicubic", (0.5,) * 3, (0.5,) * 3)
    assert RandomClip(seed=0, width=32, preprocess=pre).load("k").texts(["a cat"]).shape == (1, 32)


def test_a_siglip_with_a_tokenizer_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_hub: None) -> None:
    """A tiny one under a name of its own: weights and tokenizer from local files; without them one line each."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    config = {
        "embed_dim": 32, "init_logit_bias": -10, "vision_cfg": CLIP_CFG["vision_cfg"], "custom_text": True,
        "text_cfg": {**CLIP_CFG["text_cfg"], "context_length": 8, "vocab_size": 9, "hf_tokenizer_name": "some/tiny",
                     "tokenizer_kwargs": {"clean": "canonicalize"}},
    }  # fmt: skip
    (tmp_path / "tiny-siglip.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-siglip.json")
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda model, tag: {"hf_hub": "some/tiny/"})
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "cat": 2, "dog": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[UNK]").save_pretrained(
        tmp_path / "t"
    )
    torch.manual_seed(0)
    network = open_clip.create_model("tiny-siglip")
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    pre = Preprocess(32, 32, "bicubic", (0.5,) * 3, (0.5,) * 3)
    recipe = HubSigLip("tiny-siglip", "webli", str(tmp_path / "weights.safetensors"), pre, str(tmp_path / "t"))
    recipe.fetch("k")
    encoder = recipe.load("k")
    wanted = network.eval().encode_text(torch.tensor([[1, 2, 0, 0, 0, 0, 0, 0]]), normalize=True)
    torch.testing.assert_close(encoder.texts(["A cat."]), wanted.detach())
    assert recipe.settings() == dataclasses.replace(recipe, tokenizer=None, path=None).settings()
    with pytest.raises(MissingWeightsError, match=r"k\.tokenizer=.* holds no tokenizer\.json"):
        dataclasses.replace(recipe, tokenizer=str(tmp_path)).fetch("k")
    with pytest.raises(MissingWeightsError, match=r"tiny-siglip's tokenizer are not here .*set k\.tokenizer=<file>"):
        dataclasses.replace(recipe, tokenizer=None).fetch("k")


def test_dtis_models_are_known_by_these_names() -> None:
    protocol = load_protocol("dti")
    siglip, dino = protocol.encoders["siglip"], protocol.encoders["dinov2"]
    assert isinstance(siglip, HubSigLip) and isinstance(dino, HubVision)
    assert open_clip.get_pretrained_cfg(siglip.model, siglip.weights)["mean"] == siglip.preprocess.mean
    assert open_clip.get_model_config(siglip.model)["vision_cfg"]["image_size"] == siglip.preprocess.crop == 512
    for name in (dino.model, "vit_base_patch16_dinov3.lvd1689m"):
        assert timm.models.get_pretrained_cfg(name).hf_hub_id
