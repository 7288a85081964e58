"""Attention maps, Prompt-to-Prompt, DDIM inversion and editing against the numbers of StyleDiffusion's authors.

Items are named as in golden/stylediffusion/README.md; limits are ten times the figures it gives, relative to the
largest reference value.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from hiperlab.model.conditioning import Conditioning
from hiperlab.model.control import Record
from hiperlab.model.inversion import invert, move, predict_noise, previous, timesteps
from tests.parity import golden

SIDE = 128  # pixels: latents are 16 x 16


@pytest.fixture(scope="module")
def root() -> Path:
    return golden.folder("stylediffusion")


@pytest.fixture(scope="module")
def twin():
    return golden.twin(SIDE, "golden")


def read(root: Path, name: str) -> dict[str, Tensor]:
    return golden.tensors(root / f"{name}.safetensors")


def meta(root: Path, name: str) -> dict[str, str]:
    with safe_open(root / f"{name}.safetensors", "pt") as file:
        return file.metadata()


def close(item: str, ours: Tensor, theirs: Tensor, limit: float) -> None:
    golden.close(f"stylediffusion {item}", ours, theirs, limit)


def text(twin, prompt: str) -> Conditioning:
    return Conditioning(twin.encode_text([prompt])[None])


def test_common(root, twin) -> None:
    g, m = read(root, "common"), meta(root, "common")
    for name in ("src", "tgt", "refine", "uncond"):
        prompt = m.get(f"prompt_{name}", "")
        assert torch.equal(twin.tokenize([prompt]).ids, g[f"input_ids.{name}"])
        close(f"common text_emb.{name}", twin.encode_text([prompt]), g[f"text_emb.{name}"], 4e-6)
    for steps, name in ((6, "timesteps"), (30, "timesteps_30"), (50, "timesteps_50")):
        assert timesteps(steps) == g[name].flip(0).tolist()
    close("common alphas_cumprod", twin.alpha_bar, g["alphas_cumprod"], 1e-6)
    assert float(g["final_alpha_cumprod"]) == float(g["alphas_cumprod"][0])


def test_ddim(root, twin) -> None:
    g, m = read(root, "ddim"), meta(root, "ddim")
    steps = int(m["num_ddim_steps"])
    source, empty = text(twin, m["prompt_src"]), text(twin, "")
    found = invert(twin, g["latents"][:1], source, steps, lambda layer, size: layer.cross and size == 256)
    close("ddim latents", found.latents[:, 0], g["latents"], 2e-5)
    for k in (1, steps - 1):
        number = {"down": 0, "up": 0}
        for layer, maps in found.maps.items():
            name = f"attn_target.{k}.{layer.place}_cross.{number[layer.place]}"
            number[layer.place] += 1
            close("ddim attn_target", maps[k, 0].mean(0), g[f"{name}.headmean"], 8e-6)
            if f"{name}.first12tokens" in g:
                close("ddim attn_target, all heads", maps[k, 0, :, :, :12], g[f"{name}.first12tokens"], 8e-6)
        assert number == {"down": 2, "up": 3}
    for guidance in (1.0, 7.5):
        z = g["latents"][-1:]
        for step, t in enumerate(reversed(timesteps(steps))):
            with torch.no_grad():
                noise = predict_noise(twin, z, t, source)
                if guidance > 1:
                    without = predict_noise(twin, z, t, empty)
                    noise = without + guidance * (noise - without)
            z = previous(twin, z, noise, t, steps)
            close(f"ddim recon_w{guidance}", z, g[f"recon_w{guidance}"][step + 1 : step + 2], 2e-4)


def test_moves_are_inverse_to_each_other() -> None:
    z, noise = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)).unbind(0)
    a, b = torch.tensor(0.3), torch.tensor(0.9)
    torch.testing.assert_close(move(move(z, noise, a, b), noise, b, a), z, atol=1e-5, rtol=0)


@torch.no_grad()
def test_unet_kv(root, twin) -> None:
    g, m = read(root, "unet_kv"), meta(root, "unet_kv")
    both = Conditioning(g["context_k"][None], g["context_v"][None])
    for t in (1, 401, 958):
        for name, states in (("kv", both), ("plain", Conditioning(g["context_k"][None])), ("uncond", text(twin, ""))):
            close(f"unet_kv noise_{name}", predict_noise(twin, g["x"], t, states), g[f"noise_{name}.t{t}"], 1.5e-5)
    close("unet_kv context_k", twin.encode_text([m["prompt_src"]]), g["context_k"], 4e-6)
    seen: dict[str, Tensor] = {}
    modules = dict(twin.unet.named_modules())
    names = [name.removeprefix("attn2_out.") for name in g if name.startswith("attn2_out.")]
    handles = [
        modules[name].register_forward_hook(lambda _, __, out, name=name: seen.update({name: out})) for name in names
    ]
    predict_noise(twin, g["x"], 401, both)
    plain = dict(seen)
    predict_noise(twin, g["x"], 401, both.controlled(Record(lambda layer, size: True)))
    for handle in handles:
        handle.remove()
    for name in names:
        close("unet_kv attn2_out", plain[name], g[f"attn2_out.{name}"], 1.5e-5)
        close("unet_kv attn2_out, maps made", seen[name], g[f"attn2_out.{name}"], 1.5e-5)


@torch.no_grad()
def test_attn(root, twin) -> None:
    g, m = read(root, "attn"), meta(root, "attn")
    states = Conditioning(twin.encode_text([m["prompt_src"], m["prompt_tgt"]])[None])
    records = []
    for t in (958, 1):
        records.append(Record(lambda layer, size: size <= 1024))
        predict_noise(twin, g["x"].expand(2, -1, -1, -1), t, states.controlled(records[-1]))
    number: dict[str, int] = {}
    for layer, maps in records[0].maps.items():
        kind = f"{layer.place}_{'cross' if layer.cross else 'self'}"
        name = f"step0.{kind}.{number.setdefault(kind, 0)}"
        number[kind] += 1
        mean = maps.mean(1)
        close("attn maps", mean[:1, ::4] if maps.shape[2] == 256 else mean, g[f"{name}.headmean"], 2.4e-5)
        if f"{name}.full" in g:
            close("attn maps, all heads", maps.flatten(0, 1), g[f"{name}.full"], 2.4e-5)
    assert number == {f"{place}_{kind}": n for place, n in (("down", 6), ("mid", 1), ("up", 9)) for kind in KINDS}
    for side in (16, 8, 4):
        for row in (0, 1):
            chosen = [
                maps[row]
                for record in records
                for layer, maps in record.maps.items()
                if layer.cross and layer.place != "mid" and maps.shape[2] == side * side
            ]
            mean = torch.cat(chosen).mean(0).view(side, side, -1)
            close("attn aggregates", mean, g[f"aggregate.cross.res{side}.select{row}"], 3e-6)


KINDS = ("cross", "self")
