"""LoRA, DreamBooth and Custom Diffusion against diffusers, PEFT and the authors' own file.

Items are named as in golden/lora/README.md; limits are ten times the errors of a second implementation. The
committed slice holds one layer, the text encoder's LoRA and the losses: its twin has another U-Net.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.func import functional_call

from hiperlab import draws
from hiperlab.base.method import Step, Subject
from hiperlab.base.prior_preservation import preserved
from hiperlab.data.batch import Batch
from hiperlab.method.custom_diffusion import CustomDiffusion, masked_loss
from hiperlab.method.dreambooth import DreamBooth
from hiperlab.method.lora import LoRA
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.offsets import LowRank, added
from hiperlab.model.sampler import ddim, denoise
from tests.composed import build as compose
from tests.parity import golden

GOLDEN = "lora"
ZERO = torch.zeros(1, dtype=torch.long)


def close(item: str, ours, theirs, limit: float) -> None:
    golden.close(f"lora {item}", ours, theirs, limit)


@pytest.fixture(scope="module")
def twin(source):
    return golden.twin(128, source)


def file(root: Path, pattern: str) -> Path:
    """The one file of a pattern."""
    found = sorted(root.glob(pattern))
    if not found:
        pytest.skip(f"{pattern} is not in the committed slice; the full golden folder has it")
    (path,) = found
    return path


def item(values: dict[str, torch.Tensor], name: str) -> str:
    """The tensor's name; where it ends in "*", the one that begins so (a name may hold the recorded alpha)."""
    if not name.endswith("*"):
        return name
    found = [key for key in values if key.startswith(name[:-1])]
    if not found:
        pytest.skip(f"{name} is not in the committed slice; the full golden folder has it")
    (key,) = found
    return key


@pytest.fixture(scope="module")
def words(meta) -> str:
    """The rare token and the class noun: what the recorded instance prompt has in the place of the class noun."""
    instance, noun = (meta["i"]["prompts"][number].split() for number in (0, -1))
    return " ".join(instance[len(noun) - 1 :])


@pytest.fixture(scope="module")
def subject(words) -> Subject:
    return Subject("it", "<it>", words.split()[-1])


@pytest.fixture(scope="module")
def recorded(meta, words) -> dict:
    """Settings of both methods that the recorded prompts tell."""
    noun = words.split()[-1]
    prompt = meta["i"]["prompts"][-1].removesuffix(noun) + "{}"
    return {"identifier": words.removesuffix(f" {noun}"), "template": prompt, "prior": {"prompt": prompt}}


# ---- (h) LoRA --------------------------------------------------------------------------------------------------------

SAVED = "h_saved/pytorch_lora_weights.safetensors"
FILES = {  # file -> the U-Net's prediction it must give; "*" stands for the recorded alpha
    SAVED: "scale1",
    "h_saved_alpha*/pytorch_lora_weights.safetensors": "alpha*",
    "h_saved_unet_adapter/pytorch_lora_weights.safetensors": "scale1",
    "h_text_model_prefix.safetensors": "scale1",
    "h_old_diffusers.safetensors": "scale1",
    "h_kohya.safetensors": "kohya_alpha*",
}


@pytest.fixture(scope="module")
def h(root):
    return golden.tensors(root / "h_lora.safetensors")


@pytest.fixture(scope="module")
def lora(twin, meta, subject, recorded):
    """LoRA as recorded: `lora(path, **changes)`."""
    how = meta["h"]
    own = {"rank": how["rank"], "alpha": how["lora_alpha"], "targets": how["unet_targets"]}

    def build(path=None, **changes) -> LoRA:
        settings = {**own, "text_targets": how["text_targets"], **recorded, **changes}
        method = compose("lora", twin, [subject], **settings)
        assert isinstance(method, LoRA)
        if path:
            method.load_foreign(0, path)
        return method.eval()

    return build


def lora_prediction(method, h, strength=1.0):
    states = Conditioning(h["encoder_hidden_states"][None], offsets=method.offsets("unet", 0, strength))
    return method.model.predict(h["sample"], h["timesteps"], states)


def test_lora_settings_are_the_recorded_ones(lora, meta) -> None:
    method, h = lora(text_encoder=True), meta["h"]
    assert method.scale(0) == h["lora_alpha"] / h["rank"]
    count = {part: 2 * len(method.offsets(part, 0, 1.0).changes) for part in ("unet", "text")}
    assert count == {"unet": h["n_unet"], "text": h["n_text"]}


def test_lora_starts_from_the_bare_model(lora, h) -> None:
    with torch.no_grad():
        close("h noise_pred.base", lora_prediction(lora(), h), h["noise_pred.base"], 1e-5)


def test_lora_layer_alone(root, lora, twin, meta, h) -> None:
    weight = LowRank(h["layer.A"], h["layer.B"], meta["h"]["lora_alpha"] / meta["h"]["rank"]).apply(
        h["layer.base_weight"]
    )
    close("h layer.output", h["layer.input"] @ weight.T, h["layer.output"], 1e-5)
    change = lora(file(root, SAVED)).offsets("unet", 0, 1.0).changes[f"{meta['h']['layer']}.weight"]
    for ours, name in zip(change.tensors(), "AB", strict=True):
        assert torch.equal(ours, h[f"layer.{name}"])
    assert torch.equal(twin.unet.get_parameter(f"{meta['h']['layer']}.weight"), h["layer.base_weight"])


@pytest.mark.parametrize("name", FILES)
def test_lora_files(name, root, lora, h) -> None:
    """Every layout of the same A and B loads, with its alpha."""
    method = lora(file(root, name))
    with torch.no_grad():
        wanted = item(h, f"noise_pred.{FILES[name]}")
        close(f"h {wanted}", lora_prediction(method, h), h[wanted], 1e-5)
        assert not torch.allclose(h[wanted], h["noise_pred.base"], atol=1e-3)


def test_lora_strength(root, lora, h) -> None:
    for name in [name for name in h if name.startswith("noise_pred.scale")]:
        with torch.no_grad():
            ours = lora_prediction(lora(file(root, SAVED)), h, float(name.removeprefix("noise_pred.scale")))
        close(f"h {name}", ours, h[name], 1e-5)


def test_lora_gradients(root, lora, meta, h) -> None:
    method = lora(file(root, SAVED))
    loss = torch.nn.functional.mse_loss(lora_prediction(method, h), h["target"])
    close("h loss", loss, h["loss"], 1e-6)
    loss.backward()
    gradients = golden.pick(h, "grad.")
    assert len(gradients) == meta["h"]["n_unet"]
    for name, theirs in gradients.items():
        module, letter = name.removesuffix(".weight").rsplit(".lora_", 1)
        ours = (method.down if letter == "A" else method.up)[f"unet/{module}".replace(".", "/")].grad
        close(f"h grad lora_{letter}", ours[0], theirs, 1.5e-4)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        (SAVED, "text.hidden_states"),
        ("h_text_model_prefix.safetensors", "text.hidden_states"),
        ("h_kohya.safetensors", "text.hidden_states_kohya_alpha*"),
    ],
)
def test_lora_text(name, wanted, root, lora, twin, words, meta, h) -> None:
    prompt = meta["h"]["prompt"]
    assert torch.equal(twin.tokenize([prompt]).ids, h["text.input_ids"])
    with torch.no_grad():
        states = lora(file(root, name)).condition(Step([prompt.replace(words, "<it>")], ZERO, ZERO))
    wanted = item(h, wanted)
    close(f"h {wanted}", states.keys[0], h[wanted], 1e-5)


def test_lora_sampling(root, lora, twin, words, meta, h) -> None:
    """Both halves of guidance go through the changed text encoder, as in a pipeline with the adapter loaded."""
    method, how = lora(file(root, SAVED)), meta["h"]["sampling"]
    steps, guidance = how["steps"], how["guidance_scale"]
    with torch.no_grad():
        states = method.condition(Step([meta["h"]["prompt"].replace(words, "<it>")], ZERO, ZERO))
        empty = Conditioning(method.negative_condition(how["negative_prompt"], "", [0]).keys[0][None])
        latents = h["sampling.latents_in"]
        ours = denoise(twin, latents, ddim(steps, guidance).build(twin, steps), lambda t: states, empty, guidance)
    close("h sampling.latents_out", ours, h["sampling.latents_out"], 4e-5)


# ---- (i) DreamBooth --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def i(root):
    return golden.tensors(root / "i_dreambooth.safetensors")


def test_dreambooth_losses(i) -> None:
    names = [name for name in i if name.startswith("given.loss_w")]
    assert names or "given.model_pred" not in i
    for name in names:
        weight = float(name.removeprefix("given.loss_w"))
        losses = preserved(i["given.model_pred"], i["given.target"], weight)
        means = {name: value.mean() for name, value in losses.items()}
        close("i given.instance_loss", means[""], i["given.instance_loss"], 1e-6)
        close("i given.prior_loss", means["prior"] / weight, i["given.prior_loss"], 1e-6)
        close(f"i {name}", sum(means.values()), i[name], 1e-6)


def test_dreambooth_step(twin, meta, subject, words, recorded, i, monkeypatch) -> None:
    """The whole recorded step through `training_step`: prompts, one forward of four rows, clipping, AdamW."""
    settings, texts = meta["i"], recorded
    recorded = golden.pick(i, "step.")
    adam = {key: settings[key] for key in ("lr", "betas", "eps", "weight_decay")}
    prior = {**texts["prior"], "weight": settings["prior_loss_weight"]}
    method = compose("dreambooth", twin, [subject], **{**texts, "prior": prior}, optimizer=adam)
    assert isinstance(method, DreamBooth)
    rows = len(settings["prompts"]) // 2
    assert method.words == (words,) and method.prior.prompt.replace("{}", subject.word) == settings["prompts"][rows]
    seen: dict[str, torch.Tensor] = {}
    predict = type(twin).predict

    def watch(self, latents, timestep, conditioning):
        out = predict(self, latents, timestep, conditioning)
        seen.update(noisy_latents=latents, encoder_hidden_states=conditioning.keys[0], model_pred=out)
        return out

    method.prior.pictures(twin, subject.word)  # drawn before the draws are replaced
    monkeypatch.setattr(type(twin), "predict", watch)
    monkeypatch.setattr(method, "clean_latents", lambda rows: recorded["latents"])
    monkeypatch.setattr(draws, "normal", lambda *_: recorded["noise"])
    monkeypatch.setattr(draws, "integers", lambda *_: recorded["timesteps"])
    instance = [prompt.replace(words, "<it>") for prompt in settings["prompts"][:rows]]
    assert torch.equal(twin.tokenize(settings["prompts"]).ids, recorded["input_ids"])
    numbers = torch.arange(rows)
    pixels = torch.zeros(rows, 3, twin.size, twin.size)
    batch = Batch(pixels, instance, 0 * numbers, numbers, numbers, numbers.bool())
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
        # AdamW's first step is a sign: where a gradient is near eps, rounding moves a weight by up to lr.
        golden.close("lora i step.after (absolute)", after[name], value, 1e-5, absolute=True)
        update, theirs = after[name] - before[name], value - before[name]
        apart = (update - theirs).norm() / theirs.norm()
        golden.close("lora i step.after (norm of update)", apart, torch.zeros(()), 1e-3, absolute=True)
    assert all(torch.equal(value, before[name]) for name, value in twin.unet.state_dict().items())


# ---- (j) Custom Diffusion --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def j(root):
    return golden.tensors(root / "j_custom_diffusion.safetensors")


MODIFIER = "<new1>"  # the authors' fixed name of the first new word, in their files and in the files' names


def custom(twin, path=None) -> CustomDiffusion:
    method = compose("custom_diffusion", twin, [Subject("new1", MODIFIER, "cat")])
    assert isinstance(method, CustomDiffusion)
    if path:
        method.load_foreign(0, path)
    return method


def custom_prediction(method, j, states=None):
    states = j["encoder_hidden_states"] if states is None else states
    conditioning = Conditioning(states[None], offsets=method.offsets(), detach_first=True)
    return method.model.predict(j["sample"], j["timesteps"], conditioning)


def test_custom_diffusion_starts_from_the_bare_model(twin, j) -> None:
    with torch.no_grad():
        ours = custom_prediction(custom(twin), j)
        close("j noise_pred.at_start", ours, j["noise_pred.at_start"], 1e-5)
        bare = twin.predict(j["sample"], j["timesteps"], Conditioning(j["encoder_hidden_states"][None]))
    assert torch.equal(ours, bare)


FOLDER = "j_saved"


@pytest.mark.parametrize(
    "name",
    [
        "j_delta.bin",
        f"{FOLDER}/pytorch_custom_diffusion_weights.bin",
        f"{FOLDER}/pytorch_custom_diffusion_weights.safetensors",
        f"{FOLDER}/<new1>.bin",
        f"{FOLDER}/<new1>.safetensors",
    ],
)
def test_custom_diffusion_files(name, root, twin, j) -> None:
    method = custom(twin, file(root, name))
    with torch.no_grad():
        close("j noise_pred.trained", custom_prediction(method, j), j["noise_pred.trained"], 1e-5)
    assert torch.equal(method.word[0].detach(), j["modifier_embedding"])


def test_custom_diffusion_writes_the_same_files(root, meta, twin, tmp_path) -> None:
    """Entry by entry: the authors' file, diffusers' 48 entries of which 16 are empty, and the word."""
    method = custom(twin, file(root, "j_delta.bin"))
    delta, weights, word = method.export(0, tmp_path, steps=1)
    assert [delta.name, weights.name, word.name] == ["delta.bin", "pytorch_custom_diffusion_weights.bin", "<new1>.bin"]

    def load(path):
        return torch.load(path, weights_only=True)

    ours, theirs = load(delta), load(file(root, "j_delta.bin"))
    assert ours.keys() == theirs.keys() and ours["unet"].keys() == theirs["unet"].keys()
    assert torch.equal(ours["modifier_token"]["<new1>"], theirs["modifier_token"]["<new1>"])
    for name, value in theirs["unet"].items():
        close("j delta.bin weights", ours["unet"][name], value.detach(), 1e-6)
    ours, theirs = load(weights), load(file(root, f"{FOLDER}/{weights.name}"))
    assert ours.keys() == theirs.keys() and len(ours) == meta["j"]["bin_keys"]
    assert sum(value == {} for value in ours.values() if isinstance(value, dict)) == meta["j"]["bin_empty"]
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            close("j weights.bin weights", ours[name], value.detach(), 1e-6)
    assert torch.equal(load(word)["<new1>"], load(file(root, f"{FOLDER}/<new1>.bin"))["<new1>"])


def test_custom_diffusion_gradients(root, twin, meta, j) -> None:
    """Of the masked loss, with keys and values of the first token detached: without that they differ by 7 %."""
    method = custom(twin, file(root, "j_delta.bin"))
    states = j["encoder_hidden_states"].clone().requires_grad_()
    loss = masked_loss(custom_prediction(method, j, states), j["target"], j["mask"]).mean()
    close("j masked_loss", loss, j["masked_loss"], 1e-6)
    loss.backward()
    close("j grad_encoder_hidden_states", states.grad, j["grad_encoder_hidden_states"], 1.5e-4)
    assert not states.grad[:, 0].any()
    gradients = golden.pick(j, "grad.")
    assert len(gradients) == meta["j"]["safetensors_keys"]
    for name, theirs in gradients.items():
        own = name.replace(".processor.", ".").replace("_custom_diffusion", "").replace(".", "/")
        close("j grad", method.kv[own].grad[0], theirs, 1.5e-4)


def test_custom_diffusion_masked_loss(j) -> None:
    """From the recorded prediction."""
    loss = masked_loss(j["noise_pred.trained"], j["target"], j["mask"]).mean()
    close("j masked_loss of the recorded prediction", loss, j["masked_loss"], 1e-6)


def test_custom_diffusion_attention_alone(root, twin, meta, j) -> None:
    method, name = custom(twin, file(root, "j_delta.bin")), meta["j"]["attn"]
    changed = {
        key.removeprefix(f"{name}."): value
        for key, value in method.offsets().weights(twin.unet).items()
        if key.startswith(f"{name}.")
    }
    assert changed.keys() == {"to_k.weight", "to_v.weight"}
    states = j["attn.encoder_hidden_states"].clone().requires_grad_()
    inputs = {"encoder_hidden_states": Conditioning(states[None], detach_first=True)}
    output = functional_call(twin.unet.get_submodule(name), changed, (j["attn.hidden_states"],), inputs)
    close("j attn.output", output, j["attn.output"], 1e-5)
    output.square().sum().backward()
    close("j attn.grad_encoder_hidden_states", states.grad, j["attn.grad_encoder_hidden_states"], 1.5e-4)
