"""DVAR against the authors' stopper, and Textual Inversion watched by it. Items as in golden/dvar/README.md.

Limits are its, absolute. The committed slice holds the series of losses and two settings' ratios.
Every number and text is read from the folder, so that another recorded set of the same form can be tried.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from hiperlab.base.early_stop import EarlyStop, FixedInputs
from hiperlab.base.method import Step, Subject
from hiperlab.data.batch import Batch
from hiperlab.data.concept import fill
from hiperlab.data.images import to_pixels
from hiperlab.loss.diffusion import denoising_loss
from hiperlab.loss.dvar import Dvar
from hiperlab.method.ti import TextualInversion
from hiperlab.model.noise import sample_posterior
from hiperlab.model.shared_calls import alone
from tests.composed import ROOT
from tests.composed import build as compose
from tests.parity import golden
from tests.parity.replay import filled, texts

GOLDEN = "dvar"


def close(item: str, ours, theirs, limit: float) -> None:
    golden.close(f"dvar {item}", ours, theirs, limit, absolute=True)


def test_published_settings() -> None:
    """early_stopping.py's defaults, and the README's of each method."""
    plain = OmegaConf.load(ROOT / "conf" / "config.yaml").fit
    assert plain.stop is None
    assert (plain.dvar.window, plain.dvar.threshold, plain.dvar.every, plain.dvar.rows, plain.dvar.parts) == (
        200, 0.15, 1, 4, 1,
    )  # fmt: skip
    for name, window, threshold in (("ti", 310, 0.15), ("custom_diffusion", 180, 0.15), ("lora", 440, 0.4)):
        found = OmegaConf.load(ROOT / "conf" / "method" / f"{name}.yaml").fit.dvar
        assert (found.window, found.threshold) == (window, threshold)


def watched(losses: torch.Tensor, window: int, threshold: float) -> tuple[list[float], int | None]:
    """The ratios after every loss, and the end."""
    criterion, ratios = Dvar(window, threshold), []
    for loss in losses.tolist():
        criterion.see(loss)
        ratios.append(criterion.ratio)
    return ratios, criterion.ended_at


def test_ends(meta, g) -> None:
    for case, how in meta["stopper_cases"].items():
        series, _ = case.split(".")
        _, ended = watched(g[f"v.{series}.losses"], how["window"], how["eps"])
        assert ended == how["stopped_after"], case


def test_ratios(meta, g) -> None:
    for case, how in meta["stopper_cases"].items():
        if f"v.{case}.ratio" not in g:
            continue  # the slice keeps some
        ratios, _ = watched(g[f"v.{case.split('.')[0]}.losses"], how["window"], how["eps"])
        ours, theirs = torch.tensor(ratios, dtype=torch.float64), g[f"v.{case}.ratio"]
        assert torch.equal(ours.isnan(), theirs.isnan()), case
        known = ~theirs.isnan()
        close("v.ratio", ours[known], theirs[known], 1e-12)


@pytest.mark.parametrize("factor, shift", [(3.7, 0.0), (1.0, 12.5), (0.02, -4.0)])
def test_scale_and_shift_change_nothing(meta, g, factor, shift) -> None:
    for case, how in meta["stopper_cases"].items():
        series = case.split(".")[0]
        if series != "constant":  # of 0 / 0 rounding decides
            losses = g[f"v.{series}.losses"].double() * factor + shift
            assert watched(losses, how["window"], how["eps"])[1] == how["stopped_after"]


def test_of_equal_losses_there_is_no_end() -> None:
    ratios, ended = watched(torch.full((9,), 0.5), 3, 0.9)
    assert ended is None and ratios[:2] == [1.0, 1.0] and all(math.isnan(ratio) for ratio in ratios[2:])


# ---- Textual Inversion, watched ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def method(meta, source, g) -> TextualInversion:
    if source == "slice":
        pytest.skip("the run is not in the committed slice")
    run, twin = meta["run"], golden.twin(g["e.pixel_values"].shape[-1], source)
    changes = {"optimizer": {"lr": run["lr"], "weight_decay": run["weight_decay"]}}
    found = compose("ti", twin, [Subject("it", run["placeholder"], run["initializer"])], **changes)
    assert isinstance(found, TextualInversion)
    return found


def placeholder(method: Any, ids: torch.Tensor) -> int:
    """The id of the new token, the first behind the vocabulary."""
    return int(ids[ids >= len(method.model.text.get_input_embeddings().weight)].unique().item())


def stop(meta, g) -> EarlyStop:
    """The recorded fixed inputs as the run would give them."""
    run, pixels = meta["run"], g["e.pixel_values"]
    rows, parts, views = run["eval_batch"], run["eval_accumulation"], len(g["e.pixel_values"])
    numbers = torch.arange(rows)
    said = [fill(run["templates"][row % len(run["templates"])], run["placeholder"]) for row in range(rows)]
    batch = Batch(
        pixels[numbers % views], said, torch.zeros_like(numbers), numbers, numbers % views, numbers < 0
    )  # fmt: skip
    times = g["e.permutation"][: parts * rows].view(parts, rows)
    assert times.flatten().tolist() == run["eval_timesteps"]
    inputs = FixedInputs(batch, g["e.eval_vae_noise"], g["e.eval_noise"], times)
    return EarlyStop(inputs, run["window"], run["eps"], run["eval_every"], run["steps"], "it")


def test_fixed_inputs(root, meta, g, method) -> None:
    pictures = [Image.open(path).convert("RGB") for path in sorted((root / "pictures").iterdir())]
    pixels = torch.stack([to_pixels(picture, method.model.size, "square", flip=False) for picture in pictures])
    close("e.pixel_values", pixels, g["e.pixel_values"], 1e-6)
    moments = method.model.encode_moments(g["e.pixel_values"])
    close("e.vae_moments", moments, g["e.vae_moments"], 2e-5)
    rows = torch.arange(meta["run"]["eval_batch"]) % len(moments)
    z0 = method.model.scale(sample_posterior(g["e.vae_moments"][rows], g["e.eval_vae_noise"]))
    close("e.eval_latents", z0, g["e.eval_latents"], 1e-5)
    prompts, ids = stop(meta, g).inputs.batch.prompts, g["e.eval_input_ids"]
    assert torch.equal(filled(method, prompts, [placeholder(method, ids)]), ids)


def test_loss_on_fixed_inputs(meta, g, method) -> None:
    watch = stop(meta, g)
    for row in g["e.rows"][: meta["run"]["steps"]]:
        with torch.no_grad():
            method.vectors[0].copy_(row)
        watch.see(float(alone(method.model, method.fixed_loss_calls(watch.inputs, g["e.eval_latents"]))))
    found = torch.tensor(watch.dvar.losses)
    close("e.eval_loss", found, g["e.eval_loss"], 2e-6)
    ratios, ended = watched(g["e.eval_loss"], meta["run"]["window"], meta["run"]["eps"])
    close("e.ratio", torch.tensor(ratios, dtype=torch.float64), g["e.ratio"], 1e-12)
    assert ended == meta["run"]["stopped_after_evaluations"]
    assert watch.dvar.ended_at is not None and abs(watch.dvar.ended_at - ended) <= 1, "from our own losses"


def test_training(meta, g, method) -> None:
    """The recorded steps, from their own inputs."""
    with torch.no_grad():
        method.vectors[0].copy_(g["e.rows"][0])
    optimizer = method.configure_optimizers()
    ids = g["e.input_ids"]
    word = placeholder(method, ids)
    for step, (z0, noise, t) in enumerate(zip(g["e.latents"], g["e.noise"], g["e.timesteps"], strict=True)):
        prompts = texts(method.model.tokenizer, ids[step], [word], meta["run"]["placeholder"])
        assert torch.equal(filled(method, prompts, [word]), ids[step])
        concept = torch.zeros(len(prompts), dtype=torch.long)
        states = method.condition(Step(prompts, concept, t))
        prediction = method.model.predict(method.model.add_noise(z0, noise, t), t, states)
        loss = denoising_loss(prediction, noise).mean()
        close("e.train_loss", loss, g["e.train_loss"][step], 3e-6)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        close("e.rows", method.vectors[0], g["e.rows"][step + 1], 1e-5)
