"""LoRA, DreamBooth and Custom Diffusion against diffusers, PEFT and the authors' own file.

Items are named as in golden/lora/README.md; limits are ten times what it saw (methods/e4t.md, section 22).
"""

from __future__ import annotations

import pytest
import torch

from hiperlab import draws
from hiperlab.contract import Step, Subject
from hiperlab.data.batch import Batch
from hiperlab.method.dreambooth import DreamBooth
from hiperlab.method.lora import LoRA
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.offsets import added
from hiperlab.model.sampler import ddim, denoise
from hiperlab.prior import preserved
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


# ---- (i) DreamBooth --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def i(root):
    return golden.tensors(root / "i_dreambooth.safetensors")


def test_dreambooth_losses(i) -> None:
    for weight in (1.0, 0.5):
        losses = preserved(i["given.model_pred"], i["given.target"], weight)
        means = {name: value.mean() for name, value in losses.items()}
        close("i given.instance_loss", means[""], i["given.instance_loss"], 1e-6)
        close("i given.prior_loss", means["prior"] / weight, i["given.prior_loss"], 1e-6)
        close(f"i given.loss_w{weight}", sum(means.values()), i[f"given.loss_w{weight}"], 1e-6)


def test_dreambooth_step(twin, meta, i, monkeypatch) -> None:
    """The whole recorded step through `training_step`: prompts, one forward of four rows, clipping, AdamW."""
    recorded, settings = golden.pick(i, "step."), meta["i"]
    prior = {"weight": settings["prior_loss_weight"]}
    method = compose("dreambooth", twin, [SUBJECT], prior=prior, optimizer={"lr": settings["lr"]})
    assert isinstance(method, DreamBooth)
    assert [method.prior.prompt.replace("{}", "dog"), method.words] == [settings["prompts"][2], "sks dog"]
    seen: dict[str, torch.Tensor] = {}
    predict = type(twin).predict

    def watch(self, latents, timestep, conditioning):
        out = predict(self, latents, timestep, conditioning)
        seen.update(noisy_latents=latents, encoder_hidden_states=conditioning.keys[0], model_pred=out)
        return out

    method.prior.pictures(twin, "dog")  # drawn before the draws are replaced
    monkeypatch.setattr(type(twin), "predict", watch)
    monkeypatch.setattr(method, "clean_latents", lambda rows: recorded["latents"])
    monkeypatch.setattr(draws, "normal", lambda *_: recorded["noise"])
    monkeypatch.setattr(draws, "integers", lambda *_: recorded["timesteps"])
    texts = [prompt.replace("sks dog", "<dog>") for prompt in settings["prompts"]]
    assert torch.equal(twin.tokenize(settings["prompts"]).ids, recorded["input_ids"])
    two = torch.arange(2)
    batch = Batch(torch.zeros(2, 3, 128, 128), texts[:2], 0 * two, two, two, two.bool())
    loss = method.training_step(batch, 0)
    for name, value in seen.items():
        close(f"i step.{name}", value, recorded[name], 1e-5)
    close("i step.loss", loss, recorded["loss"], 1e-6)
    optimizer = method.configure_optimizers()
    group = optimizer.param_groups[0]
    for key in ("betas", "eps", "weight_decay"):
        assert (list(group[key]) if key == "betas" else group[key]) == settings[key], key
    loss.backward()
    gradients = [p.grad for p in method.parameters() if p.grad is not None]
    close("i step.grad_norm", torch.stack([g.norm() for g in gradients]).norm(), recorded["grad_norm"], 1e-5)
    before = {name: value.clone() for name, value in twin.unet.state_dict().items()}
    method.configure_gradient_clipping(optimizer, settings["max_grad_norm"])
    for name, value in golden.pick(recorded, "clipped_grad.").items():
        close("i step.clipped_grad", method.unet_offsets[name.replace(".", "/")].grad[0], value, 1.5e-4)
    optimizer.step()
    after = added(method.unet_offsets).weights(twin.unet)
    for name, value in golden.pick(recorded, "after.").items():
        assert torch.equal(before[name], recorded[f"before.{name}"]), "the twin is the recorded one"
        # AdamW's first step is a sign: where a gradient is near eps, rounding moves a weight by up to lr (section 21).
        golden.close("lora i step.after (absolute)", after[name], value, 1e-5, absolute=True)
        update, theirs = after[name] - before[name], value - before[name]
        apart = (update - theirs).norm() / theirs.norm()
        golden.close("lora i step.after (norm of update)", apart, torch.zeros(()), 1e-3, absolute=True)
    assert all(torch.equal(value, before[name]) for name, value in twin.unet.state_dict().items())
