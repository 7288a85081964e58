"""HiPer against the numbers of the authors' own scripts. Items are named as in golden/hiper/README.md, limits are its.

All limits are absolute. The committed slice holds texts, contexts, gradients and the authors' files. Every number and
text is read from the folder, so that another recorded set of the same form can be tried.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hiperlab import draws
from hiperlab.base.method import Step, Subject
from hiperlab.data.batch import Batch
from hiperlab.data.images import read_image, to_pixels
from hiperlab.formats import hiper as files
from hiperlab.method.hiper import HiPer
from hiperlab.model.conditioning import Conditioning, concatenate
from hiperlab.model.noise import sample_posterior
from hiperlab.model.sampler import ddim, denoise
from hiperlab.report.grid import to_pil
from tests.composed import build as compose
from tests.composed import config
from tests.parity import golden

ZERO = torch.zeros(1, dtype=torch.long)


def close(item: str, ours, theirs, limit: float) -> None:
    golden.close(f"hiper {item}", ours, theirs, limit, absolute=True)


@pytest.fixture(scope="module", params=["golden", "slice"])
def source(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def root(source) -> Path:
    return golden.folder("hiper") if source == "golden" else golden.SLICE / "hiper"


@pytest.fixture(scope="module")
def twin(meta, source):
    return golden.twin(meta["resolution"], source)


def noun(meta) -> str:
    """The source text's last word, which stands for the class noun: HiPer itself knows no placeholder."""
    return meta["source_text"].split()[-1]


def worded(meta, kind: str) -> str:
    """The source or target text with the placeholder in the noun's place, where it has that noun."""
    return re.sub(rf"\b{re.escape(noun(meta))}$", "<it>", meta[f"{kind}_text"])


def build(twin, meta, **changes: Any) -> HiPer:
    """HiPer as the recorded run was set."""
    group = meta["adam_group"]
    settings = {
        "n_hiper": meta["n_hiper"], "scale_source": meta["hiper_scale_source"],
        "scale_edit": [meta["hiper_scale_edit"]], "optimizer": {key: group[key] for key in ("lr", "betas", "eps")},
    }  # fmt: skip
    subject = Subject("it", "<it>", noun(meta), meta["source_text"], (meta["target_text"],))
    method = compose("hiper", twin, [subject], **{**settings, **changes})
    assert isinstance(method, HiPer)
    return method


def checkpoints(root) -> list[tuple[int, Path]]:
    """(number of updates, file) of the authors' checkpoints: step k holds k + 1 updates."""
    return sorted((files.steps(path), path) for path in root.glob("hiper_embeddings_step*.pt"))


@pytest.fixture
def hiper(twin, meta) -> HiPer:
    return build(twin, meta)


@pytest.fixture
def trained(twin, meta, root) -> HiPer:
    """With the authors' checkpoint that the recorded editing used."""
    method = build(twin, meta)
    method.load_foreign(0, root / meta["checkpoint_used_for_edit"])
    return method.eval()


def condition(method: HiPer, text: str, **how: Any) -> Conditioning:
    with torch.no_grad():
        return method.condition(Step([text], ZERO, ZERO, **how))


def test_published_settings() -> None:
    """Section 4 and train.py: N = 5, Adam with lr 5e-3, factor 1 while training and 0.8 while editing."""
    published = config("hiper").method
    assert (published.n_hiper, published.scale_source, list(published.scale_edit)) == (5, 1.0, [0.8])
    assert (published.optimizer._target_, published.optimizer.lr) == ("torch.optim.Adam", 0.005)
    assert list(published.optimizer.betas) == [0.9, 0.999]


def test_settings_are_the_recorded_ones(hiper, meta) -> None:
    group = hiper.configure_optimizers().param_groups[0]
    for key, value in meta["adam_group"].items():
        assert (list(group[key]) if key == "betas" else group[key]) == value, key
    assert hiper.n_hiper == meta["n_hiper"] and hiper.scale_source == meta["hiper_scale_source"]
    assert hiper.scale_edit == meta["hiper_scale_edit"]


def test_schedule(twin, meta, g) -> None:
    close("alphas_cumprod", twin.alpha_bar, g["alphas_cumprod"], 1e-6)
    scheduler = ddim(meta["num_inference_steps"], meta["guidance_scale"]).build(twin, meta["num_inference_steps"])
    assert scheduler.timesteps.tolist() == g["edit_timesteps"].tolist()
    close("final_alpha_cumprod", scheduler.final_alpha_cumprod.reshape(1), g["final_alpha_cumprod"], 1e-6)


def test_text(hiper, twin, meta, g) -> None:
    for name, text in (("source", meta["source_text"]), ("target", meta["target_text"]), ("uncond", "")):
        assert torch.equal(twin.tokenize([text]).ids, g[f"{name}_ids"]), name
        close(f"{name}_embeddings", twin.encode_text([text]), g[f"{name}_embeddings"], 1e-5)
    close("hiper_init", hiper.hiper, g["hiper_init"], 1e-5)


def test_picture(root, meta, g) -> None:
    if not (root / "source.png").is_file():
        pytest.skip("source.png is not in the committed slice")
    rgba = g["image_rgba_or_rgb"]
    ours = torch.from_numpy(np.array(read_image(root / "source.png")))
    if rgba.shape[-1] == 4:  # ours is laid on white, theirs drops the transparency: each is checked by its own rule
        exact = Image.alpha_composite(Image.new("RGBA", rgba.shape[1::-1], "white"), Image.fromarray(rgba.numpy()))
        assert torch.equal(ours, torch.from_numpy(np.array(exact.convert("RGB"))))
        assert torch.equal(g["image_rgb"], rgba[..., :3])
    else:
        assert torch.equal(ours, g["image_rgb"]) and torch.equal(rgba, g["image_rgb"])
    if meta["crop"] != "center":
        pytest.skip(f"the recorded crop is {meta['crop']!r}: where it was cut is not recorded")
    pixels = to_pixels(Image.fromarray(g["image_rgb"].numpy()), meta["resolution"], "middle", flip=False)
    close("pixel_values", pixels[None], g["pixel_values"], 1e-6)


def test_latents(twin, g) -> None:
    moments = twin.encode_moments(g["pixel_values"])
    close("vae_moments", moments, g["vae_moments"], 2e-5)
    sample = sample_posterior(moments, g["vae_noise"])
    close("vae_sample", sample, g["vae_sample"], 2e-5)
    close("init_latents", twin.scale(sample), g["init_latents"], 1e-5)


def test_adam(hiper, g) -> None:
    """The recorded gradients through the published optimizer, with no network between."""
    optimizer = hiper.configure_optimizers()
    with torch.no_grad():
        hiper.hiper.copy_(g["hiper_init"])
    for step, grad in enumerate(g["grad"], start=1):
        hiper.hiper.grad = grad.clone()
        optimizer.step()
        if f"hiper_after_{step}" in g:
            close(f"hiper_after_{step} from gradients", hiper.hiper, g[f"hiper_after_{step}"], 1e-5)
    state, last = optimizer.state[hiper.hiper], len(g["grad"])
    close(f"adam_exp_avg_{last}", state["exp_avg"], g[f"adam_exp_avg_{last}"], 1e-9)
    close(f"adam_exp_avg_sq_{last}", state["exp_avg_sq"], g[f"adam_exp_avg_sq_{last}"], 1e-12)


def test_training(hiper, twin, meta, g, monkeypatch) -> None:
    """The authors' iterations from prompt and picture, through `training_step` with their recorded draws."""
    optimizer = hiper.configure_optimizers()
    seen: dict[str, torch.Tensor] = {}
    predict = type(twin).predict

    def watch(self, latents, timestep, conditioning):
        out = predict(self, latents, timestep, conditioning)
        seen.update(noisy_latents=latents, source_cond=conditioning.keys[0], noise_pred=out)
        return out

    monkeypatch.setattr(type(twin), "predict", watch)
    hiper.train()
    for k in range(len(g["noise"])):
        recorded = {"noise": g["noise"][k], "timestep": g["timesteps"][k : k + 1], "posterior": g["vae_noise"]}
        monkeypatch.setattr(draws, "normal", lambda seed, purpose, samples, shape, r=recorded: r[purpose])
        monkeypatch.setattr(draws, "integers", lambda seed, purpose, samples, high, r=recorded: r[purpose])
        batch = Batch(g["pixel_values"], [worded(meta, "source")], ZERO, torch.tensor([k]), ZERO, ZERO.bool())
        loss = hiper.training_step(batch, k)
        close("loss", loss, g["loss"][k], 3e-6)
        loss.backward()
        if k < len(g["grad"]):
            close("noisy_latents", seen["noisy_latents"], g["noisy_latents"][k], 2e-5)
            close("source_cond", seen["source_cond"], g["source_cond"][k], 1e-5)
            close("noise_pred", seen["noise_pred"], g["noise_pred"][k], 3e-5)
            close("grad", hiper.hiper.grad, g["grad"][k], 2e-9)
        optimizer.step()
        optimizer.zero_grad()
        close("hiper_after", hiper.hiper, g["hiper_after"][k], 1.2e-5)
        if f"hiper_after_{k + 1}" in g:
            close(f"hiper_after_{k + 1}", hiper.hiper, g[f"hiper_after_{k + 1}"], 1.2e-5)


def contexts(method: HiPer, meta) -> dict[str, Conditioning]:
    """What the three previews read: source, edited target, plain target."""
    plain = Conditioning(method.model.encode_text([meta["target_text"]])[None])
    return {
        "source": condition(method, worded(meta, "source")),
        "edit": condition(method, worded(meta, "target")),
        "plain": plain,
    }


def test_contexts(twin, meta, root, g) -> None:
    """Order of rows and both factors; permuting rows could not be seen in any output."""
    method = build(twin, meta)
    method.load_foreign(0, checkpoints(root)[0][1])
    for number, states in enumerate(contexts(method, meta).values()):
        close("preview_cond", states.keys[0], g["preview_cond"][number], 1e-5)
    method.load_foreign(0, root / meta["checkpoint_used_for_edit"])
    edit = condition(method, worded(meta, "target"))
    close("edit_cond", edit.keys[0], g["edit_cond"], 1e-5)
    assert torch.equal(edit.keys, condition(method, meta["target_text"]).keys), "no placeholder is tokenised"


def draw(method: HiPer, states: Conditioning, start, meta, watch=None):
    steps, guidance = meta["num_inference_steps"], meta["guidance_scale"]
    rows = torch.zeros(len(start), dtype=torch.long)
    return denoise(
        method.model, start, ddim(steps, guidance).build(method.model, steps), lambda t: states.rows(rows),
        Conditioning(method.model.encode_text([""])[None]).rows(rows), guidance, watch=watch,
    )  # fmt: skip


def test_previews(twin, meta, root, g) -> None:
    method = build(twin, meta)
    method.load_foreign(0, checkpoints(root)[0][1])
    for number, states in enumerate(contexts(method, meta).values()):
        latents = draw(method, states, g["preview_init_latents"][number], meta)
        close("preview_final_latents", latents, g["preview_final_latents"][number], 4e-4)


def test_editing(trained, meta, g) -> None:
    states = condition(trained, worded(meta, "target"))
    rows = torch.zeros(meta["num_images"], dtype=torch.long)
    empty = Conditioning(trained.model.encode_text([""])[None])
    both = concatenate([empty.rows(rows), states.rows(rows)])
    close("cfg_hidden_states", both.keys[0], g["cfg_hidden_states"], 1e-5)
    assert int(g["cfg_timestep"]) == int(g["edit_timesteps"][0])
    assert torch.equal(g["cfg_latents"], g["edit_init_latents"])
    with torch.no_grad():
        latents = torch.cat([g["cfg_latents"]] * 2)
        out = trained.model.predict(latents, g["cfg_timestep"].expand(len(latents)), both)
    without, within = out.chunk(2)
    close("cfg_eps_uncond", without, g["cfg_eps_uncond"], 3e-5)
    close("cfg_eps_text", within, g["cfg_eps_text"], 3e-5)
    guided = without + meta["guidance_scale"] * (within - without)
    close("cfg_eps_guided", guided, g["cfg_eps_guided"], 1e-4)

    trajectory: list[torch.Tensor] = []
    final = draw(trained, states, g["edit_init_latents"], meta, watch=lambda _, z: trajectory.append(z))
    close("edit_trajectory", torch.stack(trajectory), g["edit_trajectory"], 4e-4)
    close("edit_final_latents", final, g["edit_final_latents"], 4e-4)
    pictures = trained.model.decode(final).div(2).add(0.5).clamp(0, 1)
    close("edit_images_float", pictures.permute(0, 2, 3, 1), g["edit_images_float"], 2e-4)
    levels = torch.stack([torch.from_numpy(np.array(picture)) for picture in to_pil(pictures)])
    close("edit_images_uint8 (levels)", levels.float(), g["edit_images_uint8"].float(), 1)


def test_authors_files(hiper, root, g, tmp_path) -> None:
    """Step k holds k + 1 updates; what we write they can read: a bare [1, N, D] float32 tensor that requires grad."""
    found = checkpoints(root)
    assert found, "the folder holds the authors' checkpoints"
    for updates, path in found:
        hiper.load_foreign(0, path)
        assert torch.equal(hiper.hiper.detach(), g[f"hiper_after_{updates}"])
        (written,) = hiper.export(0, tmp_path, steps=updates)
        assert written.name == path.name and files.steps(written) == updates
        ours, theirs = (torch.load(each, weights_only=True) for each in (written, path))
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype and ours.requires_grad == theirs.requires_grad
