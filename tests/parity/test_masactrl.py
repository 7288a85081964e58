"""MasaCtrl against the authors' numbers (golden/masactrl/README.md, whose limits these are).

Sizes, prompts and settings are meta.json's. The committed slice holds the cropped picture.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from hiperlab.base.editing_method import Drawing
from hiperlab.base.method import Subject
from hiperlab.data.images import to_pixels
from hiperlab.edit import mutual_attention
from hiperlab.edit.attention_maps import tokens_mask
from hiperlab.edit.mutual_attention import WordMasks
from hiperlab.model import inversion
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.shared_calls import alone
from tests.composed import build
from tests.parity import golden
from tests.parity.roots import Roots

close = golden.close
FOLDER = "masactrl"


@pytest.fixture(scope="module")
def root() -> Path:
    return golden.folder(FOLDER)


def recorded(item: str, file: str = "golden.safetensors") -> list[str]:
    """The runs that have this item, whatever they are."""
    path = golden.place(FOLDER) / file
    names = golden.tensors(path) if path.is_file() else {}
    return [name.removesuffix(f".{item}") for name in names if name.endswith(f".{item}")] or ["none recorded"]


def method(
    meta: dict[str, Any], name: str, g: dict[str, Tensor], folder: Path, kind: torch.dtype = torch.float32
) -> Any:
    """The method with a run's settings and its recorded path; masks go through files."""
    run = meta["runs"][name]
    stack = golden.twin(meta["resolution"], "golden")
    if kind != torch.float32:
        stack = copy.deepcopy(stack)
    masks = None
    if run["editor"] == "MutualSelfAttentionControlMask":
        masks = [str(folder / "source.png"), str(folder / "target.png")]
        for path, mask in zip(masks, g["masks"], strict=True):
            Image.fromarray((mask * 255).numpy().astype(np.uint8)).save(path)
    source = meta["prompts"]["source"]
    made = build(
        "masactrl", stack, [Subject("it", "<it>", meta["prompts"]["source_word"], source)],
        steps=meta["steps"], cache=None, control_steps=run.get("step_idx", []), masks=masks,
        control_layers=run.get("layer_idx", []), source_text=source_text(meta, name),
        inverse_guidance=meta["guidance"] if source_text(meta, name) else 1.0,
        reference=name == "direct" or "ref_intermediate_latents" in run,
    ).to(kind)  # fmt: skip
    made.path.copy_(path_of(g, meta, name))
    return made


def source_text(meta: dict[str, Any], name: str) -> bool:
    """Whether the run's source row reads a text."""
    prompts = meta["runs"][name]["prompts"]
    return len(prompts) > 1 and prompts[0] != ""


def path_of(g: dict[str, Tensor], meta: dict[str, Any], name: str) -> Tensor:
    """The run's own pivot (T+1, C, H, W), or the one that it starts from."""
    return g.get(f"{name}.pivot", g["source_prompt.pivot" if source_text(meta, name) else "pivot"])


def drawn(made: Any, meta: dict[str, Any], name: str) -> Tensor:
    """Latents after every step (T, 2, C, H, W); a run of the target alone has a source beside it."""
    latents: list[Tensor] = []
    run = meta["runs"][name]
    rows = run["prompts"] if len(run["prompts"]) == 2 else ["", *run["prompts"]]
    edits = made.edits(rows, made.path.shape[-1], guided=True, keep=False)
    if "thres" in run:
        length = int(made.model.tokenizer.model_max_length)
        tokens = [tokens_mask(run[key], length) for key in ("ref_token_idx", "cur_token_idx")]
        edits.masks = WordMasks([torch.stack(tokens)], run["map_pixels"], run["thres"])
    start = made.path[-1:].expand(2, -1, -1, -1)
    states = made.edit_conditions(rows, "")
    work = made.denoise_calls(Drawing(start, *states, meta["guidance"], edits, lambda _, z: latents.append(z)))
    alone(made.model, work)
    return torch.stack(latents)


def inverted(made: Any, latents: Tensor) -> Tensor:
    """The path (T+1, 1, C, H, W) from latents z_0 (1, C, H, W), of the method's own text and guidance."""
    made.picture_latents = lambda: latents
    return alone(made.model, made._inversion_calls()).latents


@pytest.fixture(scope="module", params=["golden", "slice"])
def inputs(request) -> Path:
    """The full golden folder, and the slice of it that is committed."""
    return golden.folder(FOLDER) if request.param == "golden" else golden.SLICE / FOLDER


def test_picture_and_layers(inputs) -> None:
    """The cropped picture of PnPInversion's run; numbers of layers mean the authors' modules."""
    g, meta = golden.tensors(inputs / "golden.safetensors"), golden.config(inputs / "meta.json")
    picture = Image.open(inputs / "source.png").convert("RGB")
    stack = golden.twin(meta["resolution"], inputs.parent.name if inputs.parent.name == "slice" else "golden")
    made = build("masactrl", stack, [Subject("it", "<it>", "cat")], steps=5, start_layer=0)
    pixels = to_pixels(picture, meta["resolution"], made.published_crop, flip=False)
    close("mc direct.picture", (pixels.permute(1, 2, 0) + 1) * 127.5, g["direct.picture"].float(), 1e-4, absolute=True)
    assert made.control_layers == meta["self_attention_layers"]


def test_pixels_as_the_notebook_has_them(root, meta, g) -> None:
    """Not ours: nearest, without a crop. The paths below start from these."""
    levels = torch.from_numpy(np.array(Image.open(root / "source.png").convert("RGB"))).permute(2, 0, 1)[None]
    pixels = F.interpolate(levels.float() / 127.5 - 1, (meta["resolution"],) * 2)
    close("mc pixel_values", pixels, g["pixel_values"], 1e-6, absolute=True)


def test_paths_from_the_pictures(root, meta, g, tmp_path) -> None:
    """Of each run that has one of its own, and of those that share one."""
    for name in ("masactrl", "with_source", "direct"):
        made = method(meta, name, g, tmp_path)
        assert made.timesteps == meta["timesteps"]
        pixels = g["pixel_values"][0]
        if "crop" in meta["runs"][name]:
            picture = Image.open(root / "source.png").convert("RGB")
            pixels = to_pixels(picture, meta["resolution"], made.published_crop, flip=False)
        made.set_reference(0, pixels)
        alone(made.model, made.start_calls(0))
        theirs = path_of(g, meta, name)
        if source_text(meta, name):  # guidance of 7.5 enlarges rounding: in float64 ours is 4.4e-4 from their float32
            close("mc source_prompt.pivot", made.path, theirs, 1e-3, absolute=True)
        else:
            close("mc pivot", made.path, theirs, 3e-4, absolute=True)


@pytest.mark.parametrize("name", recorded("latents"))
def test_drawing(meta, g, name, tmp_path, monkeypatch) -> None:
    """After every step; row 0 of a run with reference latents is one step from each of them."""
    maps: list[Tensor] = []
    word_map = mutual_attention.word_map
    monkeypatch.setattr(mutual_attention, "word_map", lambda *given: maps.append(word_map(*given)) or maps[-1])
    made, theirs = method(meta, name, g, tmp_path), g[f"{name}.latents"]
    found = drawn(made, meta, name)
    if f"{name}.maps" in g:
        close(f"mc {name}.maps", torch.stack(maps), g[f"{name}.maps"], 1e-4, absolute=True)
    if theirs.shape[1] == 1:
        found = found[:, 1:]
    elif made.reference:
        close(f"mc {name}, source", one_step_from_each(made), theirs[:, :1], 1e-3)
        assert torch.equal(found[:, 0], made.path.flip(0)[1:])
        found, theirs = found[:, 1:], theirs[:, 1:]
    close(f"mc {name}", found, theirs, 1e-3)


def one_step_from_each(made: Any) -> Tensor:
    """One DDIM step (T, 1, C, H, W) with the empty text from each latent of the path, the noisiest first."""
    empty, found = Conditioning(made.encode([""])[None]), []
    for z, timestep in zip(made.path.flip(0)[:-1], made.timesteps, strict=True):
        noise = inversion.predict_noise(made.model, z[None], timestep, empty)
        found.append(inversion.previous(made.model, z[None], noise, timestep, made.steps))
    return torch.stack(found)


def test_direct_inversion_is_the_reference_variant(meta, g, tmp_path) -> None:
    """PnPInversion's own run: its offsets, what enters each step, and the pictures."""
    made = method(meta, "direct", g, tmp_path)
    offsets_of = build("direct_inversion", made.model, list(made.concepts), steps=meta["steps"])
    offsets_of.path.copy_(g["direct.pivot"])
    states = made.edit_conditions(meta["runs"]["direct"]["prompts"], "")
    offsets = alone(made.model, offsets_of.offset_calls(2, *states, meta["guidance"]))
    close("mc direct.offsets", offsets, g["direct.offsets"], 1e-3)
    found = drawn(made, meta, "direct")
    entering = torch.cat([made.path[-1:].expand(2, -1, -1, -1)[None], found[:-1]])
    close("mc direct.inputs", entering, g["direct.inputs"], 1e-3)
    close("mc direct.image", made._decode(found[-1]), g["direct.image"], 1e-4, absolute=True)


@pytest.mark.parametrize("name", [name for name in recorded("image") if name != "direct"])
def test_pictures(meta, g, name, tmp_path) -> None:
    made = method(meta, name, g, tmp_path)
    close("mc image", made._decode(g[f"{name}.latents"][-1]), g[f"{name}.image"], 1e-4, absolute=True)


@pytest.mark.parametrize("name", recorded("latents", "golden_f64.safetensors"))
def test_in_float64(root, meta, g, name, tmp_path, monkeypatch) -> None:
    """End to end from the picture, with the file's own table of noise levels."""
    f64, roots = golden.tensors(root / "golden_f64.safetensors"), Roots()
    made = method(meta, name, g, tmp_path, torch.float64)
    made.model.alpha_bar = g["alphas_cumprod"]
    theirs = f64["pivot"][:, None]
    states, _ = made.edit_conditions([made.source], "")
    steps = roots.learn(made.model, made.steps, states(0), theirs)
    close("mc f64 step of the path", *steps, 1e-12, absolute=True)
    monkeypatch.setattr(inversion, "move", roots.move)
    mean = made.model.vae.encode(g["pixel_values"].double()).latent_dist.mean.detach()
    # Their autoencoder's softmax is in float32: what follows starts from their latents.
    close("mc f64 latents of the picture", made.model.scale(mean), theirs[0], 1e-8, absolute=True)
    path = inverted(made, theirs[0])
    close("mc f64 pivot", path, theirs, 1e-8, absolute=True)
    made.path.copy_(path[:, 0])
    close(f"mc f64 {name}", drawn(made, meta, name), f64[f"{name}.latents"], 1e-8, absolute=True)
