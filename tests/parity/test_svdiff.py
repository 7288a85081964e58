"""SVDiff against mkshing/svdiff-pytorch. Items are named as in golden/svdiff/README.md, with its limits, absolute.

Every number, text and setting is read from the folder, so that another recorded set of the same form can be tried.
The committed slice holds the recomposed weights with the frozen ones they are made of.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from hiperlab import draws
from hiperlab.base.method import Step, Subject
from hiperlab.data.batch import Batch
from hiperlab.data.images import to_pixels
from hiperlab.method.svdiff import SVDiff
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.sampler import ddim, denoise
from hiperlab.model.spectral import Shifted, decomposed
from tests.composed import ROOT
from tests.composed import build as compose
from tests.parity import golden

ZERO = torch.zeros(1, dtype=torch.long)
FOLDERS = {"golden": lambda: golden.folder("svdiff"), "slice": lambda: golden.SLICE / "svdiff"}


def close(item: str, ours: Tensor, theirs: Tensor, limit: float) -> None:
    golden.close(f"svdiff {item}", ours, theirs, limit, absolute=True)


@pytest.fixture(scope="module")
def root() -> Path:
    return golden.folder("svdiff")


@pytest.fixture(scope="module")
def twin(meta):
    return golden.twin(meta["run"]["resolution"], "golden")


@pytest.fixture(scope="module")
def subject(meta) -> Subject:
    return Subject("it", "<it>", meta["run"]["class_prompt"].split()[-1])


@pytest.fixture(scope="module")
def make(meta, twin, subject):
    """SVDiff as the recorded run was set: `make(**changes)`."""
    run, first = meta["run"], meta["adamw_groups"][0]
    noun, instance = subject.word, run["instance_prompt"].split()
    assert run["instance_prompt"].startswith(run["class_prompt"].removesuffix(noun))
    prompt = run["class_prompt"].removesuffix(noun) + "{}"
    settings = {
        "identifier": " ".join(instance[len(run["class_prompt"].split()) - 1 : -1]), "template": prompt,
        "prior": {"prompt": prompt, "weight": run["prior_loss_weight"], "count": run["num_class_images"]},
        "optimizer": {key: first[key] for key in ("lr", "betas", "eps", "weight_decay")},
        "norm_lr": meta["adamw_groups"][1]["lr"],
    }  # fmt: skip

    def made(**changes: Any) -> SVDiff:
        method = compose("svdiff", twin, [subject], **{**settings, **changes})
        assert isinstance(method, SVDiff)
        return method

    return made


def ours_of(method: SVDiff) -> dict[str, torch.nn.Parameter]:
    """Each shift (1, r) by its recorded name."""
    parts = {"unet": method.unet_shifts, "text.text_model": method.text_shifts}
    return {f"{part}.{key.replace('/', '.')}.delta": p for part, own in parts.items() for key, p in own.items()}


def split(meta, joined: Tensor) -> dict[str, Tensor]:
    """A recorded vector (N,) of all shifts, by their names."""
    sizes = [shape[0] for shape in meta["shift_shapes"]]
    return dict(zip(meta["shift_names"], joined.split(sizes), strict=True))


@torch.no_grad()
def put(meta, method: SVDiff, joined: Tensor) -> SVDiff:
    for name, value in split(meta, joined).items():
        ours_of(method)[name][0] = value
    return method


def joined(meta, method: SVDiff, gradients: bool = False) -> Tensor:
    """What `split` takes apart, of ours."""
    ours = ours_of(method)
    return torch.cat([(ours[name].grad if gradients else ours[name].detach())[0] for name in meta["shift_names"]])


def group_two(meta, joined: Tensor) -> Tensor:
    """The numbers of the second group alone."""
    return torch.cat(list(split(meta, joined).values())[meta["tensors_in_first_group"] :])


def test_published_settings() -> None:
    """The README's command: 500 steps of batch 1, both rates, text encoder and 200 class pictures."""
    published = OmegaConf.load(ROOT / "conf" / "method" / "svdiff.yaml")
    method, optimizer = published.method, published.method.optimizer
    assert (published.fit.steps, published.fit.batch_size, published.fit.gradient_clip) == (500, 1, 1.0)
    assert (optimizer.lr, method.norm_lr, optimizer.weight_decay, method.text_encoder) == (1e-3, 1e-6, 1e-2, True)
    assert (method.prior.weight, method.prior.count) == (1.0, 200)


def test_names_groups_and_spectra(make, meta, g) -> None:
    method = make()
    ours = ours_of(method)
    names, first = meta["shift_names"], meta["tensors_in_first_group"]
    assert ours.keys() == set(names) and [list(ours[name].shape[1:]) for name in names] == meta["shift_shapes"]
    groups = method.param_groups()
    assert {id(p) for p in groups[0]["params"]} == {id(ours[name]) for name in names[:first]}
    counts = {"unet": method.unet_shifts, "text": method.text_shifts}
    assert {part: sum(p.numel() for p in own.values()) for part, own in counts.items()} == meta["numbers"]
    for group, theirs in zip(method.configure_optimizers().param_groups, meta["adamw_groups"], strict=True):
        for key in ("lr", "eps", "weight_decay", "amsgrad", "maximize"):
            assert group[key] == theirs[key], key
        assert list(group["betas"]) == theirs["betas"]
    for name, theirs in split(meta, g["spectra"]).items():
        part, layer = name.removesuffix(".delta").split(".", 1)
        kept = method.unet_spectra if part == "unet" else method.text_spectra
        sigma = kept[layer.removeprefix("text_model.")].values
        close("spectra, relative", sigma / sigma.max(), theirs / sigma.max(), 1e-5)


@pytest.mark.parametrize("source", FOLDERS)
def test_recomposed_weights(source) -> None:
    """Each recorded layer from its frozen weight; singular vectors are this machine's."""
    root = FOLDERS[source]()
    meta, values = golden.config(root / "meta.json"), load_file(root / "golden.safetensors")
    if source == "golden":
        twin = golden.twin(meta["run"]["resolution"], source)
        values |= {f"given.delta.{name}": value for name, value in split(meta, values["given.delta"]).items()}
        parts = {"unet.": twin.unet, "text.text_model.": twin.text_module}
        for layer in meta["layers"]:
            prefix = next(prefix for prefix in parts if layer.startswith(prefix))
            values[f"frozen.{layer}"] = parts[prefix].get_parameter(f"{layer.removeprefix(prefix)}.weight")
    for layer in meta["layers"]:
        frozen = values[f"frozen.{layer}"]
        kind, limit = {1: ("norms", 1e-6), 2: ("linears", 1e-4), 4: ("convolution", 5e-5)}[frozen.dim()]
        ours = Shifted(decomposed(frozen), values[f"given.delta.{layer}.delta"]).apply(frozen)
        close(f"given.weight: {kind}", ours, values[f"given.weight.{layer}"], limit)


def test_given_shifts(make, meta, twin, g) -> None:
    method = put(meta, make().eval(), g["given.delta"])
    assert len(meta["scales"]) > 1
    for scale in meta["scales"]:
        changed = method._changed(scale)
        with torch.no_grad():
            prompts = [meta["sampling"]["prompt"], meta["run"]["class_prompt"]]
            assert torch.equal(twin.tokenize(prompts).ids, g["given.input_ids"])
            states = twin.encode_text(prompts, changed.text)
            close("given.states", states, g[f"given.states_{scale}"], 1e-3)
            ours = twin.predict(
                g["given.sample"], g["given.timesteps"], Conditioning(states[None], offsets=changed.unet)
            )
            close("given.pred", ours, g[f"given.pred_{scale}"], 1e-3)
            bare = twin.predict(g["given.sample"], g["given.timesteps"], Conditioning(states[None]))
            if scale:
                assert float((bare - ours).abs().max()) > 1e-2


def test_sampling(make, meta, twin, words, g) -> None:
    method = put(meta, make().eval(), g["given.delta"])
    how, start = meta["sampling"], g["sampling.latents_in"]
    assert torch.equal(twin.tokenize(["", how["prompt"]]).ids, g["sampling.input_ids"])
    with torch.no_grad():
        states = method.condition(Step([how["prompt"].replace(words, "<it>")], ZERO, ZERO))
        empty = Conditioning(method.negative_condition("", "", [0]).keys[0][None])
    steps, guidance = how["steps"], how["guidance_scale"]
    latents = denoise(twin, start, ddim(steps, guidance).build(twin, steps), lambda t: states, empty, guidance)
    close("sampling.latents_out", latents, g["sampling.latents_out"], 4e-3)


@pytest.fixture(scope="module")
def words(make) -> str:
    return make().words[0]


def test_pictures(root, meta, twin, g) -> None:
    pictures = [Image.open(root / part / "0.png").convert("RGB") for part in ("instance", "class")]
    ours = torch.stack(
        [to_pixels(picture, meta["run"]["resolution"], SVDiff.published_crop, flip=False) for picture in pictures]
    )
    close("pixel_values_0", ours, g["pixel_values_0"], 1e-6)
    close("vae_moments_0", twin.encode_moments(g["pixel_values_0"]), g["vae_moments_0"], 3e-5)


@pytest.mark.parametrize("restart", [True, False], ids=["each step", "in a row"])
def test_training(restart, make, meta, twin, words, g, monkeypatch) -> None:
    """The recorded steps through `training_step`: each from the recorded shifts before it, then all in a row."""
    run, seen = meta["run"], {}
    predict = type(twin).predict

    def watch(self, latents, timestep, conditioning):
        seen["pred"] = predict(self, latents, timestep, conditioning)
        return seen["pred"]

    method = make(prior={"count": 1}).train()
    method.prior.pictures(twin, method.concepts[0].word)  # drawn before the draws are replaced
    optimizer = method.configure_optimizers()
    monkeypatch.setattr(type(twin), "predict", watch)
    steps, count = run["max_train_steps"], run["train_batch_size"]
    for k in range(steps):
        if restart and k:
            put(meta, method, g["delta_after"][k - 1])
        monkeypatch.setattr(draws, "normal", lambda *_, k=k: g["noise"][k])
        monkeypatch.setattr(draws, "integers", lambda *_, k=k: g["timesteps"][k])
        monkeypatch.setattr(method, "clean_latents", lambda rows, k=k: meta["vae_scale"] * g["vae_sample"][k])
        prompts = [run["instance_prompt"]] * count + [run["class_prompt"]] * count
        assert torch.equal(twin.tokenize(prompts).ids, g["input_ids"][k])
        instance = [run["instance_prompt"].replace(words, "<it>")] * count
        numbers = torch.arange(count)
        batch = Batch(
            torch.zeros(count, 3, twin.size, twin.size), instance, 0 * numbers, numbers, numbers, numbers.bool()
        )
        loss = method.training_step(batch, k)
        close("loss", loss, g["loss"][k], 3e-6)
        close("model_pred", seen["pred"], g["model_pred"][k], 1e-4)
        loss.backward()
        norm = joined(meta, method, gradients=True).norm()
        close("grad_norm, relative", norm / g["grad_norm"][k], torch.ones(()), 1e-5)
        method.configure_gradient_clipping(optimizer, meta["max_grad_norm"])
        theirs, largest = g["clipped_grad"][k], g["clipped_grad"][k].abs().max()
        close("clipped_grad, relative", joined(meta, method, gradients=True) / largest, theirs / largest, 5e-4)
        optimizer.step()
        optimizer.zero_grad()
        apart = (joined(meta, method) - g["delta_after"][k]).abs()
        close("delta_after: mean", apart.mean(), torch.zeros(()), 1e-5)
        close("delta_after: share off by more than 1e-5", (apart > 1e-5).float().mean(), torch.zeros(()), 0.05)
        close("delta_after: group 2", group_two(meta, joined(meta, method)), group_two(meta, g["delta_after"][k]), 1e-6)
    if not restart:
        own = _prediction(method, meta, g)
        close("prediction with own δ", own, _prediction(put(meta, method, g["delta_after"][-1]), meta, g), 5e-5)


@torch.no_grad()
def _prediction(method: SVDiff, meta, g) -> Tensor:
    changed = method._changed(1.0)
    states = method.model.encode_text([meta["sampling"]["prompt"], meta["run"]["class_prompt"]], changed.text)
    how = Conditioning(states[None], offsets=changed.unet)
    return method.model.predict(g["given.sample"], g["given.timesteps"], how)


def test_files(root, make, meta, g, tmp_path) -> None:
    """The recorded run's files are its last shifts; what we write has their names, metadata and numbers."""
    method = make()
    method.load_foreign(0, root / "saved" / "spectral_shifts.safetensors")
    assert torch.equal(joined(meta, method), g["delta_after"][-1])
    written = method.export(0, tmp_path, steps=1)
    assert [path.name for path in written] == sorted(path.name for path in (root / "saved").iterdir())
    for path in written:
        ours, theirs = load_file(path), load_file(root / "saved" / path.name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], value) for name, value in theirs.items())
        with safe_open(path, "pt") as mine, safe_open(root / "saved" / path.name, "pt") as other:
            assert mine.metadata() == other.metadata()
