"""Edit-friendly DDPM inversion against the authors' numbers (golden/edit_friendly_ddpm/README.md, with its limits).

Sizes, prompts and settings are meta.json's. The committed slice holds the picture and the diffused latents.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from hiperlab.base.editing_method import Drawing
from hiperlab.base.method import Subject
from hiperlab.data.images import to_pixels
from hiperlab.method import edit_friendly
from hiperlab.method.edit_friendly import Coefficients
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.inversion import predict_noise
from hiperlab.model.shared_calls import alone
from tests.composed import build
from tests.parity import golden

close = golden.close
FOLDER = "edit_friendly_ddpm"
MODES = {"AttentionStore": "auto", "AttentionReplace": "replace", "AttentionRefine": "refine"}


@pytest.fixture(scope="module")
def root() -> Path:
    return golden.folder(FOLDER)


@pytest.fixture(scope="module", params=["golden", "slice"])
def inputs(request) -> Path:
    """The full golden folder, and the slice of it that is committed."""
    return golden.folder(FOLDER) if request.param == "golden" else golden.SLICE / FOLDER


def recorded(kind: str) -> list[str]:
    """Runs of this kind."""
    path = golden.place(FOLDER) / "meta.json"
    runs = golden.config(path)["runs"] if path.is_file() else {}
    return [name for name, run in runs.items() if run["kind"] == kind] or ["none recorded"]


def in_float64() -> list[str]:
    path = golden.place(FOLDER) / "golden_f64.safetensors"
    names = golden.tensors(path) if path.is_file() else {}
    return [name.removesuffix(".latents") for name in names if name.endswith(".latents")] or ["none recorded"]


def method(
    inversion: dict[str, Any], edit: dict[str, Any] | None = None, size: int = 128, kind: torch.dtype = torch.float32,
    source: str = "golden",
) -> Any:  # fmt: skip
    """The method with a recorded inversion's settings, and an edit's."""
    settings: dict[str, Any] = {"skip": 0.0, "mode": "plain"}
    if edit is not None:
        settings["skip"] = edit["skip"] / inversion["steps"]
    if edit is not None and edit["cross_replace"] is not None:
        mode = MODES[edit.get("controller", "AttentionReplace")]
        settings |= {
            "mode": "p2p",
            "p2p": {"mode": mode, "tau_c": edit["cross_replace"], "tau_s": edit["self_replace"]},
        }
    if edit is not None and "self_replace_max_pixels" in edit:
        settings["self_pixels"] = edit["self_replace_max_pixels"]
    stack = golden.twin(size, source)
    etas = inversion["eta"] if isinstance(inversion["eta"], list) else [inversion["eta"]]
    text = inversion["prompt"] if "prompt" in inversion else inversion["prompts"][0]
    made = build(
        "edit_friendly", stack if kind == torch.float32 else copy.deepcopy(stack), [Subject("it", "<it>", "cat", text)],
        steps=inversion["steps"], guidance_source=inversion["guidance_source"], eta=etas, **settings,
    )  # fmt: skip
    made.source = text  # also an empty one, which a data set cannot give
    return made.to(kind)


def drawn(made: Any, edit: dict[str, Any], inversion: dict[str, Any], path: Tensor, maps: Tensor) -> Tensor:
    """Latents of the recorded rows after every step (K, B, C, H, W), from the recorded path and maps."""
    made.noise.copy_(path[made.made])
    made.maps.copy_(maps[: made.made])
    prompts, scales = edit["prompts"], [float(scale) for scale in edit["guidance"]]
    alone_in_call = len(prompts) == 1 and (prompts[0], scales[0]) != (made.source, made.guidance_source)
    rows = [made.source, *prompts] if alone_in_call else prompts  # ours draws the source beside every target
    if not alone_in_call:
        assert rows[0] == made.source and scales[0] == inversion["guidance_source"]
    found: list[Tensor] = []
    side = path.shape[-1]
    edits = made.p2p.edits(made.model.tokenizer, rows[0], rows[1:], made.steps, side, made.is_guided(scales[-1]))
    start = alone(made.model, made.start_calls(0)).expand(len(rows), -1, -1, -1)
    watch = lambda _, z: found.append(z)  # noqa: E731
    alone(made.model, made.denoise_calls(Drawing(start, *made.edit_conditions(rows, ""), scales[-1], edits, watch)))
    return torch.stack(found)[:, 1:] if alone_in_call else torch.stack(found)


def compare_inversion(item: str, made: Any, g: dict[str, Tensor], prefix: str, latents: Tensor, limit: float) -> None:
    """Path and noise maps from the recorded noise; a map counts as much as its step adds of it."""
    path, maps = alone(made.model, made.map_calls(latents, g[f"{prefix}noise"]))
    sigmas = torch.stack([made.coefficients(k).sigma for k in range(len(maps))])[:, None, None, None]
    close(f"{item} xts", path, g[f"{prefix}xts"], limit, absolute=True)
    close(f"{item} sigma zs", sigmas * maps, sigmas * g[f"{prefix}zs"], limit, absolute=True)


def test_diffused_latents(inputs) -> None:
    """They need the noise levels alone."""
    g, meta = golden.tensors(inputs / "golden.safetensors"), golden.config(inputs / "meta.json")
    picture = Image.open(inputs / "source.png").convert("RGB")
    pixels = to_pixels(picture, meta["resolution"], "square", flip=False)[None]
    close("ef pixel_values", pixels, g["pixel_values"], 1e-6, absolute=True)
    found = 0
    for name, run in meta["runs"].items():
        if run["kind"] == "inversion" and f"{name}.xts_drawn" in g:
            made = method(run, size=meta["resolution"], source="slice" if inputs.parent == golden.SLICE else "golden")
            assert made.timesteps == run["timesteps"]
            path = made.diffused(g["latent0"], g[f"{name}.noise"])
            close("ef xts_drawn", path, g[f"{name}.xts_drawn"], 2e-6, absolute=True)
            found += 1
    assert found, "no run has diffused latents"


def test_latents_of_the_picture(root, meta, g) -> None:
    made = method(meta["runs"][recorded("inversion")[0]], size=meta["resolution"])
    made.set_reference(
        0, to_pixels(Image.open(root / "source.png").convert("RGB"), meta["resolution"], "square", False)
    )
    close("ef latent0", made.picture_latents(), g["latent0"], 1e-5, absolute=True)


@pytest.mark.parametrize("name", recorded("inversion"))
def test_inversion(meta, g, name) -> None:
    made = method(meta["runs"][name], size=meta["resolution"])
    compare_inversion(f"ef {name}", made, g, f"{name}.", g["latent0"], 1e-4)


@pytest.mark.parametrize("name", recorded("edit"))
def test_edit(meta, g, name) -> None:
    edit = meta["runs"][name]
    inversion = meta["runs"][edit["inversion"]]
    made = method(inversion, edit, meta["resolution"])
    found = drawn(made, edit, inversion, g[f"{edit['inversion']}.xts"], g[f"{edit['inversion']}.zs"])
    close(f"ef {name}", found, g[f"{name}.latents"], 1e-3)
    if f"{name}.decoded" in g:
        decoded = made.model.decode(g[f"{name}.latents"][-1])
        close("ef decoded", decoded, g[f"{name}.decoded"], 1e-3, absolute=True)


@pytest.mark.parametrize("name", recorded("inversion and edit"))
def test_inversion_and_edit(root, meta, name) -> None:
    """At a size where the largest self-attention maps are not exchanged."""
    run, g = meta["runs"][name], golden.tensors(root / f"{name}.safetensors")
    made = method(run, size=run["resolution"])
    compare_inversion(f"ef {name}", made, g, "", g["latent0"], 1e-4)
    made = method(run, run, run["resolution"])
    close(f"ef {name} replace", drawn(made, run, run, g["xts"], g["zs"]), g["replace.latents"], 1e-3)


def neighbours(value: Tensor, most: int = 2) -> list[Tensor]:
    """A float32 number and those at most so many last digits away, the nearest first."""
    found = [value]
    for end in (0.0, 2.0):
        beside = value
        for _ in range(most):
            beside = torch.nextafter(beside, torch.tensor(end))
            found.append(beside)
    return found


def learn(made: Any, g: dict[str, Tensor], last: tuple[Tensor, Tensor, Tensor]) -> dict[int, Coefficients]:
    """By timestep, the coefficients as the recording machine's float32 had them: last digits off the rounded ones.

    Each step is linear in them and holds to 1e-12 for one choice only, which is found from the recorded path and maps;
    that of the last step, which has no map, from `last`: latents before, predicted noise, latents after.

    Args:
        made: the method, in float64, with the file's table.
        g: the recorded path, maps and noise.
        last: as said, one row each.
    """
    x, z, found = g["xts"], g["zs"], {}
    below = neighbours(made.coefficients(0).below)
    for k, timestep in enumerate(reversed(made.timesteps)):
        of = made.coefficients(k)
        signal, noise = best(diffusing(x[0], g["noise"][k], x[k + 1]), neighbours(of.signal), neighbours(of.noise))
        if k == 0:
            error = stepping(replace(of, signal=signal, noise=noise), *last, torch.zeros_like(last[2]))
        else:
            predicted = alone(made.model, made._source_noise_calls(x[k + 1][None], k))
            error = stepping(replace(of, signal=signal, noise=noise), x[k + 1], predicted, x[k], z[k])
        lower, direction, sigma = best(error, below, neighbours(of.direction, 8), neighbours(of.sigma, 8 if k else 0))
        found[timestep] = Coefficients(signal, noise, lower, direction, sigma)
        below = [signal]
    return found


def best(error: Callable[..., Tensor], *choices: list[Tensor]) -> tuple[Tensor, ...]:
    """The choice with the smallest error."""
    chosen = min(itertools.product(*choices), key=lambda values: float(error(*values).abs().max()))
    close("ef f64 coefficients", error(*chosen), torch.zeros_like(error(*chosen)), 1e-12, absolute=True)
    return chosen


def diffusing(clean: Tensor, noise: Tensor, after: Tensor) -> Callable[..., Tensor]:
    return lambda signal, share: signal * clean + share * noise - after


def stepping(of: Coefficients, before: Tensor, noise: Tensor, after: Tensor, added: Tensor) -> Callable[..., Tensor]:
    return lambda below, direction, sigma: (
        replace(of, below=below, direction=direction).mean(before, noise) + sigma * added - after
    )


@pytest.mark.parametrize("name", in_float64())
def test_in_float64(root, meta, g, name, monkeypatch) -> None:
    """Maps and edits from the recorded noise, with the file's own table of noise levels."""
    f64, edit = golden.tensors(root / "golden_f64.safetensors"), meta["runs"][name]
    inversion = meta["runs"][edit["inversion"]]
    made = method(inversion, size=meta["resolution"], kind=torch.float64)
    made.model.alpha_bar = g["alphas_cumprod"]
    plain = next(run for run in in_float64() if len(meta["runs"][run]["prompts"]) == 1)  # no attention control
    before, after = f64[f"{plain}.latents"][-2:]
    texts = [Conditioning(made.encode([text])[None]) for text in ("", meta["runs"][plain]["prompts"][0])]
    without, within = (predict_noise(made.model, before, made.timesteps[-1], text) for text in texts)
    predicted = without + meta["runs"][plain]["guidance"][0] * (within - without)
    learnt = learn(made, f64, (before, predicted, after))
    monkeypatch.setattr(edit_friendly, "coefficients", lambda stack, timestep, *settings: learnt[timestep])
    compare_inversion("ef f64", made, f64, "", f64["latent0"], 1e-7)
    made = method(inversion, edit, meta["resolution"], torch.float64)
    made.model.alpha_bar = g["alphas_cumprod"]
    found = drawn(made, edit, inversion, f64["xts"], f64["zs"])
    close(f"ef f64 {name}", found, f64[f"{name}.latents"], 1e-7, absolute=True)
