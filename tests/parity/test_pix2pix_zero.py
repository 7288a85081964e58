"""pix2pix-zero against numbers of the authors' code (pix2pixzero/pix2pix-zero) on the tiny model, in float64.

Sizes, prompts, rolls and settings are meta.json's and the recording's. All of it is committed; another one of the same
form is a golden folder "pix2pix_zero" on the twin of the others.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from hiperlab.base.editing_method import Drawing
from hiperlab.base.method import Subject
from hiperlab.loss.white_noise import PUBLISHED, autocorrelation, divergence, sides
from hiperlab.method import pix2pix_zero
from hiperlab.model.attention_control import layer_of
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.inversion import predict_noise
from hiperlab.model.shared_calls import alone
from hiperlab.model.stack import FrozenStack
from hiperlab.model.tiny import tiny
from tests.composed import build
from tests.parity import golden

close = golden.close
INVERSIONS, EDITS = ("real", "noreg", "roll0"), ("real", "strong", "synthetic", "xa0", "nothing")

GOLDEN = "pix2pix_zero"


@pytest.fixture(scope="module")
def single(meta, g) -> FrozenStack:
    if "tiny_seed" in meta:
        found = tiny(seed=meta["tiny_seed"], size=meta["resolution"])
    else:
        found = copy.deepcopy(golden.twin(meta["resolution"], "golden"))
    found.alpha_bar = g["alphas_cumprod"]
    return found


@pytest.fixture(scope="module")
def stack(single) -> FrozenStack:
    found = copy.deepcopy(single).double()
    assert found.alpha_bar.dtype == torch.float64
    return found


def method(stack: FrozenStack, meta: dict[str, Any], g: dict[str, Tensor], name: str) -> Any:
    """The method with a run's settings, the recording's rolls and no start yet."""
    how = meta["runs"][name]
    inverted = how.get("inversion_of", name)
    weight = meta["runs"][inverted]["lambda"] * PUBLISHED / stack.alpha_bar.new_ones(stack.latent_shape).numel()
    made: Any = build(
        "pix2pix_zero", stack, [Subject("it", "<it>", "cat", meta["prompts"]["source"])], seed=meta["seed"],
        steps=meta["steps"], cache=None, levels="authors", lambda_ac=weight, lambda_kl=weight,
        num_reg_steps=meta["num_reg_steps"], num_ac_rolls=meta["num_ac_rolls"], xa_guidance=how.get("xa", 0.1),
        unconditional="source" if how.get("negative") == meta["prompts"]["source"] else "negative",
        source_sentences=meta["sentences"]["source"], target_sentences=meta["sentences"]["target"],
        direction_scale=0.0 if name == "nothing" else 1.0,
    ).to(stack.alpha_bar.dtype)  # fmt: skip
    channels, side, _ = stack.latent_shape
    shape = (meta["num_reg_steps"], meta["num_ac_rolls"], channels, len(sides(side)))
    drawn = g[f"{inverted}.rolls"].long()
    made.rolls = lambda step: drawn.view(-1, *shape)[step] if len(drawn) else torch.ones(shape, dtype=torch.long)
    return made


def drawn(made: Any, meta: dict[str, Any], name: str, start: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Latents of both rows at the end (2, C, H, W), and after every step."""
    how, seen = meta["runs"][name], []
    made.noise.copy_(start)
    texts = [meta["prompts"]["source"], meta["prompts"]["target"]]
    states = made.edit_conditions(texts, "" if made.unconditional == "source" else how["negative"])
    many = made.noise[None].expand(2, -1, -1, -1)
    end = alone(
        made.model, made.denoise_calls(Drawing(many, *states, how["guidance"], None, lambda _, z: seen.append(z)))
    )
    return end, seen


def test_latents_of_the_picture(root, stack, meta, g, monkeypatch) -> None:
    """From the picture at the run's size: ours is resized with another filter. Ours goes through float32."""
    made = method(stack, meta, g, "real")
    size = meta["resolution"]
    picture = Image.open(root / "source.png").convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
    made.set_reference(0, torch.tensor(list(picture.tobytes())).view(size, size, 3).permute(2, 0, 1) / 127.5 - 1)
    monkeypatch.setattr("hiperlab.model.noise.posterior_noise", lambda *_: g["posterior_noise"])
    close("pix2pix_zero z0", made.picture_latents(), g["real.inversion"][:1], 1e-5)


def test_direction(stack, meta, g) -> None:
    made = method(stack, meta, g, "real")
    close("pix2pix_zero direction", made.directions([meta["prompts"]["target"]]), g["delta"], 1e-10)


@pytest.mark.parametrize(("loss", "name"), [(autocorrelation, "ac"), (divergence, "kl")])
def test_whiteness(g, loss, name) -> None:
    """Of the first predicted noise, with its gradient."""
    noise = g["real.inversion_noise_raw"][0].clone().requires_grad_()
    rolls = g["real.probe_rolls"].view(len(noise), -1)
    found = loss(noise, rolls) if name == "ac" else loss(noise)
    close(f"pix2pix_zero {name}", found, g[f"real.{name}"], 1e-12)
    (gradient,) = torch.autograd.grad(found, noise)
    close(f"pix2pix_zero {name}, gradient", gradient, g[f"real.{name}_gradient"], 1e-10)


@pytest.mark.parametrize("name", INVERSIONS)
def test_inversion(stack, meta, g, name, monkeypatch) -> None:
    """At the authors' levels from their z_0, with their rolls; what is not kept of the path is not compared."""
    made, whitened = method(stack, meta, g, name), pix2pix_zero.whitened
    noises: list[tuple[Tensor, Tensor]] = []

    def noted(noise: Tensor, *args: Any) -> Tensor:
        noises.append((noise, whitened(noise, *args)))
        return noises[-1][1]

    monkeypatch.setattr(pix2pix_zero, "whitened", noted)
    made.picture_latents = lambda: g["real.inversion"][:1]
    made.noise.zero_()
    start = alone(made.model, made.start_calls(0))
    close(f"pix2pix_zero {name}, inversion", start, g[f"{name}.inversion"][-1:], 1e-8)
    steps = [t for t, *_ in pix2pix_zero.inversion_path(stack, meta["steps"], "authors")]
    assert steps == meta["runs"][name]["inversion_timesteps"] and len(noises) == len(steps)
    if f"{name}.inversion_noise" in g:
        for number, key in enumerate(("inversion_noise_raw", "inversion_noise")):
            theirs = g[f"{name}.{key}"]
            ours = torch.stack([pair[number] for pair in noises[: len(theirs)]])
            close(f"pix2pix_zero {name}, {key}", ours, theirs, 1e-8)


@pytest.mark.parametrize("name", EDITS)
def test_edit(stack, meta, g, name, monkeypatch) -> None:
    """From their noise: reconstruction and edit after the kept steps, and the maps' distance at every step."""
    how, made, losses = meta["runs"][name], method(stack, meta, g, name), []
    distance = pix2pix_zero.map_distance
    monkeypatch.setattr(pix2pix_zero, "map_distance", lambda *a: losses.append(distance(*a)) or losses[-1])
    _, seen = drawn(made, meta, name, g[f"{how['inversion_of']}.inversion"][-1])
    found = torch.stack([seen[k] for k in how["kept_steps"]])
    close(f"pix2pix_zero {name}, edit", found[:, 1], g[f"{name}.edit"], 1e-8)
    close(f"pix2pix_zero {name}, reconstruction", found[:, 0], g[_reconstruction(g, name)][-len(found) :], 1e-8)
    assert len(losses) == (meta["steps"] if how["xa"] else 0), "without guidance nothing is asked"
    if losses and name != "nothing":
        close(f"pix2pix_zero {name}, loss", torch.stack(losses), g[f"{name}.loss"], 1e-7)
    if name == "nothing":
        assert max(losses) < 1e-20 and torch.equal(g["nothing.loss"], torch.zeros(meta["steps"]).double())
        torch.testing.assert_close(found[:, 0], found[:, 1], atol=1e-9, rtol=0)


def _reconstruction(g: dict[str, Tensor], name: str) -> str:
    """It does not depend on the edit: runs of one start and one negative text have it once."""
    return f"{name}.reconstruction" if f"{name}.reconstruction" in g else "strong.reconstruction"


def test_moved_latents(stack, meta, g, monkeypatch) -> None:
    """Of the first two steps of the strong run: both rows after the step down the distance, and by how much."""
    made, name = method(stack, meta, g, "strong"), "strong"
    before, after, move = [], [], made._moved_calls

    def noted(rows: Tensor, *args: Any) -> Any:
        before.append(rows)
        after.append((yield from move(rows, *args)))
        return after[-1]

    monkeypatch.setattr(made, "_moved_calls", noted)
    drawn(made, meta, name, g["real.inversion"][-1])
    theirs = g[f"{name}.moved"]
    close("pix2pix_zero moved latents", torch.stack(after[: len(theirs)]), theirs, 1e-8)
    gradient = (torch.stack(before) - torch.stack(after))[: len(theirs)] / meta["runs"][name]["xa"]
    close("pix2pix_zero gradient", gradient, g[f"{name}.gradient"], 1e-7)
    assert not g[f"{name}.gradient"][0, 0].any() and gradient[0, 0].abs().max() < 1e-12, "the source's own row"
    assert (theirs[1, 1] - before[1][1]).abs().max() > 1e-3 * before[1][1].abs().max(), "a visible step"


def test_maps(stack, meta, g, monkeypatch) -> None:
    """Before latents move at the second step: the mean over rows and heads, of the first tokens."""
    made, seen, distance = method(stack, meta, g, "strong"), [], pix2pix_zero.map_distance
    monkeypatch.setattr(pix2pix_zero, "map_distance", lambda maps, ref: seen.append(maps) or distance(maps, ref))
    drawn(made, meta, "strong", g["real.inversion"][-1])
    recorded = golden.pick(g, "strong.map.")
    assert len(seen[1]) == len(stack.cross_attention) and recorded
    for layer, theirs in recorded.items():
        ours = seen[1][layer_of(layer)].mean((0, 1))[:, : theirs.shape[1]]
        close("pix2pix_zero maps", ours, theirs, 1e-8)


def test_float32(single, meta, g) -> None:
    """The float32 run, from its own z_0; drawing from its own noise. Errors grow along the path."""
    made = method(single, meta, g, "f32")
    made.picture_latents = lambda: g["f32.inversion"][:1]
    made.noise.zero_()
    close("pix2pix_zero f32, inversion", alone(single, made.start_calls(0)), g["f32.inversion"][1:], 1e-4)
    found, _ = drawn(made, meta, "f32", g["f32.inversion"][-1])
    close("pix2pix_zero f32, reconstruction", found[:1], g["f32.reconstruction"], 1e-4)
    close("pix2pix_zero f32, edit", found[1:], g["f32.edit"], 1e-4)


def test_the_other_rows_latents_would_differ(stack, meta, g) -> None:
    """The unconditional row's latents go on; the conditional row's are others."""
    end, theirs = g["strong.moved"][1], g["strong.edit"][1]
    noise = g["strong.noise"][1]
    timestep = meta["runs"]["strong"]["timesteps"][1]
    first, second = (pix2pix_zero.previous(stack, row[None], noise[None], timestep, meta["steps"])[0] for row in end)
    close("pix2pix_zero step", first, theirs, 1e-8)
    assert (second - theirs).abs().max() > 1e-4
    states = Conditioning(stack.encode_text([meta["prompts"]["source"]])[None])
    assert predict_noise(stack, end[:1], timestep, states).dtype == torch.float64
