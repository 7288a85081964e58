"""Directional Textual Inversion against the authors' own modules. Items are named as in golden/dti/README.md.

Limits are its, absolute. The committed slice holds the optimizer, the recorded gradients of both runs and the files.
Every number and text is read from the folder, so that another recorded set of the same form can be tried.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from hiperlab import draws
from hiperlab.base import method as contract
from hiperlab.base.method import Step, Subject
from hiperlab.data.batch import Batch
from hiperlab.data.images import to_pixels
from hiperlab.method.dti import DirectionalTextualInversion
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.sampler import ddim, denoise
from hiperlab.optim.spherical import SphericalSGD
from tests.composed import ROOT
from tests.composed import build as compose
from tests.parity import golden
from tests.parity.replay import filled, texts

GOLDEN = "dti"
EPS = 1e-8  # the authors' constant; meta.json does not name it


def close(item: str, ours, theirs, limit: float) -> None:
    golden.close(f"dti {item}", ours, theirs, limit, absolute=True)


def close_square(item: str, ours, theirs, limit: float = 1e-5) -> None:
    """Second moments span many sizes: relative to each."""
    golden.close(f"dti {item} (relative)", ours / theirs, torch.ones_like(theirs), limit, absolute=True)


@pytest.fixture(scope="module")
def twin(meta, source):
    return golden.twin(meta["resolution"], source)


def each(meta, what: str) -> list[str]:
    assert meta[what], f"meta.json names no {what}"
    return list(meta[what])


def build(twin, meta, run: str, **changes: Any) -> DirectionalTextualInversion:
    """DTI as the recorded run was set; the class noun plays no part."""
    how = meta["runs"][run]
    settings = {
        "initializer": how["initializer"], "magnitude": how["token_scale"], "init": how["init_method"],
        "kappa": how["kappa"], "optimizer": {"lr": how["lr"], "beta": how["beta"]},
    }  # fmt: skip
    method = compose("dti", twin, [Subject("it", how["placeholder"], "object")], **{**settings, **changes})
    assert isinstance(method, DirectionalTextualInversion)
    return method


def test_published_settings() -> None:
    """exps/ours_sdxl.py: lr 0.01 x batch 4, 400 steps; argument_parser.py: kappa 1e-4, no average, mean norm."""
    published = OmegaConf.load(ROOT / "conf" / "method" / "dti.yaml")
    method, optimizer = published.method, published.method.optimizer
    assert (method.kappa, method.magnitude, method.init, method.initializer) == (1e-4, "mean", "token", None)
    assert (optimizer.lr, optimizer.beta, optimizer.eps) == (0.01 * 4, 0.0, EPS)
    assert (published.fit.steps, published.fit.batch_size) == (400, 4)


def test_optimizer(meta, g) -> None:
    for case in each(meta, "optimizer_cases"):
        how = meta["optimizer_cases"][case]
        rows = torch.nn.Parameter(g[f"o.{case}.start"].clone())
        assert rows.shape == (how["n"], how["d"])
        optimizer = SphericalSGD([rows], lr=how["lr"], beta=how["beta"], eps=EPS)
        optimizer.pulls[rows] = how["kappa"] * g[f"o.{case}.target"]
        for step, gradient in enumerate(g[f"o.{case}.grads"]):
            rows.grad = gradient.clone()
            optimizer.step()
            close(f"o.{case}.after", rows, g[f"o.{case}.after"][step], 1e-6)
            close_square(f"o.{case}.v", optimizer.state[rows]["square"], g[f"o.{case}.v"][step])


def test_start(twin, meta, g, source) -> None:
    if source == "slice":
        pytest.skip("the slice's vocabulary is not whole: its norms are others")
    weight = twin.text.get_input_embeddings().weight
    for run in each(meta, "runs"):
        how, method = meta["runs"][run], build(twin, meta, run)
        for kind, norm in how["vocabulary_norm"].items():
            found = build(twin, meta, run, magnitude=kind).magnitude
            close(f"vocabulary_norm {kind}", found, torch.full_like(found, norm), 1e-6)
        close("scale", method.magnitude[0], g[f"r.{run}.scale"], 1e-6)
        close("prior", method.prior[0], g[f"r.{run}.prior"], 1e-6)
        close("direction_start", method.direction[0], g[f"r.{run}.direction_start"], 1e-6)
        ids = twin.tokenizer(how["initializer"], add_special_tokens=False)["input_ids"]
        close("init_embeds", weight[ids], g[f"r.{run}.init_embeds"], 1e-7)
        assert method.direction.shape[1] == how["num_vectors"]


def test_pictures(root, twin, meta, g) -> None:
    if not (root / "pictures").is_dir():
        pytest.skip("the pictures are not in the committed slice")
    if meta["crop"] != "center" or meta["flip"]:
        pytest.skip("where pictures were cut or whether they were mirrored is not recorded")
    pictures = [Image.open(path).convert("RGB") for path in sorted((root / "pictures").iterdir())]
    cut = DirectionalTextualInversion.published_crop
    pixels = torch.stack([to_pixels(picture, meta["resolution"], cut, flip=False) for picture in pictures])
    for run in each(meta, "runs"):
        recorded = g[f"r.{run}.pixel_values"]
        close("pixel_values", pixels[: len(recorded)], recorded, 1e-6)
        close("vae_moments", twin.encode_moments(recorded), g[f"r.{run}.vae_moments"], 2e-5)


def test_gradients_to_directions(twin, meta, g) -> None:
    """The recorded gradients through the method's own optimizer, with no network between."""
    for run in each(meta, "runs"):
        method = build(twin, meta, run)
        with torch.no_grad():
            method.direction[0] = g[f"r.{run}.direction_start"]
            method.prior[0] = g[f"r.{run}.prior"]
        optimizer = method.configure_optimizers()
        for step, gradient in enumerate(g[f"r.{run}.grad"]):
            method.direction.grad = gradient[None].clone()
            optimizer.step()
            close(
                f"{run}.direction_after from gradients", method.direction[0], g[f"r.{run}.direction_after"][step], 1e-6
            )
            square = optimizer.state[method.direction]["square"][0]
            close_square(f"{run}.v_after from gradients", square, g[f"r.{run}.v_after"][step])


@pytest.mark.parametrize("restart", [True, False], ids=["each step", "in a row"])
def test_training(restart, twin, meta, g, monkeypatch) -> None:
    """The recorded steps through `training_step`: each from the recorded direction before it, then all in a row."""
    seen: dict[str, torch.Tensor] = {}
    predict = type(twin).predict

    def watch(self, latents, timestep, conditioning):
        out = predict(self, latents, timestep, conditioning)
        seen.update(noisy=latents, states=conditioning.keys[0], pred=out)
        return out

    monkeypatch.setattr(type(twin), "predict", watch)
    for run in each(meta, "runs"):
        how = meta["runs"][run]
        latents = g[f"r.{run}.latents"]  # skips where the slice leaves the networks' numbers out
        r = golden.pick(g, f"r.{run}.")
        method = build(twin, meta, run).train()
        optimizer, before = method.configure_optimizers(), r["direction_start"]
        for k in range(meta["steps"]):
            recorded = {"noise": r["noise"][k], "timestep": r["timesteps"][k]}
            monkeypatch.setattr(draws, "normal", lambda seed, purpose, samples, shape, r=recorded: r[purpose])
            monkeypatch.setattr(draws, "integers", lambda seed, purpose, samples, high, r=recorded: r[purpose])
            monkeypatch.setattr(contract.Method, "clean_latents", lambda self, batch, z=latents[k]: z)
            prompts = texts(twin.tokenizer, r["input_ids"][k], how["token_ids"], how["placeholder"])
            assert torch.equal(filled(method, prompts, how["token_ids"]), r["input_ids"][k])
            if restart:
                with torch.no_grad():
                    method.direction[0] = before
            rows = torch.zeros(len(prompts), dtype=torch.long)
            batch = Batch(torch.zeros(len(rows), 3, 8, 8), prompts, rows, torch.arange(len(rows)), rows, rows.bool())
            loss = method.training_step(batch, k)
            loss.backward()
            close(f"{run}.loss", loss, r["loss"][k], 3e-6)
            close(f"{run}.grad", method.direction.grad[0], r["grad"][k], 1e-7)
            if k == 0:
                close(f"{run}.noisy_0", seen["noisy"], r["noisy_0"], 1e-5)
                close(f"{run}.states_0", seen["states"], r["states_0"], 1e-5)
                close(f"{run}.pred_0", seen["pred"], r["pred_0"], 3e-5)
            optimizer.step()
            optimizer.zero_grad()
            close(f"{run}.direction_after", method.direction[0], r["direction_after"][k], 2e-6)
            square = optimizer.state[method.direction]["square"][0]
            close_square(f"{run}.v_after", square, r["v_after"][k], 2e-5)  # a square: twice the gradient's 1e-5
            cosine = (method.direction * method.prior).sum(-1)[0]
            close(f"{run}.cosine_to_prior", cosine, r["cosine_to_prior"][k], 2e-6)
            before = r["direction_after"][k]
        if not restart:
            close(f"{run}.learned", method.vectors()[0], r["learned"], 1e-6)


def test_authors_files(twin, root, meta, g, tmp_path) -> None:
    """Their file is norm and direction; what we write has its key, metadata and numbers."""
    for run in each(meta, "runs"):
        path = root / f"saved_{run}" / "learned_embeds.safetensors"
        method = build(twin, meta, run)
        method.load_foreign(0, path)
        close("file: scale", method.magnitude[0], g[f"r.{run}.scale"], 1e-6)
        close("file: direction", method.direction[0], g[f"r.{run}.direction_after"][-1], 1e-6)
        written = next(each for each in method.export(0, tmp_path, steps=1) if each.name == path.name)
        ours, theirs = load_file(written), load_file(path)
        assert ours.keys() == theirs.keys() == {meta["runs"][run]["placeholder"]}
        for name, value in theirs.items():
            close("file: learned", value, g[f"r.{run}.learned"], 1e-7)
            close("file: ours", ours[name], value, 1e-7)
        with safe_open(written, "pt") as mine, safe_open(path, "pt") as other:
            assert mine.metadata() == other.metadata()


def test_sampling(twin, root, meta, g) -> None:
    for run in each(meta, "runs"):
        how, start = meta["runs"][run], g[f"s.{run}.latents_in"]
        method = build(twin, meta, run).eval()
        method.load_foreign(0, root / f"saved_{run}" / "learned_embeds.safetensors")
        zero = torch.zeros(1, dtype=torch.long)
        assert torch.equal(filled(method, [how["sampling_prompt"]], how["token_ids"]), g[f"s.{run}.input_ids"])
        with torch.no_grad():
            states = method.condition(Step([how["sampling_prompt"]], zero, zero))
        steps, guidance = how["sampling_steps"], how["guidance"]
        empty = Conditioning(twin.encode_text([""])[None])
        schedule = ddim(steps, guidance).build(twin, steps)
        latents = denoise(twin, start, schedule, lambda t, states=states: states, empty, guidance)
        close(f"{run}.latents_out", latents, g[f"s.{run}.latents_out"], 4e-4)
