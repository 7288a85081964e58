"""Cross Initialization against the authors' train() and infer(). Items are named as in golden/cross_initialization.

Limits are its README's, absolute but for the gradient. The committed slice holds starts, texts, gradients and files.
Every number, text and setting is read from the folder, so that another recorded set of the same form can be tried.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file

from hiperlab import draws
from hiperlab.base import method as contract
from hiperlab.base.method import Step, Subject
from hiperlab.data.batch import Batch
from hiperlab.data.images import to_pixels
from hiperlab.method.cross_initialization import CrossInitialization
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.sampler import Sampler, denoise
from hiperlab.report.grid import to_pil
from tests.composed import ROOT
from tests.composed import build as compose
from tests.parity import golden
from tests.parity.replay import filled, texts

NAME = "cross_initialization"
GOLDEN = NAME


def close(item: str, ours, theirs, limit: float, absolute: bool = True) -> None:
    golden.close(f"cross {item}", ours, theirs, limit, absolute=absolute)


@pytest.fixture(scope="module")
def twin(meta, source, root):
    """The slice brings the vocabulary rows that its words use."""
    found = golden.twin(meta["resolution"], source)
    if source == "slice":
        found = copy.deepcopy(found)
        known = load_file(root / "vocabulary.safetensors")
        found.text.get_input_embeddings().weight.data[known["ids"]] = known["rows"]
    return found


def runs(meta) -> list[str]:
    assert meta["runs"], "meta.json names no runs"
    return list(meta["runs"])


def build(twin, root, meta, run: str, **changes: Any) -> CrossInitialization:
    """The method as the recorded run was set; the class noun plays no part."""
    how = meta["runs"][run]
    words = how.get("initialize_tokens")
    settings = {
        "num_vectors": how["n_persudo_tokens"], "wording": how["text_in_templates"], "reg_weight": how["reg_weight"],
        "initializer": " ".join(words) if words else None, "names": None if words else str(root / "names.txt"),
        "optimizer": {key: how["adamw"][key] for key in ("lr", "betas", "eps", "weight_decay")},
    }  # fmt: skip
    method = compose(NAME, twin, [Subject("it", how["placeholder_token"], "object")], **{**settings, **changes})
    assert isinstance(method, CrossInitialization)
    return method


def put(method: CrossInitialization, rows: torch.Tensor) -> None:
    with torch.no_grad():
        method.rows[0] = rows


def test_published_settings() -> None:
    """The README's command: 320 steps of batch 8, lr 6.25e-4 x 8, weight 1e-5; torch's own AdamW otherwise."""
    published = OmegaConf.load(ROOT / "conf" / "method" / f"{NAME}.yaml")
    optimizer = published.method.optimizer
    assert (published.fit.steps, published.fit.batch_size, published.method.reg_weight) == (320, 8, 1e-5)
    assert (optimizer.lr, list(optimizer.betas), optimizer.eps) == (6.25e-4 * 8, [0.9, 0.999], 1e-8)
    assert optimizer.weight_decay == 0.01


def test_settings_are_the_recorded_ones(twin, root, meta) -> None:
    assert (root / "names.txt").read_text().splitlines() == meta["names"]
    for run in runs(meta):
        how = meta["runs"][run]
        group = build(twin, root, meta, run).configure_optimizers().param_groups[0]
        factor = how["train_batch_size"] * how.get("gradient_accumulation_steps", 1) if how["scale_lr"] else 1
        assert group["lr"] == how["effective_lr"] == pytest.approx(how["learning_rate"] * factor)
        for key in ("amsgrad", "maximize", "weight_decay", "eps"):
            assert group[key] == how["adamw"][key], key


def test_start(twin, root, meta, g) -> None:
    for run in runs(meta):
        method = build(twin, root, meta, run)
        close(f"{run}.init", method.start[0], g[f"{run}.init"], 1e-5)
        assert torch.equal(method.rows, method.start)
        derived = build(twin, root, meta, run, num_vectors=None)
        assert derived.rows.shape[1] == (
            2 if meta["runs"][run].get("initialize_tokens") is None else len(method.rows[0])
        )


def test_texts(twin, root, meta, g) -> None:
    for run in runs(meta):
        how, ids = meta["runs"][run], g[f"{run}.input_ids"]
        method = build(twin, root, meta, run)
        for step, row in enumerate(ids):
            prompts = texts(twin.tokenizer, row, how["token_ids"], how["placeholder_token"])
            assert torch.equal(filled(method, prompts, how["token_ids"]), row)
            if step == 0:
                put(method, g[f"{run}.init"])
                zeros = torch.zeros(len(prompts), dtype=torch.long)
                with torch.no_grad():
                    states = method.condition(Step(prompts, zeros, zeros)).keys[0]
                close(f"{run}.states_0", states, g[f"{run}.states_0"], 1e-5)


def test_pictures(root, twin, meta, g) -> None:
    """Each row is one of the pictures, mirrored or not; Pillow's versions round single pixels otherwise."""
    if not (root / "pictures").is_dir():
        pytest.skip("the pictures are not in the committed slice")
    pictures = [Image.open(path).convert("RGB") for path in sorted((root / "pictures").iterdir())]
    for run in runs(meta):
        cut = "square" if meta["runs"][run].get("center_crop") else CrossInitialization.published_crop
        ours = [to_pixels(each, meta["resolution"], cut, flip) for each in pictures for flip in (False, True)]
        for theirs in g[f"{run}.pixel_values_0"]:
            nearest = min(ours, key=lambda each, theirs=theirs: float((each - theirs).abs().mean()))
            close("pixel_values_0", nearest, theirs, 0.016)
            close("pixel_values_0, mean", (nearest - theirs).abs().mean(), torch.zeros(()), 1e-3)
        moments = twin.encode_moments(g[f"{run}.pixel_values_0"])
        close("vae_moments_0", moments, g[f"{run}.vae_moments_0"], 2e-5)


def test_gradients_to_rows(twin, root, meta, g) -> None:
    """Distances of the recorded rows, and the recorded gradients through AdamW, with no network between."""
    for run in runs(meta):
        method = build(twin, root, meta, run)
        before = g[f"{run}.init"]
        method.start[0] = before
        put(method, before)
        optimizer = method.configure_optimizers()
        for step, gradient in enumerate(g[f"{run}.grad"]):
            put(method, before)
            close(f"{run}.distance", method.distance()[0], g[f"{run}.distance"][step], 3e-7)
            method.rows.grad = gradient[None].clone()
            optimizer.step()
            before = g[f"{run}.rows_after"][step]
            close(f"{run}.rows_after from gradients", method.rows[0], before, 1e-6)


@pytest.mark.parametrize("restart", [True, False], ids=["each step", "in a row"])
def test_training(restart, twin, root, meta, g, monkeypatch) -> None:
    """The recorded steps through `training_step`: each from the recorded rows before it, then all in a row."""
    seen: dict[str, torch.Tensor] = {}
    predict = type(twin).predict

    def watch(self, latents, timestep, conditioning):
        seen["pred"] = predict(self, latents, timestep, conditioning)
        return seen["pred"]

    monkeypatch.setattr(type(twin), "predict", watch)
    for run in runs(meta):
        how, latents = meta["runs"][run], twin.scale(g[f"{run}.vae_sample"])
        word = how["placeholder_token"]
        method = build(twin, root, meta, run).train()
        optimizer, before = method.configure_optimizers(), g[f"{run}.init"]
        if restart:
            method.start[0] = before  # a first distance of 6e-6 would show that ours is another by 9e-7
        for k in range(how["max_train_steps"]):
            recorded = {"noise": g[f"{run}.noise"][k], "timestep": g[f"{run}.timesteps"][k]}
            monkeypatch.setattr(draws, "normal", lambda seed, purpose, samples, shape, r=recorded: r[purpose])
            monkeypatch.setattr(draws, "integers", lambda seed, purpose, samples, high, r=recorded: r[purpose])
            monkeypatch.setattr(contract.Method, "clean_latents", lambda self, batch, z=latents[k]: z)
            whole = texts(twin.tokenizer, g[f"{run}.input_ids"][k], how["token_ids"], word)
            plain = [text.replace(how["text_in_templates"].format(word), word) for text in whole]
            assert plain != whole, "the method says the templates' words itself"
            if restart:
                put(method, before)
            rows = torch.zeros(len(plain), dtype=torch.long)
            batch = Batch(torch.zeros(len(rows), 3, 8, 8), plain, rows, torch.arange(len(rows)), rows, rows.bool())
            assert method.prepare_batch(batch).prompts == whole
            close(f"{run}.distance", method.distance()[0], g[f"{run}.distance"][k], 3e-7 if restart else 2e-6)
            loss = method.training_step(batch, k)
            loss.backward()
            close(f"{run}.loss", loss, g[f"{run}.loss"][k], 3e-6)
            close(f"{run}.model_pred", seen["pred"], g[f"{run}.model_pred"][k], 3e-5)
            if restart:
                close(f"{run}.grad (relative)", method.rows.grad[0], g[f"{run}.grad"][k], 1e-4, absolute=False)
            optimizer.step()
            optimizer.zero_grad()
            before = g[f"{run}.rows_after"][k]
            close(f"{run}.rows_after", method.rows[0], before, 2e-6)


def test_authors_files(twin, root, meta, g, tmp_path) -> None:
    """Names, their order and numbers; what we write has the same."""
    for run in runs(meta):
        path = root / f"saved_{run}" / "learned_embeds.bin"
        method = build(twin, root, meta, run)
        method.load_foreign(0, path)
        assert torch.equal(method.rows[0], g[f"{run}.rows_after"][-1])
        written = next(each for each in method.export(0, tmp_path, steps=1) if each.name == path.name)
        ours, theirs = (torch.load(each, weights_only=True) for each in (written, path))
        assert list(ours) == list(theirs) == meta["runs"][run]["placeholders"]
        for name, value in theirs.items():
            assert torch.equal(ours[name], value) and ours[name].dtype == value.dtype


def test_sampling(twin, root, meta, g) -> None:
    how, run = meta["sampling"], "names"
    names = meta["runs"][run]
    start = g["sampling.latents_in"]
    method = build(twin, root, meta, run).eval()
    method.load_foreign(0, root / f"saved_{run}" / "learned_embeds.bin")
    prompt = how["prompt"].replace(" ".join(names["placeholders"]), names["placeholder_token"])
    assert torch.equal(filled(method, [prompt], names["token_ids"]), g["sampling.input_ids"])
    zero = torch.zeros(1, dtype=torch.long)
    with torch.no_grad():
        states = method.condition(Step([prompt], zero, zero))
    keys = ("solver_order", "algorithm_type", "solver_type", "lower_order_final", "timestep_spacing", "steps_offset")
    # The last step as diffusers had it then; today's default is another.
    options = {"final_sigmas_type": "sigma_min", **{key: how["scheduler_config"][key] for key in keys}}
    schedule = Sampler(how["scheduler"], how["steps"], how["guidance_scale"], options).build(twin, how["steps"])
    assert schedule.timesteps.tolist() == how["timesteps"]
    empty = Conditioning(twin.encode_text([""])[None])
    latents = denoise(twin, start, schedule, lambda t: states, empty, how["guidance_scale"])
    close("sampling.latents_out", latents, g["sampling.latents_out"], 4e-4)
    picture = twin.decode(latents).div(2).add(0.5).clamp(0, 1)
    levels = torch.from_numpy(np.array(to_pil(picture)[0])).float()
    close("sampling.image (levels)", levels, g["sampling.image"].float(), 1)
