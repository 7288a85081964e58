"""LoRA, DreamBooth and Custom Diffusion against diffusers, PEFT and the authors' own file.

Items are named as in golden/lora/README.md; limits are ten times what it saw (methods/e4t.md, section 22).
"""

from __future__ import annotations

import pytest
import torch

from hiperlab.contract import Step, Subject
from hiperlab.method.lora import LoRA
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.sampler import ddim, denoise
from tests.composed import build as compose
from tests.parity import golden

ZERO = torch.zeros(1, dtype=torch.long)
SUBJECT = Subject("dog", "<dog>", "dog")


def close(item: str, ours, theirs, limit: float) -> None:
    golden.close(f"lora {item}", ours, theirs, limit)


@pytest.fixture(scope="module")
def root():
    return golden.folder("lora")


@pytest.fixture(scope="module")
def meta(root):
    return golden.config(root / "meta.json")


@pytest.fixture(scope="module")
def twin(root):
    return golden.twin(128, "golden")


# ---- (h) LoRA --------------------------------------------------------------------------------------------------------

SAVED = "h_saved/pytorch_lora_weights.safetensors"
FILES = {  # file -> the U-Net's prediction it must give
    SAVED: "scale1",
    "h_saved_alpha8/pytorch_lora_weights.safetensors": "alpha8",
    "h_saved_unet_adapter/pytorch_lora_weights.safetensors": "scale1",
    "h_text_model_prefix.safetensors": "scale1",
    "h_old_diffusers.safetensors": "scale1",
    "h_kohya.safetensors": "kohya_alpha2",
}


@pytest.fixture(scope="module")
def h(root):
    return golden.tensors(root / "h_lora.safetensors")


def lora(twin, path=None, **changes) -> LoRA:
    method = compose("lora", twin, [SUBJECT], **changes)
    assert isinstance(method, LoRA)
    if path:
        method.load_foreign(0, path)
    return method.eval()


def lora_prediction(method, h, strength=1.0):
    states = Conditioning(h["encoder_hidden_states"][None], offsets=method.offsets("unet", strength))
    return method.model.predict(h["sample"], h["timesteps"], states)


def test_lora_settings_are_the_recorded_ones(twin, meta) -> None:
    method, h = lora(twin, text_encoder=True), meta["h"]
    assert method.scale == h["lora_alpha"] / h["rank"] == 1
    count = {part: 2 * len(method.offsets(part, 1.0).changes) for part in ("unet", "text")}
    assert count == {"unet": h["n_unet"], "text": h["n_text"]}


def test_lora_starts_from_the_bare_model(twin, h) -> None:
    with torch.no_grad():
        close("h noise_pred.base", lora_prediction(lora(twin), h), h["noise_pred.base"], 1e-5)


def test_lora_layer_alone(root, twin, meta, h) -> None:
    name = f"{meta['h']['layer']}.weight"
    change = lora(twin, root / SAVED).offsets("unet", 1.0).changes[name]
    weight = change.apply(twin.unet.get_parameter(name))
    assert torch.equal(twin.unet.get_parameter(name), h["layer.base_weight"])
    close("h layer.output", h["layer.input"] @ weight.T, h["layer.output"], 1e-5)


@pytest.mark.parametrize("name", FILES)
def test_lora_files(name, root, twin, h) -> None:
    """Every layout of the same A and B loads, with its alpha."""
    method = lora(twin, root / name)
    with torch.no_grad():
        item = f"noise_pred.{FILES[name]}"
        close(f"h {item}", lora_prediction(method, h), h[item], 1e-5)
        assert not torch.allclose(h[item], h["noise_pred.base"], atol=1e-3)


def test_lora_strength(root, twin, h) -> None:
    with torch.no_grad():
        ours = lora_prediction(lora(twin, root / SAVED), h, 0.5)
    close("h noise_pred.scale0.5", ours, h["noise_pred.scale0.5"], 1e-5)


def test_lora_gradients(root, twin, h) -> None:
    method = lora(twin, root / SAVED)
    loss = torch.nn.functional.mse_loss(lora_prediction(method, h), h["target"])
    close("h loss", loss, h["loss"], 1e-6)
    loss.backward()
    gradients = golden.pick(h, "grad.")
    assert len(gradients) == 256
    for name, theirs in gradients.items():
        module, letter = name.removesuffix(".weight").rsplit(".lora_", 1)
        ours = (method.down if letter == "A" else method.up)[f"unet/{module}".replace(".", "/")].grad
        close(f"h grad lora_{letter}", ours[0], theirs, 1.5e-4)


@pytest.mark.parametrize(
    ("name", "item"),
    [
        (SAVED, "text.hidden_states"),
        ("h_text_model_prefix.safetensors", "text.hidden_states"),
        ("h_kohya.safetensors", "text.hidden_states_kohya_alpha2"),
    ],
)
def test_lora_text(name, item, root, twin, meta, h) -> None:
    prompt = meta["h"]["prompt"]
    assert torch.equal(twin.tokenize([prompt]).ids, h["text.input_ids"])
    with torch.no_grad():
        states = lora(twin, root / name).condition(Step([prompt.replace("sks dog", "<dog>")], ZERO, ZERO))
    close(f"h {item}", states.keys[0], h[item], 1e-5)


def test_lora_sampling(root, twin, meta, h) -> None:
    """Both halves of guidance go through the changed text encoder, as in a pipeline with the adapter loaded."""
    method, how = lora(twin, root / SAVED), meta["h"]["sampling"]
    steps, guidance = how["steps"], how["guidance_scale"]
    with torch.no_grad():
        states = method.condition(Step([meta["h"]["prompt"].replace("sks dog", "<dog>")], ZERO, ZERO))
        empty = Conditioning(method.encode_negative(how["negative_prompt"], "")[None])
        latents = h["sampling.latents_in"]
        ours = denoise(twin, latents, ddim(steps, guidance).build(twin, steps), lambda t: states, empty, guidance)
    close("h sampling.latents_out", ours, h["sampling.latents_out"], 4e-5)
