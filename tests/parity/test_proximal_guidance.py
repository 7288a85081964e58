"""Proximal guidance against the authors' code, run on the tiny model in float64 (phymhan/prompt-to-prompt at 9955a1f).

The committed folder is the whole recording but for most of the path and most predictions. Every size, text and setting
is meta.json's, so that another recorded set of the same form can be tried.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from hiperlab.base.editing_method import Drawing
from hiperlab.base.method import Subject
from hiperlab.edit.proximal import edited, shrunk, threshold
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.inversion import inversion_calls
from hiperlab.model.shared_calls import alone
from hiperlab.model.stack import FrozenStack
from hiperlab.model.tiny import tiny
from tests.composed import ROOT, build
from tests.parity import golden

GOLDEN = "proximal_guidance"
KINDS = {"src": "source", "joint": "both", "none": "own"}


def close(item: str, ours: Tensor, theirs: Tensor, limit: float) -> None:
    golden.close(f"proximal {item}", ours, theirs, limit)


@pytest.fixture(scope="module")
def stack(meta) -> FrozenStack:
    return tiny(seed=meta["tiny_seed"], size=meta["resolution"])


@pytest.fixture(scope="module")
def double(stack) -> FrozenStack:
    return copy.deepcopy(stack).double()


def method(meta, stack: FrozenStack, run: str, g) -> Any:
    """The method with a run's settings, which takes the recorded latents of the picture for its own."""
    how = meta["runs"][run]
    masa = how["attention"] == "masactrl"
    pull = "reconstruction" if how.get("reconstruction") else "inversion" if how.get("inversion_guidance") else "none"
    changes = {
        "steps": meta["steps"], "cache": None, "attention": how["attention"], "source_negative": how.get("npi", True),
        "npi_interp": how["npi_interp"], "prox": how.get("prox") or "none", "quantile": how.get("quantile", 0.7),
        "prox_step": how.get("prox_step", 0), "pull": pull, "pull_below": how.get("recon_t", 0),
        "pull_rate": how.get("recon_lr", 0.0), "dilate": how.get("dilate_mask", 0),
        "p2p": {
            "mode": "refine", "tau_c": meta["cross_replace_steps"], "tau_s": meta["self_replace_steps"], "blend": None,
        },
    }  # fmt: skip
    if masa:
        changes["mutual"] = {
            "start_step": how["start_step"], "start_layer": how["start_layer"],
            "unconditional": KINDS[how["inject_uncond"]], "conditional": KINDS[how["inject_cond"]],
        }  # fmt: skip
    subject = Subject("it", "<it>", "cat", meta["source"], (meta["target"],))
    found: Any = build("proximal_guidance", stack, [subject], **changes)
    found.to(next(stack.unet.parameters()).dtype)
    found.path.copy_(path(meta, stack, g))
    return found


def path(meta, stack: FrozenStack, g) -> Tensor:
    """Our inversion (T+1, C, H, W) of the recorded latents of the picture."""
    start = g["path"][meta["path_steps"].index(0)][None]
    states = Conditioning(stack.encode_text([meta["source"]])[None].to(stack.alpha_bar))
    work = inversion_calls(stack, start.to(stack.alpha_bar), states, meta["steps"], None)
    return alone(stack, work).latents[:, 0]


def runs(meta) -> list[str]:
    assert meta["runs"], "meta.json names no run"
    return list(meta["runs"])


def drawn(found: Any, meta) -> tuple[Tensor, list[Tensor]]:
    """The end (2, C, H, W) of a drawing of source and target, and the latents after each step."""
    rows = [meta["source"], meta["target"]]
    conditional, unconditional = found.edit_conditions(rows, "")
    edits = found.edits(rows, found.path.shape[-1], True, False)
    start = found.path[-1:].expand(2, -1, -1, -1)
    seen: list[Tensor] = []
    work = found.denoise_calls(
        Drawing(start, conditional, unconditional, meta["guidance"], edits, lambda step, latents: seen.append(latents))
    )
    return alone(found.model, work), seen


def test_published_settings() -> None:
    """negative_prompt_inversion.py's main and the README's runs."""
    published = OmegaConf.load(ROOT / "conf" / "method" / "proximal_guidance.yaml").method
    assert (published.prox, published.quantile, published.pull, published.pull_below) == ("l0", 0.7, "inversion", 400)
    assert (published.pull_rate, published.dilate, published.npi_interp) == (1.0, 1, 0.0)
    assert (published.p2p.tau_c, published.p2p.tau_s) == (0.4, 0.6)
    masa = OmegaConf.load(ROOT / "conf" / "experiment" / "prox_masactrl.yaml").method
    assert (masa.npi_interp, masa.quantile, masa.pull) == (1.0, 0.6, "none")


def test_picture_and_path(meta, g, double) -> None:
    pixels = g["picture"].permute(2, 0, 1)[None].to(double.alpha_bar) / 127.5 - 1
    mean = double.encode_moments(pixels).chunk(2, dim=1)[0]
    close("z_0", double.scale(mean)[0], g["path"][0], 1e-6)  # the stack gives a picture's moments in float32
    close("path", path(meta, double, g)[meta["path_steps"]], g["path"], 1e-9)


def test_directions_of_recorded_predictions(meta, g, double) -> None:
    """lambda, what is left and m of the recorded predictions, through the step."""
    kept = [run for run in runs(meta) if f"{run}.uncond" in g]
    assert kept
    for run in kept:
        how, found = meta["runs"][run], method(meta, double, run, g)
        for place, step in enumerate(meta["prediction_steps"]):
            without, within = g[f"{run}.uncond"][place], g[f"{run}.text"][place]
            left, mask = found.directions(step, within - without)
            delta = within - without
            least = threshold(delta, how["quantile"])
            assert torch.equal(left, shrunk(delta, least, "l0"))
            assert torch.equal(mask, edited(left, least, how.get("dilate_mask", 0)))
            assert 0 < mask[1].mean() < 1 and not mask[0].any(), "else nothing is told"
            inputs = dict(zip(meta["input_steps"], g[f"{run}.inputs"], strict=True))
            noise = without + meta["guidance"] * left
            after = stepped(found, step, inputs[step], noise, mask)
            close(f"{run} one step", after, inputs[step + 1], 1e-10)


def stepped(found: Any, step: int, latents: Tensor, noise: Tensor, mask: Tensor) -> Tensor:
    """The step's result written out: DDIM, then the pull of `inversion`."""
    alpha, t, share = found.model.alpha_bar, found.timesteps[step], 1000 // found.steps
    here, below = alpha[t], alpha[max(t - share, 0)] if t - share >= 0 else alpha[0]
    after = below.sqrt() * (latents - (1 - here).sqrt() * noise) / here.sqrt() + (1 - below).sqrt() * noise
    if found.pull == "inversion" and t < found.pull_below:
        after = after - found.pull_rate * (after - found.path[found.steps - 1 - step]) * (1 - mask)
    return after


def test_drawings(meta, g, double) -> None:
    for run in runs(meta):
        latents, _ = drawn(method(meta, double, run, g), meta)
        close(f"{run}", latents, g[f"{run}.latents"], 1e-7)


def test_drawings_in_float32(meta, g, stack) -> None:
    """Against their own float32, where no threshold cuts between two roundings."""
    kept = [run for run in runs(meta) if f"f32.{run}.latents" in g]
    assert kept
    for run in kept:
        latents, _ = drawn(method(meta, stack, run, g), meta)
        close(f"{run} float32", latents, g[f"f32.{run}.latents"], 1e-3)


def test_the_pulled_source_is_on_its_path(meta, g, double) -> None:
    """With rate 1 from its first pulled step on (its differences are 0, so that m is)."""
    kept = [run for run in runs(meta) if meta["runs"][run].get("recon_lr") == 1]
    assert kept
    for run in kept:
        found = method(meta, double, run, g)
        _, seen = drawn(found, meta)
        pulled = [step for step, t in enumerate(found.timesteps) if t < found.pull_below]
        assert pulled
        for step in pulled:
            torch.testing.assert_close(seen[step][0], found.path[found.steps - 1 - step], atol=1e-12, rtol=0)
