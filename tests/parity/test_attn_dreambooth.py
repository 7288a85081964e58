"""AttnDreamBooth against the authors' train_attndreambooth.py, run in float64 and in float32 on the tiny model.

The committed folder is complete: inputs of every step, both losses, attention statistics, gradients and weights of all
three stages, and the third stage without the regulariser and with a large one. Sizes, seeds, settings: meta.json's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from hiperlab import draws
from hiperlab.base.method import Subject
from hiperlab.data.batch import Batch
from hiperlab.loss.attention_regulariser import attention_regulariser, map_statistics
from hiperlab.method.attn_dreambooth import AttnDreamBooth
from hiperlab.model.tiny import tiny
from tests.composed import ROOT
from tests.composed import build as compose
from tests.parity import golden

GOLDEN = "attn_dreambooth"
STAGES = ("stage1", "stage2", "stage3")
KINDS = {"f64": torch.float64, "f32": torch.float32}
# Adam divides by gradients that are 0 but for rounding, so float32's weights are compared by their mean distance.
LIMITS = {
    "f64": {"loss": 1e-9, "regulariser": 1e-6, "update": 1e-5},
    "f32": {"loss": 1e-5, "regulariser": 5e-3, "row": 2e-2},
}


def close(item: str, ours: Tensor, theirs: Tensor, limit: float, scale: Tensor | float = 1.0) -> None:
    golden.close(f"attn_dreambooth {item}", ours / scale, theirs / scale, limit, absolute=True)


def last_stages() -> list[str]:
    """The recorded runs of the third stage, whatever they are."""
    path = next((path for name in ("golden", "slice") if (path := _path(name)).is_file()), None)
    runs = golden.config(path)["runs"] if path else {}
    return [name for name in runs if name.startswith(STAGES[2])] or ["none recorded"]


def _path(source: str) -> Path:
    return (golden.place(GOLDEN) if source == "golden" else golden.SLICE / GOLDEN) / "meta.json"


def stack_of(meta: dict[str, Any], source: str, kind: torch.dtype) -> Any:
    made = golden.twin(meta["resolution"], source) if source == "golden" else None
    return (made or tiny(seed=meta["tiny_seed"], size=meta["resolution"])).to(kind)


def make(meta: dict[str, Any], stack: Any, last: str, **changes: Any) -> AttnDreamBooth:
    """The method as the recorded stages were set, as many steps each, with one of the runs of the third."""
    runs, noun = [meta["runs"][name] for name in (*STAGES[:2], last)], meta["class_word"]
    first = runs[0]["adamw"]
    assert meta["prompt"].endswith(f" {noun}") and all(run["adamw"] == {**first, "lr": run["lr"]} for run in runs)
    settings = {
        "stages": [meta["steps"]] * 3, "steps": 3 * meta["steps"], "batch_size": meta["batch_size"],
        "cross_lr": runs[1]["lr"], "unet_lr": runs[2]["lr"], "template": meta["prompt"].removesuffix(f" {noun}"),
        "reg_mean": [run["reg_mean"] for run in runs], "reg_var": [run["reg_var"] for run in runs],
        "prior": {"weight": 0.0}, "optimizer": first,
    }  # fmt: skip
    method = compose(GOLDEN, stack, [Subject("it", "<it>", noun)], **{**settings, **changes})
    assert isinstance(method, AttnDreamBooth)
    return method


def rows_of(meta: dict[str, Any], step: int) -> Batch:
    count, size = meta["batch_size"], meta["resolution"]
    numbers = torch.arange(count)
    samples = step * count + numbers
    return Batch(torch.zeros(count, 3, size, size), ["<it>"] * count, 0 * numbers, samples, numbers, numbers.bool())


def test_published_settings() -> None:
    """bash_script/train_attndreambooth.sh, stages 1 to 3."""
    published = OmegaConf.load(ROOT / "conf" / "method" / "attn_dreambooth.yaml")
    method, optimizer = published.method, published.method.optimizer
    assert (list(method.stages), published.fit.steps, published.fit.batch_size) == ([60, 100, 500], 660, 8)
    assert (optimizer.lr, method.cross_lr, method.unet_lr, optimizer.weight_decay) == (1e-3, 2e-5, 2e-6, 1e-2)
    assert (list(method.reg_mean), list(method.reg_var)) == ([0.1, 2, 2], [0, 5, 5])
    assert method.prior.weight == 0 and "gradient_clip" not in published.fit
    fast = OmegaConf.load(ROOT / "conf" / "experiment" / "attn_dreambooth_fast.yaml")
    assert (list(fast.method.stages), fast.method.unet_lr, fast.fit.batch_size) == ([60, 100, 200], 1e-5, 4)


def test_statistics_and_regulariser_of_recorded_maps(meta, g) -> None:
    """The recorded columns of word and class token are maps of two tokens here."""
    for name in meta["runs"]:
        columns = {key: value for key, value in g.items() if key.startswith(f"f64.{name}.maps.")}
        if not columns:
            continue
        maps = [columns[f"f64.{name}.maps.{layer}"].permute(0, 2, 3, 1) for layer in range(len(columns))]
        both = torch.tensor([[0, 1]]).expand(len(maps[0]), -1)
        for layer, probabilities in enumerate(maps):
            for ours, item in zip(map_statistics(probabilities, both), ("mean", "var"), strict=True):
                close(f"statistics: {item}", ours, g[f"f64.{name}.{item}"][0, layer], 1e-12)
        how = meta["runs"][name]
        ours = attention_regulariser(maps, both[:, :1], both[:, 1], how["reg_mean"], how["reg_var"]).sum()
        theirs = g[f"f64.{name}.attn_loss"][0]
        close("regulariser of recorded maps", ours, theirs, 1e-6, theirs)
        return
    pytest.fail("no maps are recorded")


@pytest.mark.parametrize("last", last_stages())
@pytest.mark.parametrize("kind", KINDS)
def test_three_stages(kind, last, meta, g, source, monkeypatch) -> None:
    """All steps in a row, from the class noun's row to the third stage's weights."""
    if last not in meta["runs"]:
        pytest.skip(f"{last} is not recorded here")
    stack = stack_of(meta, source, KINDS[kind])
    method = make(meta, stack, last).to(KINDS[kind]).train()
    optimizer, limits, seen = method.configure_optimizers(), LIMITS[kind], {}
    ids = stack.tokenize([meta["prompt"].replace("{}", "<it>")], method.slots)
    ours, theirs = ids.ids[0], g["input_ids"][0]
    assert torch.equal(ours[ids.slots[0] < 0], theirs[theirs != meta["word_id"]])
    assert int((ids.slots[0] >= 0).nonzero()) == int((theirs == meta["word_id"]).nonzero())
    statistics = attention_regulariser
    monkeypatch.setattr(
        "hiperlab.method.attn_dreambooth.attention_regulariser",
        lambda maps, word, class_token, *weights: (
            seen.update(maps=maps, tokens=torch.cat([word, class_token[:, None]], 1))
            or statistics(maps, word, class_token, *weights)
        ),
    )
    start = {name: stack.unet.get_parameter(name).detach().clone() for name in meta["weights"].values()}
    row = method.vectors[0].detach().clone()
    for number, name in enumerate((*STAGES[:2], last)):
        before = {key: value.detach().clone() for key, value in method.unet_offsets.items()}
        fixed = method.vectors.detach().clone()
        for k in range(meta["steps"]):
            monkeypatch.setattr(draws, "integers", lambda *_, k=k: g[f"timesteps.{k}"])
            monkeypatch.setattr(method, "training_noise", lambda *_, k=k: g[f"noise.{k}"])
            monkeypatch.setattr(method, "clean_latents", lambda *_, k=k: g[f"z0.{k}"].to(KINDS[kind]))
            loss = method.training_step(rows_of(meta, number * meta["steps"] + k), k)
            weighs = bool(meta["runs"][name]["reg_mean"] or meta["runs"][name]["reg_var"])
            regulariser = method._losses[-1][method._loss_names.index("loss/attention")] if weighs else torch.zeros(())
            close(f"{kind} loss", loss, g[f"{kind}.{name}.loss"][k], limits["loss"])
            if weighs:
                theirs = g[f"{kind}.{name}.attn_loss"][k]
                close(f"{kind} regulariser (relative)", regulariser, theirs, limits["regulariser"], theirs)
            if kind == "f64" and weighs:
                for layer, probabilities in enumerate(seen["maps"]):
                    found = map_statistics(probabilities, seen["tokens"])
                    for item, value in zip(("mean", "var"), found, strict=True):
                        close(f"{item} of maps", value, g[f"{kind}.{name}.{item}"][k, layer], 1e-9)
            loss.backward()
            if kind == "f64" and k == 0:
                _gradients(method, meta, g, f"{kind}.{name}.grad.")
            optimizer.step()
            optimizer.zero_grad()
            if name == STAGES[0]:
                apart = g[f"{kind}.{name}.row"][k] - row
                limit = limits.get("row", limits.get("update", 0.0))
                close(f"{kind} row (of the update)", method.vectors[0], row + apart, limit, apart.abs().max())
        moved = [key for key, value in method.unet_offsets.items() if not torch.equal(value, before[key])]
        parts = sorted({"attn2" if "/attn2/" in key else "other" for key in moved})
        assert parts == (["attn2"] if number == 1 else meta["runs"][name]["moved_parts"] if number else [])
        assert number == 0 or torch.equal(method.vectors, fixed)
        _weights(method, meta, g, f"{kind}.{name}.weight.", start, kind)


def _gradients(method: AttnDreamBooth, meta: dict[str, Any], g: dict[str, Tensor], prefix: str) -> None:
    if f"{prefix}row" in g:
        theirs = g[f"{prefix}row"]
        close("gradient (of the largest): row", method.vectors.grad[0], theirs, 1e-8, theirs.abs().max())
    for key, how in meta["gradients"].items():
        ours = method.unet_offsets[how["name"].replace(".", "/")].grad
        assert (ours is not None) == (f"{prefix}{key}" in g), f"{prefix}{key}"
        if ours is not None:
            theirs = g[f"{prefix}{key}"]
            close(f"gradient (of the largest): {key}", ours[0, : len(theirs)], theirs, 1e-8, theirs.abs().max())


def _weights(
    method: AttnDreamBooth, meta: dict[str, Any], g: dict[str, Tensor], prefix: str, start: dict[str, Tensor], kind: str
) -> None:
    for key, name in meta["weights"].items():
        if f"{prefix}{key}" not in g:
            continue
        theirs = g[f"{prefix}{key}"] - start[name]
        ours = method.unet_offsets[name.replace(".", "/")][0].detach()
        if not theirs.any():
            assert not ours.any(), f"{name} is not of this stage"
        elif kind == "f64":
            close(f"f64 {key} (of the update)", ours, theirs, LIMITS[kind]["update"], theirs.abs().max())
        else:  # theirs is a difference of rounded weights
            apart = (ours - theirs).abs().mean() / theirs.abs().mean()
            close(f"f32 {key} (mean, of the mean update)", apart, torch.zeros(()), 0.3)
