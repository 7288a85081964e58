"""Imagic against diffusers' community pipeline. Items are named as in golden/hiper/README.md, limits are its, absolute.

The pipeline keeps the picture's own size, so pictures enter here as its pixels; phases run through `training_step`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from hiperlab import draws
from hiperlab.base.method import Step, Subject
from hiperlab.data.batch import Batch
from hiperlab.data.images import read_image
from hiperlab.method.imagic import Imagic
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.noise import sample_posterior
from hiperlab.model.sampler import ddim, denoise
from tests.composed import build as compose
from tests.parity import golden

ZERO = torch.zeros(1, dtype=torch.long)


def close(item: str, ours, theirs, limit: float) -> None:
    golden.close(f"imagic {item}", ours, theirs, limit, absolute=True)


@pytest.fixture(scope="module", params=["golden", "slice"])
def source(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def path(source) -> Path:
    root = golden.folder("hiper") if source == "golden" else golden.SLICE / "hiper"
    return root / "imagic.safetensors"


@pytest.fixture(scope="module")
def g(path):
    return golden.tensors(path)


@pytest.fixture(scope="module")
def meta(path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["imagic"])


@pytest.fixture(scope="module")
def twin(source, g):
    """Of the sampled pictures' size; training pictures keep their own."""
    start = g["edit0_init_latents"] if source == "golden" else None
    return golden.twin(128 if start is None else 8 * start.shape[-1], source)


def build(twin, meta, **changes: Any) -> Imagic:
    steps, phase_a = meta["embedding_steps"] + meta["model_steps"], meta["embedding_steps"]
    settings = {
        "steps": steps, "batch_size": 1, "embedding_share": phase_a / steps, "model_lr": meta["lr_model"],
        "weights": "all", "eta": meta["alphas"],
        "optimizer": {"lr": meta["lr_embedding"], "betas": meta["adam"]["betas"], "eps": meta["adam"]["eps"]},
    }  # fmt: skip
    subject = Subject("it", "<it>", "dog", "a photo of a dog", (meta["prompt"],))  # Imagic never reads its own text
    method = compose("imagic", twin, [subject], **{**settings, **changes})
    assert isinstance(method, Imagic)
    return method


class Replay:
    """The recorded iterations through `training_step`, with what each leaves behind."""

    def __init__(self, method: Imagic, g, count: int, monkeypatch) -> None:
        self.losses, self.predictions, self.gradients, self.embeddings = [], [], [], []
        self.weight_gradients: dict[str, torch.Tensor] = {}
        optimizer, predict = method.configure_optimizers(), type(method.model).predict

        def watch(*args):
            self.predictions.append(predict(*args))
            return self.predictions[-1]

        monkeypatch.setattr(type(method.model), "predict", watch)
        method.train()
        for k in range(count):
            recorded = {"noise": g["noise"][k], "timestep": g["timesteps"][k : k + 1], "posterior": g["vae_noise"]}
            monkeypatch.setattr(draws, "normal", lambda seed, purpose, samples, shape, r=recorded: r[purpose])
            monkeypatch.setattr(draws, "integers", lambda seed, purpose, samples, high, r=recorded: r[purpose])
            batch = Batch(g["pixel_values"], ["a photo of a <it>"], ZERO, torch.tensor([k]), ZERO, ZERO.bool())
            loss = method.training_step(batch, k)
            loss.backward()
            self.losses.append(loss.detach())
            if method.embedding.grad is not None:
                self.gradients.append(method.embedding.grad.clone())
                assert all(value.grad is None for value in method.offsets.values()), "phase A fits the text only"
            elif not self.weight_gradients:
                self.weight_gradients = {
                    name.replace("/", "."): value.grad[0].clone() for name, value in method.offsets.items()
                }
            optimizer.step()
            optimizer.zero_grad()
            self.embeddings.append(method.embedding.detach().clone())


@pytest.fixture(scope="module")
def fitted(twin, meta, g):
    """A method after the recorded run, and the run."""
    method = build(twin, meta)
    with pytest.MonkeyPatch.context() as patch:
        run = Replay(method, g, meta["embedding_steps"] + meta["model_steps"], patch)
    return method, run


def test_picture(path, g) -> None:
    """Their own preparation, written out: the lower multiples of 32 of the picture's sides. Ours crops to a square."""
    if not (path.parent / "source.png").is_file():
        pytest.skip("source.png is not in the committed slice")
    image = Image.fromarray(g["image_rgb"].numpy())
    with Image.open(path.parent / "source.png") as file:
        opaque = file.mode == "RGB"
    if opaque:  # a transparent picture is laid on white by ours, theirs drops the transparency: see test_hiper.py
        assert torch.equal(torch.from_numpy(np.array(read_image(path.parent / "source.png"))), g["image_rgb"])
    sides = [side - side % 32 for side in image.size]
    theirs = np.asarray(image.resize(sides, Image.Resampling.LANCZOS), dtype=np.float32) / 255 * 2 - 1
    close("pixel_values", torch.from_numpy(theirs).permute(2, 0, 1)[None], g["pixel_values"], 1e-6)


def test_text(twin, meta, g) -> None:
    method = build(twin, meta, weights="cross")
    close("target_embeddings", method.embedding, g["target_embeddings"], 1e-5)


def test_adam(twin, meta, g) -> None:
    method = build(twin, meta, weights="cross")
    optimizer = method.configure_optimizers()
    with torch.no_grad():
        method.embedding.copy_(g["target_embeddings"])
    for grad, after in zip(g["embedding_grad"], g["embedding_after"], strict=True):
        method.embedding.grad = grad.clone()
        optimizer.step()
        close("embedding_after from gradients", method.embedding, after, 1e-5)


def test_latents(twin, g) -> None:
    moments = twin.encode_moments(g["pixel_values"])
    close("vae_moments", moments, g["vae_moments"], 2e-5)
    close("init_latents", twin.scale(sample_posterior(moments, g["vae_noise"])), g["init_latents"], 1e-5)


def test_phases(fitted, meta, g) -> None:
    method, run = fitted
    close("loss", torch.stack(run.losses), g["loss"], 3e-6)
    close("noise_pred", torch.stack(run.predictions), g["noise_pred"], 3e-5)
    phase_a = meta["embedding_steps"]
    close("embedding_grad", torch.stack(run.gradients), g["embedding_grad"], 2e-9)
    close("embedding_after", torch.stack(run.embeddings[:phase_a]), g["embedding_after"], 1e-5)
    close("optimized_embeddings", method.embedding, g["optimized_embeddings"], 1e-5)


def test_weights(fitted, twin, meta, g) -> None:
    """Offsets of all weights are full fine-tuning: its gradients, its weights, and a frozen stack that stays."""
    method, run = fitted
    names = meta["unet_names"]
    norms = torch.stack([run.weight_gradients[name].norm() for name in names])
    golden.close("imagic unet_grad0_norm (relative)", norms, g["unet_grad0_norm"], 1e-4)
    deltas = torch.stack([method.offsets[name.replace(".", "/")].abs().sum() for name in names])
    golden.close("imagic unet_delta_l1 (relative)", deltas, g["unet_delta_l1"], 1e-4)
    weights = method.weight_offsets().weights(twin.unet)
    for name, value in golden.pick(g, "unet_grad0.").items():
        golden.close("imagic unet_grad0 (relative)", run.weight_gradients[name], value, 1e-4)
    for name, value in golden.pick(g, "unet_after.").items():
        close("unet_after", weights[name], value, 1e-6)
        assert not torch.equal(twin.unet.get_parameter(name), value), "the frozen weight is another one"


def test_unscaled_loss_is_a_smaller_eps(twin, meta, g, monkeypatch) -> None:
    """What the public code does on a GPU: a loss times 65536 that nothing unscales; Adam sees eps / 65536."""
    eps = meta["adam"]["eps"] / meta["scaled_run_loss_scale"]
    adam = {"lr": meta["lr_embedding"], "betas": meta["adam"]["betas"], "eps": eps}
    method = build(twin, meta, optimizer=adam)
    run = Replay(method, g, meta["embedding_steps"] + meta["model_steps"], monkeypatch)
    close("optimized_embeddings_scaled_loss", method.embedding, g["optimized_embeddings_scaled_loss"], 1e-5)
    close("loss_scaled_run", torch.stack(run.losses), g["loss_scaled_run"], 3e-6)


def test_contexts(twin, meta, g) -> None:
    method = build(twin, meta, weights="cross")
    with torch.no_grad():
        method.embedding.copy_(g["optimized_embeddings"])
        for j, eta in enumerate(meta["alphas"]):
            states = method.condition(Step([meta["prompt"]], ZERO, ZERO, variant=f"eta={eta}"))
            close("edit_cond", states.keys[0], g[f"edit{j}_cond"], 1e-5)
        source = method.condition(Step(["a photo of a <it>"], ZERO, ZERO, variant=f"eta={eta}"))
    assert torch.equal(source.keys[0], method.embedding.detach()), "the source text asks for the picture itself"


def test_editing(fitted, meta, g) -> None:
    method, _ = fitted
    steps, guidance = meta["num_inference_steps"], meta["guidance_scale"]
    for j, eta in enumerate(meta["alphas"]):
        with torch.no_grad():
            states = method.condition(Step([meta["prompt"]], ZERO, ZERO, variant=f"eta={eta}"))
        trajectory: list[torch.Tensor] = []
        predictions: list[torch.Tensor] = []
        predict = method.model.predict

        def watch(*args, predict=predict, predictions=predictions):
            predictions.append(predict(*args))
            return predictions[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(method.model, "predict", watch)
            final = denoise(
                method.model, g[f"edit{j}_init_latents"], ddim(steps, guidance).build(method.model, steps),
                lambda t, states=states: states, Conditioning(method.model.encode_text([""])[None]), guidance,
                watch=lambda _, z, trajectory=trajectory: trajectory.append(z),
            )  # fmt: skip
        without, within = predictions[0].chunk(2)
        guided = without + guidance * (within - without)
        close("edit_eps_guided_step0", guided, g[f"edit{j}_eps_guided_step0"], 1e-4)
        close("edit_trajectory", torch.stack(trajectory), g[f"edit{j}_trajectory"], 4e-4)
        close("edit_final_latents", final, g[f"edit{j}_final_latents"], 4e-4)
        picture = method.model.decode(final).div(2).add(0.5).clamp(0, 1).permute(0, 2, 3, 1)
        close("edit_image_float", picture, g[f"edit{j}_image_float"], 2e-4)
