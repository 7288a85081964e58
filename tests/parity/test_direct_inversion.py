"""Direct Inversion against the authors' numbers (golden/direct_inversion/README.md, whose limits these are).

Sizes, prompts and settings are meta.json's. The committed slice holds the picture and the tokens.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from hiperlab.base.editing_method import Drawing
from hiperlab.base.method import Subject
from hiperlab.data.images import to_pixels
from hiperlab.edit import prompt_to_prompt
from hiperlab.model import inversion
from hiperlab.model.shared_calls import alone
from tests.composed import build
from tests.parity import golden
from tests.parity.roots import Roots

close = golden.close
FOLDER = "direct_inversion"


@pytest.fixture(scope="module")
def root() -> Path:
    return golden.folder(FOLDER)


def pytest_generate_tests(metafunc) -> None:
    """`name` is each of the recorded runs, whatever they are."""
    if "name" in metafunc.fixturenames:
        path = golden.place(FOLDER) / "meta.json"
        runs = golden.config(path)["runs"] if path.is_file() else {}
        needed = getattr(metafunc.function, "needs", "latents")
        kept = golden.tensors(path.parent / "golden.safetensors") if runs else {}
        metafunc.parametrize("name", [run for run in runs if f"{run}.{needed}" in kept] or ["none recorded"])


def needs(item: str) -> Any:
    """Asks a test for each run that has this item."""

    def mark(test: Any) -> Any:
        test.needs = item
        return test

    return mark


def method(meta: dict[str, Any], name: str, kind: torch.dtype = torch.float32, table: Tensor | None = None) -> Any:
    """The method with a run's settings and no path yet."""
    run = meta["runs"][name]
    stack = golden.twin(meta["resolution"], "golden")
    if kind != torch.float32:
        stack = copy.deepcopy(stack)
    added = re.search(r"add-(source|target)", run["method"])
    words = run.get("eq_params", {"words": [], "values": []})
    p2p: dict[str, Any] = {
        "mode": "replace" if run["is_replace_controller"] else "refine",
        "tau_c": meta["cross_replace"], "tau_s": meta["self_replace"],
        "equalizer": dict(zip(words["words"], words["values"], strict=True)),
    }  # fmt: skip
    if "blend_word" in run:
        p2p |= {
            "blend": [pair[0] for pair in run["blend_word"]],
            "blend_threshold": run["blend_threshold"],
            "map_pixels": run["map_pixels"],
        }
    made = build(
        "direct_inversion", stack, [Subject("it", "<it>", meta["prompts"]["source_word"], run["source"])],
        steps=meta["steps"], cache=None, p2p=p2p, target_offset=added[1] if added else "none",
        inverse_guidance=run.get("inverse_guidance", 1.0), offset_scale=run.get("scale", 1.0),
        offset_interval=run.get("interval", 1),
    )  # fmt: skip
    made = made.to(kind)
    if table is not None:  # the authors' own, in float32 whatever the network's type
        made.model.alpha_bar = table
    return made


def recorded_path(g: dict[str, Tensor], name: str) -> Tensor:
    """The run's own pivot (T+1, C, H, W), or the one that most share."""
    return g.get(f"{name}.pivot", g["pivot"])[:, 0]


def guidance(meta: dict[str, Any], name: str) -> float:
    return float(meta["runs"][name].get("forward_guidance", meta["guidance"]))


def texts(meta: dict[str, Any], name: str) -> list[str]:
    return [meta["runs"][name]["source"], meta["runs"][name]["target"]]


def drawn(made: Any, rows: list[str], scale: float, controlled: bool = True) -> tuple[Tensor, Tensor]:
    """Latents after every step (T, B, C, H, W), and the masks of those that blend (_, B, 1, H, W)."""
    latents, masks = [], []
    side = made.path.shape[-1]
    edits = made.p2p.edits(made.model.tokenizer, rows[0], rows[1:], made.steps, side, True) if controlled else None

    def watch(step: int, z: Tensor) -> None:
        latents.append(z)
        if edits and edits.blends and step + 1 > int(prompt_to_prompt.BLEND_START * made.steps):
            masks.append(edits.mask(edits.maps(), edits.pairs[0], (side, side)))

    start = made.path[-1:].expand(len(rows), -1, -1, -1)
    alone(made.model, made.denoise_calls(Drawing(start, *made.edit_conditions(rows, ""), scale, edits, watch)))
    return torch.stack(latents), torch.stack(masks) if masks else torch.empty(0)


def offsets(made: Any, rows: list[str], scale: float) -> Tensor:
    """Offsets d (T, B, C, H, W) of all rows, also of those that the method does not need."""
    return alone(made.model, made.offset_calls(len(rows), *made.edit_conditions(rows, ""), scale))


def levels(pictures: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] as the authors write them: (B, H, W, 3), levels rounded down."""
    return (pictures * 255).floor().permute(0, 2, 3, 1)


@pytest.fixture(scope="module", params=["golden", "slice"])
def inputs(request) -> Path:
    """The full golden folder, and the slice of it that is committed."""
    return golden.folder(FOLDER) if request.param == "golden" else golden.SLICE / FOLDER


def test_picture_and_tokens(inputs) -> None:
    g, meta = golden.tensors(inputs / "golden.safetensors"), golden.config(inputs / "meta.json")
    picture = Image.open(inputs / "source.png").convert("RGB")
    pixels = to_pixels(picture, meta["resolution"], "square", flip=False)
    close("di image", (pixels.permute(1, 2, 0) + 1) * 127.5, g["image"].float(), 1e-4, absolute=True)
    prompts = [meta["prompts"][name] for name in ("source", "replace", "refine")] + [""]
    stack = golden.twin(meta["resolution"], inputs.parent.name if inputs.parent.name == "slice" else "golden")
    assert torch.equal(stack.tokenize(prompts).ids, g["input_ids"])
    if "text_emb" in g:
        close("di text_emb", stack.encode_text(prompts), g["text_emb"], 1e-5, absolute=True)


@needs("offsets")
def test_path_from_the_picture(root, meta, g, name) -> None:
    """Of the run's guidance, by the method from the picture's file."""
    made = method(meta, name)
    picture = Image.open(root / "source.png").convert("RGB")
    made.set_reference(0, to_pixels(picture, meta["resolution"], made.published_crop, flip=False))
    assert made.timesteps == meta["timesteps"]
    alone(made.model, made.start_calls(0))
    close("di pivot", made.path, recorded_path(g, name), 1e-4, absolute=True)


@needs("offsets")
def test_offsets(meta, g, name) -> None:
    made = method(meta, name)
    made.path.copy_(recorded_path(g, name))
    found = offsets(made, texts(meta, name), guidance(meta, name))
    close("di offsets", found, g[f"{name}.offsets"], 1e-3, absolute=True)


@needs("latents")
def test_drawing(meta, g, name, monkeypatch) -> None:
    """After every step, behind offset and blend."""
    run = meta["runs"][name]
    monkeypatch.setattr(prompt_to_prompt, "BLEND_START", run.get("start_blend", prompt_to_prompt.BLEND_START))
    made = method(meta, name)
    made.path.copy_(recorded_path(g, name))
    found, masks = drawn(made, texts(meta, name), guidance(meta, name))
    theirs = g[f"{name}.latents"]
    if f"{name}.masks" in g:
        assert torch.equal(masks, g[f"{name}.masks"].bool())
    if made.target_offset == "target":  # large offsets cancel in its row
        close(f"di {name}, target", found[:, 1], theirs[:, 1], 6e-3, absolute=True)
        found, theirs = found[:, :1], theirs[:, :1]
    close(f"di {name}", found, theirs, 1e-3)


@needs("recon.latents")
def test_drawing_without_control(meta, g, name) -> None:
    made = method(meta, name)
    made.path.copy_(recorded_path(g, name))
    found, _ = drawn(made, texts(meta, name), guidance(meta, name), controlled=False)
    if made.target_offset == "target":
        close("di recon, target", found[:, 1], g[f"{name}.recon.latents"][:, 1], 6e-3, absolute=True)
    close("di recon", found[:, :1], g[f"{name}.recon.latents"][:, :1], 1e-3)
    if made.target_offset != "target":
        close("di recon", found, g[f"{name}.recon.latents"], 1e-3)


@needs("image")
def test_pictures(meta, g, name) -> None:
    """The edit, and the strip's input and reconstruction, within a level."""
    made = method(meta, name)
    found = levels(made._decode(g[f"{name}.latents"][-1]))
    close("di image of a run", found, g[f"{name}.image"].float(), 1, absolute=True)
    again = levels(made._decode(recorded_path(g, name)[:1]))
    close("di image_rec", again[0], g["image_rec"].float(), 1, absolute=True)
    if f"{name}.strip" in g:
        strip = torch.cat([g["image"].float(), again[0], found[1]], dim=1)
        close("di strip", strip, g[f"{name}.strip"][:, meta["resolution"] :].float(), 1, absolute=True)


def recorded_in_float64() -> list[str]:
    path = golden.place(FOLDER) / "golden_f64.safetensors"
    names = golden.tensors(path) if path.is_file() else {}
    return [name.removesuffix(".latents") for name in names if name.endswith(".latents")] or ["none recorded"]


@pytest.mark.parametrize("which", recorded_in_float64())
def test_in_float64(root, meta, g, which, monkeypatch) -> None:
    """The picture's latents, and all that follows from theirs, with the file's own table of noise levels."""
    f64, roots = golden.tensors(root / "golden_f64.safetensors"), Roots()
    made = method(meta, which, torch.float64, g["alphas_cumprod"])
    states, _ = made.edit_conditions([made.source], "")
    close(
        "di f64 step of the path", *roots.learn(made.model, made.steps, states(0), f64["pivot"]), 1e-12, absolute=True
    )
    monkeypatch.setattr(inversion, "move", roots.move)
    # Ours rounds the posterior and the picture's levels to float32, theirs did not.
    pixels = g["image"].permute(2, 0, 1)[None].double() / 127.5 - 1
    mean = made.model.vae.encode(pixels).latent_dist.mean.detach()
    close("di f64 latents of the picture", made.model.scale(mean), f64["pivot"][0], 1e-8, absolute=True)
    path = inversion.invert(made.model, f64["pivot"][0], states(0), made.steps).latents
    close("di f64 pivot", path, f64["pivot"], 1e-7, absolute=True)
    made.path.copy_(path[:, 0])
    rows, scale = texts(meta, which), guidance(meta, which)
    close("di f64 offsets", offsets(made, rows, scale), f64[f"{which}.offsets"], 1e-7, absolute=True)
    found, _ = drawn(made, rows, scale)
    close("di f64 latents", found, f64[f"{which}.latents"], 1e-7, absolute=True)
