"""Plug-and-play features against the authors' numbers (golden/plug_and_play/README.md, whose limits these are).

Sizes, prompts and settings are meta.json's. The committed slice holds the picture.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from hiperlab.base.editing_method import Drawing
from hiperlab.base.method import Subject
from hiperlab.data.images import to_pixels
from hiperlab.edit.prompt_to_prompt import edit
from hiperlab.model import inversion
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.shared_calls import alone
from tests.composed import build
from tests.parity import golden
from tests.parity.roots import Roots

close = golden.close
FOLDER = "plug_and_play"


@pytest.fixture(scope="module")
def root() -> Path:
    return golden.folder(FOLDER)


def recorded(item: str, file: str = "golden.safetensors") -> list[str]:
    """The runs that have this item, whatever they are."""
    path = golden.place(FOLDER) / file
    names = golden.tensors(path) if path.is_file() else {}
    found = [name.removesuffix(f".{item}") for name in names if name.endswith(f".{item}")]
    return [name for name in found if name != "reconstruction"] or ["none recorded"]


def method(meta: dict[str, Any], name: str, kind: torch.dtype = torch.float32, source: str = "golden") -> Any:
    """The method with a run's settings and no path yet."""
    run = meta["runs"][name]
    stack = golden.twin(meta["resolution"], source)
    if kind != torch.float32:
        stack = copy.deepcopy(stack)
    text = meta["inversion_prompt"]
    return build(
        "plug_and_play", stack, [Subject("it", "<it>", meta["prompts"]["source_word"], text or "a picture")],
        steps=meta["steps"], cache=None, inversion_steps=meta["inversion_steps"], source_text=bool(text),
        tau_f=run["pnp_f_t"], tau_a=run["pnp_attn_t"],
    ).to(kind)  # fmt: skip


def drawn(made: Any, meta: dict[str, Any], name: str) -> Tensor:
    """The target's latents after every step (T, 1, C, H, W)."""
    latents: list[Tensor] = []
    rows = ["", meta["runs"][name]["prompt"]]
    edits = made.edits(rows, made.path.shape[-1], guided=True, keep=False)
    states = made.edit_conditions(rows, meta["negative_prompt"])
    start = made.path[-1:].expand(2, -1, -1, -1)
    work = made.denoise_calls(Drawing(start, *states, meta["guidance"], edits, lambda _, z: latents.append(z[1:])))
    alone(made.model, work)
    return torch.stack(latents)


def from_path(made: Any, pivot: Tensor) -> Any:
    """The method on a recorded path (N+1, C, H, W)."""
    made.path.copy_(pivot[made.levels])
    return made


def inverted(made: Any, latents: Tensor) -> Tensor:
    """The path (N+1, C, H, W) from latents z_0 (1, C, H, W)."""
    made.picture_latents = lambda: latents
    return alone(made.model, made._inversion_calls()).latents[:, 0]


@pytest.fixture(scope="module", params=["golden", "slice"])
def inputs(request) -> Path:
    """The full golden folder, and the slice of it that is committed."""
    return golden.folder(FOLDER) if request.param == "golden" else golden.SLICE / FOLDER


def test_picture_and_layers(inputs) -> None:
    g, meta = golden.tensors(inputs / "golden.safetensors"), golden.config(inputs / "meta.json")
    made = method(
        meta, next(iter(meta["runs"])), source=inputs.parent.name if inputs.parent.name == "slice" else "golden"
    )
    picture = Image.open(inputs / "source.png").convert("RGB")
    pixels = to_pixels(picture, meta["resolution"], made.published_crop, flip=False)[None]
    close("pnp image", pixels / 2 + 0.5, g["image"], 1e-6, absolute=True)
    assert made.convolution == f"{meta['conv_layer']}.conv2"
    assert made.attention_layers == meta["attention_layers"]
    assert made.timesteps == meta["timesteps"]
    assert inversion.timesteps(made.inversion_steps)[::-1] == meta["inversion_timesteps"]


def test_path_from_the_picture(root, meta, g) -> None:
    """The method keeps the levels of a drawing, and starts at the noisiest of them."""
    made = method(meta, next(iter(meta["runs"])))
    picture = Image.open(root / "source.png").convert("RGB")
    made.set_reference(0, to_pixels(picture, meta["resolution"], made.published_crop, flip=False))
    close("pnp latent0", made.picture_latents(), g["latent0"], 1e-5, absolute=True)
    start = alone(made.model, made.start_calls(0))
    close("pnp pivot", made.inversion.latents[:, 0], g["pivot"], 4e-4, absolute=True)
    close("pnp pivot, start", start, g["start"], 4e-4, absolute=True)
    assert torch.equal(from_path(made, g["pivot"]).path[-1:], g["start"])
    assert torch.equal(made.path[0], g["latent0"][0])


def test_reconstruction(meta, g) -> None:
    """Plain DDIM back from the path's very end."""
    made = method(meta, next(iter(meta["runs"])))
    states = Conditioning(made.encode([meta["inversion_prompt"]])[None])
    found = edit(made.model, g["pivot"][-1:], made.inversion_steps, lambda i: states, lambda i: states, 1.0)
    close("pnp reconstruction.latent", found, g["reconstruction.latent"], 1e-3)
    close("pnp image", made._decode(g["reconstruction.latent"]), g["reconstruction.image"], 1e-4, absolute=True)


@pytest.mark.parametrize("name", recorded("latents"))
def test_drawing(meta, g, name) -> None:
    made = from_path(method(meta, name), g["pivot"])
    close(f"pnp {name}", drawn(made, meta, name), g[f"{name}.latents"], 1e-3)


@pytest.mark.parametrize("name", recorded("conv_before_injection"))
def test_what_is_injected(meta, g, name) -> None:
    """At the first and the last step, source, negative and target: what the layers give before rows are exchanged."""
    made = from_path(method(meta, name), g["pivot"])
    first = made.model.unet.get_submodule(meta["attention_layers"][0])
    layers = {"q": first.to_q, "k": first.to_k, "conv": made.model.unet.get_submodule(made.convolution)}
    seen: dict[str, list[Tensor]] = {key: [] for key in layers}
    hooks = [
        layer.register_forward_hook(lambda _, given, output, key=key: seen[key].append(output))
        for key, layer in layers.items()
    ]
    try:
        drawn(made, meta, name)
    finally:
        for hook in hooks:
            hook.remove()
    for key, outputs in seen.items():
        theirs = g[f"{name}.{key}_before_injection"]
        close(f"pnp {key}, first step", outputs[0], theirs[0], 1e-4)
        close(f"pnp {key}, last step", outputs[-1], theirs[-1], 1e-3)


@pytest.mark.parametrize("name", recorded("image"))
def test_pictures(meta, g, name) -> None:
    made = method(meta, name)
    close("pnp image", made._decode(g[f"{name}.latents"][-1]), g[f"{name}.image"], 1e-4, absolute=True)


@pytest.mark.parametrize("name", recorded("latents", "golden_f64.safetensors"))
def test_in_float64(root, meta, g, name, monkeypatch) -> None:
    """End to end from the picture, with the file's own table of noise levels."""
    f64, roots = golden.tensors(root / "golden_f64.safetensors"), Roots()
    made = method(meta, name, torch.float64)
    made.model.alpha_bar = g["alphas_cumprod"]
    states = Conditioning(made.encode([meta["inversion_prompt"]])[None])
    steps = roots.learn(made.model, made.inversion_steps, states, f64["pivot"][:, None])
    close("pnp f64 step of the path", *steps, 1e-12, absolute=True)
    monkeypatch.setattr(inversion, "move", roots.move)
    mean = made.model.vae.encode(g["image"].double() * 2 - 1).latent_dist.mean.detach()
    close("pnp f64 latents of the picture", made.model.scale(mean), f64["pivot"][:1], 1e-8, absolute=True)
    path = inverted(made, f64["pivot"][:1])
    close("pnp f64 pivot", path, f64["pivot"], 1e-7, absolute=True)
    close(f"pnp f64 {name}", drawn(from_path(made, path), meta, name), f64[f"{name}.latents"], 1e-7, absolute=True)
