"""Loading from a folder: real layouts, v-prediction, and one clear line for each mistake."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler

from hiperlab.errors import UserError
from hiperlab.model.load import pretrained
from hiperlab.model.noise import add_noise, target
from hiperlab.model.tiny import tiny


@pytest.fixture(scope="module")
def folder(stack, tmp_path_factory):
    path = tmp_path_factory.mktemp("twin")
    stack.unet.save_pretrained(path / "unet")
    stack.vae.save_pretrained(path / "vae")
    stack.text.save_pretrained(path / "text_encoder")
    stack.tokenizer.save_pretrained(path / "tokenizer")
    DDIMScheduler.from_config(stack.scheduler_config).save_pretrained(path / "scheduler")
    return path


def test_folder_gives_the_same_stack(folder, stack) -> None:
    loaded = pretrained("copy", str(folder), size=128)
    for name, value in stack.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    loaded.base.check(stack.base, "an artifact")  # a copy under another name is the same base


def test_half_precision_copy_is_the_same_base(stack) -> None:
    half = tiny(seed=0, size=128)
    half.text.half()
    half.base.check(stack.base, "an artifact")


def test_v_prediction_folder(folder, tmp_path) -> None:
    copy = shutil.copytree(folder, tmp_path / "v")
    config = json.loads((copy / "scheduler" / "scheduler_config.json").read_text())
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps({**config, "prediction_type": "v_prediction"}))
    stack = pretrained("sd21-like", str(copy), size=128)
    assert stack.prediction_type == "v_prediction"
    z0, noise = torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16)
    t = torch.tensor([3, 900])
    velocity = stack.target(z0, noise, t)
    a = stack.alpha_bar[t][:, None, None, None]
    z_t = stack.add_noise(z0, noise, t)
    torch.testing.assert_close(a.sqrt() * z_t - (1 - a).sqrt() * velocity, z0, atol=1e-5, rtol=0)  # v gives back z0


def test_targets_by_hand() -> None:
    z0, noise, a = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 3.0), torch.tensor([0.64])
    assert add_noise(z0, noise, a).item() == pytest.approx(0.8 * 2 + 0.6 * 3)
    assert target(z0, noise, a, "v_prediction").item() == pytest.approx(0.8 * 3 - 0.6 * 2)
    assert target(z0, noise, a, "epsilon") is noise
    with pytest.raises(ValueError, match="epsilon or v_prediction"):
        target(z0, noise, a, "sample")


def test_mistakes(folder, tmp_path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        pretrained("x", str(tmp_path / "nowhere"), size=512)
    (tmp_path / "half" / "unet").mkdir(parents=True)
    with pytest.raises(UserError, match="lacks scheduler, tokenizer, text_encoder, vae/"):
        pretrained("x", str(tmp_path / "half"), size=512)
    with pytest.raises(UserError, match="not a multiple of 8"):
        pretrained("x", str(folder), size=100)
    copy = shutil.copytree(folder, tmp_path / "pickled")
    (copy / "unet" / "diffusion_pytorch_model.safetensors").rename(copy / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="no safetensors weights"):
        pretrained("x", str(copy), size=128)
    inpaint = shutil.copytree(folder, tmp_path / "inpaint")
    stack = tiny(seed=0, size=128)
    from diffusers import UNet2DConditionModel

    settings = {key: value for key, value in stack.unet.config.items() if not key.startswith("_")}
    UNet2DConditionModel(**{**settings, "in_channels": 9}).save_pretrained(inpaint / "unet")
    with pytest.raises(UserError, match="takes 9 channels"):
        pretrained("x", str(inpaint), size=128)


def test_unreachable_hub_is_one_line(monkeypatch) -> None:
    from hiperlab.hub import hub_problem

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub_problem.cache_clear()
    try:
        with pytest.raises(UserError, match=r"model\.path=nobody/nothing is not in the local hub cache") as caught:
            pretrained("x", "nobody/nothing", size=512)
    finally:
        hub_problem.cache_clear()
    assert "\n" not in str(caught.value) and "HF_HUB_OFFLINE" in str(caught.value)


def test_twin_is_a_function_of_its_seed() -> None:
    torch.manual_seed(5)
    one = tiny(seed=3, size=64).state_dict()
    after = torch.rand(1)
    torch.manual_seed(6)
    two = tiny(seed=3, size=64).state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after), "building it leaves the global random state alone"


def test_the_same_base_with_more_words_is_the_same_base(stack, tmp_path) -> None:
    """As diffusers' whole pipeline after Textual Inversion saves it; and a tokenizer that names no length."""
    grown = tiny(seed=0, size=128)
    grown.tokenizer.add_tokens([f"<new{number}>" for number in range(8)])
    grown.text.resize_token_embeddings(len(grown.tokenizer))
    grown.base.check(stack.base, "an artifact")
    stack.base.check(grown.base, "an artifact")


def test_a_tokenizer_that_names_no_length_has_the_text_encoders(folder, tmp_path) -> None:
    copy = shutil.copytree(folder, tmp_path / "unsaid")
    path = copy / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["model_max_length"]
    path.write_text(json.dumps(config))
    assert pretrained("copy", str(copy), size=128).tokenizer.model_max_length == 77


def test_a_single_file_is_called_one(tmp_path) -> None:
    (tmp_path / "v1-5.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"is a single file\. Convert it once"):
        pretrained("sd15", str(tmp_path / "v1-5.safetensors"), size=512)
