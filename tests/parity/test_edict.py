"""EDICT against numbers of the authors' code (salesforce/EDICT) on the tiny model, in float64.

Sizes, prompts and settings are meta.json's. The whole recording is committed; another one of the same form is a golden
folder "edict" on the twin of the others.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from hiperlab.base.editing_method import Drawing
from hiperlab.base.method import Subject
from hiperlab.data.images import to_pixels
from hiperlab.method.edict import invert_calls
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.inversion import following, predict_noise, previous
from hiperlab.model.noise import sample_posterior
from hiperlab.model.shared_calls import alone
from hiperlab.model.stack import FrozenStack
from hiperlab.model.tiny import tiny
from tests.composed import build
from tests.parity import golden

close = golden.close
GOLDEN = "edict"
COUPLED = ("edit", "recon", "odd", "p1", "noleap", "p2p")
LIMIT = 1e-10  # of latents, relative


class _Embedding(nn.Module):
    """The timestep's sines in float64, as the authors' copy of diffusers has them; today's are float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, timesteps: Tensor) -> Tensor:
        rates = torch.exp(torch.arange(self.width // 2, dtype=torch.float64) * (-math.log(10000) * 2 / self.width))
        angles = timesteps[:, None].double() * rates
        return torch.cat([angles.cos(), angles.sin()], dim=1)


@pytest.fixture(scope="module")
def stack(meta, g) -> FrozenStack:
    if "tiny_seed" in meta:
        found = tiny(seed=meta["tiny_seed"], size=meta["resolution"])
    else:
        found = copy.deepcopy(golden.twin(meta["resolution"], "golden"))
    found.double()
    found.unet.time_proj = _Embedding(found.unet.config["block_out_channels"][0])
    found.alpha_bar = g["alphas_cumprod"]
    return found


def run(meta: dict[str, Any], name: str) -> dict[str, Any]:
    if name not in meta["runs"]:
        pytest.skip(f"no run {name!r} was recorded")
    return meta["runs"][name]


def method(stack: FrozenStack, meta: dict[str, Any], name: str) -> Any:
    """The method with a run's settings and no pair yet."""
    how = run(meta, name)
    return build(
        "edict", stack, [Subject("it", "<it>", "cat", how["inversion_prompt"])], seed=meta["seed"],
        steps=meta["steps"], cache=None, strength=how["strength"], mix_weight=how["mix_weight"],
        leapfrog=how["leapfrog_steps"], guidance_source=how["guidance"], use_p2p=how.get("use_p2p", False),
    ).double()  # fmt: skip


def kept(how: dict[str, Any], seen: list[Tensor]) -> Tensor:
    """The steps that were recorded (n, 2, C, H, W)."""
    return torch.cat([seen[k] for k in how["kept_steps"]] if "kept_steps" in how else seen)


class Noted:
    """The guided noise that a method's calls give, in their order."""

    def __init__(self, made: Any, monkeypatch: Any) -> None:
        self.seen: list[Tensor] = []
        self.ask = made._guided_calls
        monkeypatch.setattr(made, "_guided_calls", self.note)

    def note(self, *args: Any, **how: Any) -> Any:
        found = yield from self.ask(*args, **how)
        self.seen.append(found)
        return found


def test_latents_of_the_picture(root, stack, meta, g, monkeypatch) -> None:
    """Their crop, and their draw from the posterior. Ours goes through float32."""
    made = method(stack, meta, "edit")
    picture = Image.open(root / "source.png").convert("RGB")
    made.set_reference(0, to_pixels(picture, meta["resolution"], made.published_crop, flip=False))
    monkeypatch.setattr("hiperlab.model.noise.posterior_noise", lambda *_: g["posterior_noise"])
    close("edict z0", made.picture_latents(), g["z0"], 1e-5)
    found = stack.scale(sample_posterior(g["moments"], g["posterior_noise"]))
    close("edict z0, from the moments", found, g["z0"], 1e-6)


@pytest.mark.parametrize("name", COUPLED)
def test_timesteps(stack, meta, name) -> None:
    assert method(stack, meta, name).path == run(meta, name)["timesteps"]


def test_coefficients(stack, meta) -> None:
    """D(1, 0) = 1 / q, D(0, 1) = the noise's."""
    one, none = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for of in meta["coefficients"].values():
        q, here, below = (torch.tensor([of[key]], dtype=torch.float64) for key in ("q", "noise", "noise_below"))
        for step, ours in ((previous, (1 / q, below - here / q)), (following, (q, here - q * below))):
            for given, expected in zip(((one, none), (none, one)), ours, strict=True):
                close("edict coefficients", step(stack, *given, of["timestep"], meta["steps"]), expected, 1e-12)


@pytest.mark.parametrize("name", COUPLED)
def test_inversion(stack, meta, g, name, monkeypatch) -> None:
    """From their z_0, every kept pair and the last noise; theirs also asks at timestep 0, where nothing moves."""
    how, made, seen = run(meta, name), method(stack, meta, name), []
    recorded = how.get("inversion_of", name)
    noise = Noted(made, monkeypatch)
    made.picture_latents = lambda: g["z0"]
    monkeypatch.setattr(
        "hiperlab.method.edict.invert_calls", lambda *args: invert_calls(*args, watch=lambda _, pair: seen.append(pair))
    )
    made.noise.zero_()
    start = alone(made.model, made.start_calls(0))
    close(f"edict {recorded}, inversion", kept(how, seen), g[f"{recorded}.inversion"], LIMIT)
    close(f"edict {recorded}, inversion, noise", noise.seen[-1][0], g[f"{recorded}.inversion_noise"][-1], LIMIT)
    assert torch.equal(start[0], seen[-1][0]) and start.dtype == torch.float64


@pytest.mark.parametrize("name", COUPLED)
def test_drawing(stack, meta, g, name, monkeypatch) -> None:
    """From their noisy pair: every kept pair after mixing, and the first two noises.

    The source is drawn beside; a run that draws the source's own text is compared with that row.
    """
    how, made, seen = run(meta, name), method(stack, meta, name), []
    made.noise.copy_(g[f"{how.get('inversion_of', name)}.inversion"][-1])
    row = int(how["prompt"] != how["inversion_prompt"])
    rows = [how["inversion_prompt"], *[how["prompt"]] * row]
    noise = Noted(made, monkeypatch)
    work = made.denoise_calls(Drawing(
        made.noise[None].expand(len(rows), *made.noise.shape), *made.edit_conditions(rows, ""), how["guidance"],
        made.edits(rows, made.noise.shape[-1], guided=True, keep=False),
        lambda _, pair: seen.append(pair[row][None])))  # fmt: skip
    found = alone(made.model, work)
    close(f"edict {name}, drawing", kept(how, seen), g[f"{name}.drawing"], LIMIT)
    close(f"edict {name}, noise", torch.cat(noise.seen[row :: len(rows)][:2]), g[f"{name}.noise"][:2], LIMIT)
    close(f"edict {name}, end", found[row], g[f"{name}.drawing"][-1, 0], LIMIT)


@pytest.mark.parametrize("name", ["recon", "odd"])
def test_round_trip(stack, meta, g, name) -> None:
    """Both ends are the picture's latents again, theirs and ours; wrong orders are far from it."""
    how, made = run(meta, name), method(stack, meta, name)
    close(f"edict {name}, theirs", g[f"{name}.drawing"][-1], g["z0"].expand(2, -1, -1, -1), 1e-9, absolute=True)
    made.picture_latents = lambda: g["z0"]
    made.noise.zero_()
    rows = [how["inversion_prompt"]]
    start = alone(made.model, made.start_calls(0))
    ends: list[Tensor] = []
    work = made.denoise_calls(
        Drawing(start, *made.edit_conditions(rows, ""), how["guidance"], None, lambda _, pair: ends.append(pair[0]))
    )
    alone(made.model, work)
    close(f"edict {name}, ours", ends[-1], g["z0"].expand(2, -1, -1, -1), 1e-9, absolute=True)


def test_plain_ddim_of_one_latent_does_not_lead_back(stack, meta, g) -> None:
    """The baseline, with the same steps and timesteps, by the functions that EDICT's steps are made of."""
    how = run(meta, "baseline")
    states, empty = (Conditioning(stack.encode_text([text])[None]) for text in (how["inversion_prompt"], ""))

    def noise(z: Tensor, timestep: int) -> Tensor:
        found, without = (predict_noise(stack, z, timestep, each) for each in (states, empty))
        return without + how["guidance"] * (found - without)

    z, seen = g["z0"], []
    with torch.no_grad():
        for timestep in how["inversion_timesteps"]:
            z = following(stack, z, noise(z, timestep), timestep, meta["steps"])
            seen.append(z)
        close("edict baseline, inversion", kept(how, seen), g["baseline.inversion"], LIMIT)
        seen.clear()
        for timestep in how["timesteps"]:
            z = previous(stack, z, noise(z, timestep), timestep, meta["steps"])
            seen.append(z)
    close("edict baseline, drawing", kept(how, seen), g["baseline.drawing"], LIMIT)
    assert (g["baseline.drawing"][-1] - g["z0"]).abs().max() > 1e-2


def test_float32_is_not_exact(stack, meta, g) -> None:
    """Their code in float32, pair and all, leads back to hundredths; the figure is only printed."""
    error = (g["f32.drawing"][-1].double() - g["z0"]).abs().max()
    print(f"EDICT in float32, theirs: {float(error):.1e} from z_0")
    assert 1e-6 < error < 1
