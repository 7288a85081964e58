"""Direct Consistency Optimization of LoRA against the authors' scripts. Items are named as in golden/dco/README.md.

Limits are its, absolute unless said. The committed slice holds predictions and losses, which no network reads.
Every number and text is read from the folder, so that another recorded set of the same form can be tried.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch
from PIL import Image

from hiperlab.base.method import Step, Subject
from hiperlab.data.images import to_pixels
from hiperlab.loss.dco import advantage, consistency_loss, min_snr
from hiperlab.method.lora import LoRA
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.noise import alphas_cumprod
from hiperlab.model.sampler import ddim, denoising_calls
from hiperlab.model.shared_calls import alone
from tests.composed import build as compose
from tests.parity import golden
from tests.parity.replay import texts

GOLDEN = "dco"


def close(item: str, ours, theirs, limit: float, absolute: bool = True) -> None:
    golden.close(f"dco {item}", torch.as_tensor(ours), theirs, limit, absolute=absolute)


@pytest.fixture(scope="module")
def stack(meta, source):
    if source == "slice":
        pytest.skip("the slice's twin has another U-Net")
    (size,) = {run["resolution"] for run in meta["runs"].values()}
    return golden.twin(size, source)


def learns(meta, run: str) -> bool:
    return bool(meta["runs"][run].get("train_text_encoder_ti"))


def build(stack, meta, run: str, **changes) -> LoRA:
    """LoRA as the recorded run was set."""
    how = meta["runs"][run]
    (matrices, *_) = how["adamw"]
    settings = {
        "loss": "dco",
        "dco": {
            "beta": how["dcoloss_beta"], "snr_gamma": how.get("snr_gamma"),
            "offset_noise": how.get("offset_noise", 0.0),
        },
        "rank": how["rank"], "alpha": how["lora_alpha"], "targets": meta["lora"]["targets"], "prior": {"weight": 0},
        "learn_word": learns(meta, run), "word_lr": how.get("text_encoder_lr", 1.0), "template": None,
        "optimizer": {
            "lr": matrices["lr"], "betas": matrices["betas"], "eps": matrices["eps"],
            "weight_decay": matrices["weight_decay"],
        },
    }  # fmt: skip
    noun = "dog"
    if learns(meta, run):
        prompt, base = how["prompts"][0].split(), how["base_prompts"][0].split()
        noun = base[prompt.index(how["placeholder"])]
    method = compose("lora", stack, [Subject("it", how.get("placeholder", "<it>"), noun)], **{**settings, **changes})
    assert isinstance(method, LoRA)
    return method


def parts(method: LoRA, meta) -> list[torch.nn.Parameter]:
    """The matrices in the order of the flattened vectors."""
    found = []
    for name in meta["lora"]["names"]:
        layer, _, which = name.removesuffix(".weight").rpartition(".")
        found.append({"lora_A": method.down, "lora_B": method.up}[which][f"unet/{layer}".replace(".", "/")])
    return found


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def put(method: LoRA, meta, vector: torch.Tensor) -> None:
    offset = 0
    with torch.no_grad():
        for parameter in parts(method, meta):
            parameter.copy_(vector[offset : offset + parameter.numel()].view_as(parameter))
            offset += parameter.numel()
    assert offset == len(vector)


def each_run(meta) -> list[str]:
    assert meta["runs"], "meta.json names no run"
    return list(meta["runs"])


def prompts(method: LoRA, meta, run: str, ids: torch.Tensor) -> list[str]:
    how = meta["runs"][run]
    return texts(method.model.tokenizer, ids, how.get("token_ids", []), how.get("placeholder", ""))


def test_loss_of_recorded_predictions(meta, g) -> None:
    """softplus(beta (L_m - L_r)) of the batch's means."""
    concept = torch.zeros(1, dtype=torch.long)
    for run in each_run(meta):
        how = meta["runs"][run]
        for step in range(how["max_train_steps"]):
            p, q, y = (g[f"{run}.{name}"][step] for name in ("model_pred", "refer_pred", "noise"))
            gains = advantage(p, q, y)
            if "snr_gamma" in how:
                gains = gains * min_snr(alphas_cumprod()[g[f"{run}.timesteps"][step]], how["snr_gamma"], "epsilon")
            found = consistency_loss(gains, concept.expand(len(p)), 1, how["dcoloss_beta"])
            assert found.shape == (len(p),) and torch.equal(found, found[:1].expand(len(p)))
            close(f"{run}.loss of recorded predictions", found[0], g[f"{run}.loss"][step], 5e-7 * how["dcoloss_beta"])


def test_it_starts_at_ln_2(meta, g) -> None:
    for run in each_run(meta):
        assert g[f"{run}.loss"][0] == pytest.approx(math.log(2), abs=5e-7 * meta["runs"][run]["dcoloss_beta"])


def test_snr_weights_of_velocities() -> None:
    """Hang et al. 2023, section 3.4: a velocity's error is that of x0 times snr + 1."""
    alpha = torch.tensor([0.05, 0.5, 0.99])
    snr = alpha / (1 - alpha)
    torch.testing.assert_close(min_snr(alpha, 5.0, "v_prediction"), snr.clamp(max=5) / (snr + 1))


def test_pictures(root, stack, meta, g) -> None:
    if meta["crop"] != "center":
        pytest.skip("where pictures were cut is not recorded")
    for run in each_run(meta):
        if f"{run}.pixel_values" not in g:
            continue
        pictures = [Image.open(path).convert("RGB") for path in sorted((root / "pictures").iterdir())]
        pixels = torch.stack([to_pixels(picture, stack.size, "middle", flip=False) for picture in pictures])
        recorded = g[f"{run}.pixel_values"][0]
        apart = (recorded[:, None] - pixels[None]).abs().flatten(2).amax(2).amin(1)
        close("pixel_values", apart, torch.zeros_like(apart), 1e-6)
        close("vae_moments", stack.encode_moments(recorded), g[f"{run}.vae_moments"][0], 2e-5)


def test_training(stack, meta, g) -> None:
    """Predictions, losses and gradients of every step from our own state, and what AdamW makes of them."""
    for run in each_run(meta):
        how = meta["runs"][run]
        method = build(stack, meta, run)
        put(method, meta, g[f"{run}.lora_start"])
        assert sum(p.numel() for p in parts(method, meta)) == len(g[f"{run}.lora_start"])
        if learns(meta, run):
            close("row_start", method.word, g[f"{run}.row_start"], 1e-7)
            close("row_norm", method.word_norm, g[f"{run}.row_norm"], 1e-6)
        optimizer = method.configure_optimizers()
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == [group["lr"] for group in how["adamw"][: len(rates)]]
        for number in range(how["max_train_steps"]):
            check_step(method, meta, g, run, number, optimizer)


def check_step(method: LoRA, meta, g, run: str, number: int, optimizer) -> None:
    how, model = meta["runs"][run], method.model
    z0, noise = g[f"{run}.vae_sample"][number] * meta["vae_scale"], g[f"{run}.noise"][number]
    t = g[f"{run}.timesteps"][number]
    z_t = model.add_noise(z0, noise, t)
    if number < len(g.get(f"{run}.noisy", ())):
        close(f"{run}.noisy", z_t, g[f"{run}.noisy"][number], 5e-6)
    said = prompts(method, meta, run, g[f"{run}.input_ids"][number])
    step = Step(said, torch.zeros(len(t), dtype=torch.long), t, z_t, torch.arange(len(t)))
    frozen = method.reference_condition(step)
    assert frozen is not None
    if learns(meta, run):
        base = texts(model.tokenizer, g[f"{run}.base_input_ids"][number], [], "")
        assert method.frozen_texts(step) == base, "the class noun stands for the word"
    with torch.no_grad():
        reference = model.predict(z_t, t, frozen)
    prediction = model.predict(z_t, t, method.condition(step))
    close(f"{run}.refer_pred", reference, g[f"{run}.refer_pred"][number], 1e-5)
    close(f"{run}.model_pred", prediction, g[f"{run}.model_pred"][number], 1e-5)
    loss = method.losses(replace(step, reference=reference), prediction, noise)[""].mean()
    close(f"{run}.loss", loss, g[f"{run}.loss"][number], 5e-7 * how["dcoloss_beta"])
    optimizer.zero_grad()
    loss.backward()
    matrices = parts(method, meta)
    if number < len(g[f"{run}.lora_grad"]):
        grads = flat([p.grad for p in matrices])
        close(f"{run}.lora_grad (relative)", grads, g[f"{run}.lora_grad"][number], 2e-3, absolute=False)
    square = flat([p.grad for p in matrices]).square().sum()
    if learns(meta, run):
        close(f"{run}.row_grad (relative)", method.word.grad, g[f"{run}.row_grad"][number], 2e-3, absolute=False)
        square = square + g[f"{run}.table_grad_norm"][number].square()  # of the whole table, which theirs is clipped by
    norm = square.sqrt()
    close(f"{run}.grad_norm (relative)", norm / g[f"{run}.grad_norm"][number], torch.tensor(1.0), 2e-3)
    for parameter in [*matrices, *([method.word] if learns(meta, run) else [])]:
        assert parameter.grad is not None
        parameter.grad.mul_((how["max_grad_norm"] / (norm + 1e-6)).clamp(max=1.0))
    optimizer.step()
    close(f"{run}.lora_after", flat(matrices), g[f"{run}.lora_after"][number], 5e-5)
    if learns(meta, run):
        close(f"{run}.row_after", method.word, g[f"{run}.row_after"][number], 1e-6)
        close(f"{run}.row_norm kept", method.word.norm(dim=-1, keepdim=True), g[f"{run}.row_norm"], 1e-6)


@pytest.fixture(scope="module")
def trained(root, stack, meta, g) -> LoRA:
    """The authors' own files, read back."""
    run = next(run for run in each_run(meta) if learns(meta, run))
    method = build(stack, meta, run, consistency=meta["guidance"]["consistency_scale"])
    method.load_foreign(0, root / "saved" / "pytorch_lora_weights.safetensors")
    close("saved", flat(parts(method, meta)), g[f"{run}.lora_after"][-1], 0)
    close("saved word", method.word, g[f"{run}.row_after"][-1], 0)
    return method


def test_guidance(stack, meta, g, trained) -> None:
    how = meta["guidance"]
    word, t = trained.concepts[0].placeholder, ddim(how["steps"], 1.0).build(stack, how["steps"]).timesteps
    step = Step([how["prompt"]], torch.zeros(1, dtype=torch.long), t[:1])
    assert word in how["prompt"] and trained.frozen_texts(step) == [how["base_prompt"]]
    states, frozen = trained.condition(step), trained.reference_condition(step)
    assert frozen is not None
    empty = Conditioning(trained.negative_condition("", "", [0]).keys[0][None])
    start = g["g.latents_in"]
    predict = functools.partial(stack.predict, start, t[:1])
    with torch.no_grad():
        close("g.eps_uncond_base", predict(empty), g["g.eps_uncond_base"], 1e-5)
        close("g.eps_text_base", predict(frozen), g["g.eps_text_base"], 1e-5)
        close("g.eps_lora", predict(states), g["g.eps_lora"], 1e-5)
    work = denoising_calls(
        start, ddim(how["steps"], 1.0).build(stack, how["steps"]), lambda t: states, empty, how["guidance_scale"],
        frozen=lambda t: frozen, consistency=how["consistency_scale"],
    )  # fmt: skip
    close("g.latents_out", alone(stack, work), g["g.latents_out"], 3e-4)
