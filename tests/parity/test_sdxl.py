"""SDXL against diffusers' pipeline and two of its example scripts, on the twin in the released folder layout.

Items are named as in golden/sdxl/README.md, whose tolerances these are or tighter ones. The committed slice holds the
tokens, the learnt pair and a few layers of every LoRA file: what needs no network.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hiperlab import draws
from hiperlab.base.method import Method, Step, Subject
from hiperlab.base.prior_preservation import preserved
from hiperlab.data.batch import Batch
from hiperlab.data.images import corner, in_range
from hiperlab.errors import UserError
from hiperlab.formats import embedding
from hiperlab.formats import lora as lora_files
from hiperlab.loss.dco import min_snr
from hiperlab.loss.diffusion import denoising_loss
from hiperlab.model import inversion, text_towers
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.load import pretrained
from hiperlab.model.sampler import Sampler, denoise
from hiperlab.model.text_towers import TextTower
from hiperlab.model.tiny import clip_tokenizer
from tests.composed import build as compose
from tests.parity import golden
from tests.parity.replay import texts

GOLDEN = "sdxl"
ZERO = torch.zeros(1, dtype=torch.long)
RUNS = ("euler_zero", "euler_empty", "ddim_zero", "ddim_empty", "euler_negative_sizes")
LORA_FILES = {  # file -> the recorded latents that it must give
    "pytorch_lora_weights": "diffusers",
    "text_model_names": "text_model_names",
    "kohya_diffusers_blocks": "kohya_diffusers_blocks",
    "kohya_sgm": "kohya_sgm",
    "kohya_sgm_half_alpha": "kohya_sgm_half_alpha",
}


def close(item: str, ours: Tensor, theirs: Tensor, limit: float) -> None:
    golden.close(f"sdxl {item}", ours, theirs, limit)


@pytest.fixture(scope="module")
def how(meta) -> dict[str, Any]:
    return meta["settings"]


def load(how: dict[str, Any], **settings: Any):
    return pretrained("sdxl", str(golden.folder("tiny-sdxl")), size=how["size"][0], **settings)


@pytest.fixture(scope="module")
def stack(source, how):
    if source == "slice":
        pytest.skip("the committed slice has no twin")
    return load(how)


@pytest.fixture(scope="module")
def argmax(source, how):
    """The twin that takes the pooled row where transformers does."""
    if source == "slice":
        pytest.skip("the committed slice has no twin")
    return load(how, pooled_at="argmax")


def sizes(how: dict[str, Any]) -> Tensor:
    """The micro-conditioning that the settings say (1, 6)."""
    return torch.tensor([[*how["original"], *how["crop"], *how["size"]]], dtype=torch.float32)


@pytest.fixture(scope="module")
def recorded(root) -> Callable[[str], dict[str, Tensor]]:
    """A file of numbers beside golden.safetensors."""

    def read(name: str) -> dict[str, Tensor]:
        path = root / f"{name}.safetensors"
        if not path.is_file():
            pytest.skip(f"{path.name} is not in the committed slice; the full golden folder has it")
        return golden.tensors(path)

    return read


# ---- (a) text, U-Net, sampling ---------------------------------------------------------------------------------------


def test_tokens(how, g) -> None:
    """The second tokenizer fills up with id 0, which is what it makes of a typed "!", too."""
    towers = [TextTower(clip_tokenizer(padding), torch.nn.Identity()) for padding in ("<|endoftext|>", "!")]
    tokens = text_towers.tokenize(towers, how["prompts"], {})
    assert torch.equal(tokens.ids, g["a.ids_1"])
    assert torch.equal(tokens.further[0].ids, g["a.ids_2"])


def test_tokenizers_of_the_folder(stack, how, g) -> None:
    tokens = stack.tokenize(how["prompts"])
    assert torch.equal(tokens.ids, g["a.ids_1"]) and torch.equal(tokens.further[0].ids, g["a.ids_2"])


@torch.no_grad()
def test_texts(stack, how, g) -> None:
    found = {"a": stack.condition_text(how["prompts"])}
    found["a.negative_empty"] = stack.condition_negative("")
    found["a.negative"] = stack.condition_negative(how["negative"])
    second = stack.tokenize([how["prompt_2"]]).further
    found["a.two_prompts"] = stack.condition_tokens(stack.tokenize(how["prompts"][:1])._replace(further=second))
    for name, states in found.items():
        close(f"{name}.states", states.keys[0], g[f"{name}.states"], 1e-5)
        assert states.pooled is not None
        close(f"{name}.pooled", states.pooled, g[f"{name}.pooled"], 1e-5)
    absent = stack.condition_negative(None)
    assert torch.equal(absent.keys[0], g["a.negative_zero.states"][:1])
    assert absent.pooled is not None and torch.equal(absent.pooled, g["a.negative_zero.pooled"][:1])


@torch.no_grad()
def test_layers_left_out(stack, how, g) -> None:
    """`clip_skip` leaves out more layers, and the pooled row alone."""
    towers = [tower._replace(skip=tower.skip + how["clip_skip"]) for tower in stack.towers]
    tokens = stack.tokenize(how["prompts"])
    hidden = text_towers.hidden_states(towers, tokens)
    close("a.states_clip_skip", torch.cat(hidden, dim=-1)[0], g["a.states_clip_skip"], 1e-5)
    pooled = text_towers.pooled(towers[-1], tokens.further[-1], hidden[-1], "end")
    close("a.pooled_clip_skip", pooled, g["a.pooled_clip_skip"], 1e-5)


@torch.no_grad()
def test_unet(stack, how, g) -> None:
    u = golden.pick(g, "a.unet.")
    states = Conditioning(u["context"][None], pooled=u["text_embeds"], sizes=u["time_ids"])
    close("a.unet.out", stack.predict(u["sample"], u["timesteps"], states), u["out"], 1e-5)
    assert torch.equal(sizes(how), g["a.time_ids"])
    other = states.sized(u["time_ids"][:, [1, 0, 2, 3, 4, 5]])
    assert not torch.allclose(stack.predict(u["sample"], u["timesteps"], other), u["out"], atol=0.1)


@pytest.mark.parametrize("run", RUNS)
@torch.no_grad()
def test_sampling(run, stack, meta, how, g) -> None:
    kind, branch = run.split("_", 1)
    texts_of = {"zero": None, "empty": "", "negative_sizes": how["negative"]}
    states = stack.condition_text(how["prompts"][:1]).sized(sizes(how))
    empty = stack.condition_negative(texts_of[branch]).sized(sizes(how))
    if branch == "negative_sizes":
        other = meta["a"]["negative_sizes"]
        empty = empty.sized(torch.tensor([[*other["negative_original_size"], 0, 0, *other["negative_target_size"]]]))
    sampler = Sampler(meta["a"]["schedulers"][kind], how["steps"], how["guidance"], {})
    scheduler = sampler.build(stack, how["steps"])
    close(f"a.sample.{run}.timesteps", scheduler.timesteps, g[f"a.sample.{run}.timesteps"], 1e-6)

    first = scheduler.scale_model_input(g["a.start"] * scheduler.init_noise_sigma, scheduler.timesteps[0])
    step = scheduler.timesteps[:1]
    seen = torch.cat([stack.predict(first, step, each) for each in (empty, states)])
    close(f"a.sample.{run}.eps_first", seen, g[f"a.sample.{run}.eps_first"], 1e-5)

    path: list[Tensor] = []
    scheduler = sampler.build(stack, how["steps"])
    last = denoise(
        stack, g["a.start"], scheduler, lambda t: states, empty, how["guidance"],
        watch=lambda number, latents: path.append(latents[0]),
    )  # fmt: skip
    close(f"a.sample.{run}.trajectory", torch.stack(path), g[f"a.sample.{run}.trajectory"], 2e-5)
    if f"a.sample.{run}.image" in g:
        picture = stack.decode(last)[0].permute(1, 2, 0).div(2).add(0.5).clamp(0, 1)
        close(f"a.sample.{run}.image", picture, g[f"a.sample.{run}.image"], 1e-4)


# ---- (d) inversion ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_inversion(stack, root, meta, how, g) -> None:
    picture = Image.open(root / meta["d"]["picture"]).convert("RGB")
    levels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    moments = stack.encode_moments(in_range(levels)[None])
    close("d.moments", moments, g["d.moments"], 1e-5)
    start = stack.scale(moments[:, : moments.shape[1] // 2])
    close("d.latents", start, g["d.latents"], 1e-5)

    states, steps = stack.condition_text([meta["d"]["prompt"]]).sized(sizes(how)), meta["d"]["steps"]
    found = inversion.invert(stack, start, states, steps)
    times = inversion.timesteps(steps, stack.num_timesteps)
    assert times == g["d.timesteps_up"].tolist()
    close("d.inversion", found.latents[1:, 0], g["d.inversion"], 1e-5)
    back, path = found.latents[-1], []
    for time in times[::-1]:
        back = inversion.previous(stack, back, inversion.predict_noise(stack, back, time, states), time, steps)
        path.append(back[0])
    close("d.reconstruction", torch.stack(path), g["d.reconstruction"], 2e-4)
    close("d.image", stack.decode(back), g["d.image"], 2e-4)


# ---- training --------------------------------------------------------------------------------------------------------


def test_sizes_of_the_pictures(source, how, recorded) -> None:
    """What the scripts tell the U-Net of each picture: one squeezes, the other cuts the middle out."""
    for file, crop in (("ti", "squeeze"), ("lora", "middle")):
        rows = recorded(file)[f"{file}.time_ids"].flatten(0, -2).long().tolist()
        assert rows
        for height, width, top, left, side, _ in rows:
            assert [height, width] in how["picture_sizes"] or [width, height] in how["picture_sizes"]
            assert corner((width, height), side, crop, None, flip=False) == (top, left)


def replayed(method: Method, rows: dict[str, Tensor], prompts: list[str], monkeypatch) -> Tensor:
    """The loss of a training step whose latents, noise, timesteps and sizes (R, …) are the recorded ones."""
    count = len(rows["latents"])
    monkeypatch.setattr(method, "prepare_batch", lambda batch: batch)
    monkeypatch.setattr(method, "clean_latents", lambda batch: rows["latents"])
    monkeypatch.setattr(method, "training_noise", lambda batch, shape: rows["noise"])
    monkeypatch.setattr(draws, "integers", lambda *given: rows["timesteps"])
    numbers = torch.arange(count)
    side = 8 * rows["latents"].shape[-1]
    batch = Batch(
        torch.zeros(count, 3, side, side), prompts, torch.zeros_like(numbers), numbers, torch.zeros_like(numbers),
        torch.zeros(count, dtype=torch.bool), sizes=rows["time_ids"],
    )  # fmt: skip
    return method.training_step(batch, 0)


def seen(method: Method, rows: dict[str, Tensor], prompts: list[str]) -> tuple[Conditioning, Tensor]:
    """What the U-Net reads in a recorded step, and what it answers."""
    z_t = method.model.add_noise(rows["latents"], rows["noise"], rows["timesteps"])
    which, samples = torch.zeros(len(z_t), dtype=torch.long), torch.arange(len(z_t))
    states = method.condition(Step(prompts, which, rows["timesteps"], z_t, samples)).sized(rows["time_ids"])
    return states, method.model.predict(z_t, rows["timesteps"], states)


INPUTS = ("latents", "noise", "timesteps", "time_ids", "ids_1", "ids_2")


@pytest.mark.parametrize("case", ["ti", "ti_eos"])
def test_textual_inversion(case, stack, argmax, how, recorded, monkeypatch) -> None:
    """Rows of both encoders, with the pooled row at the end token and where transformers takes it."""
    base, all_of = (argmax if case == "ti" else stack), recorded("ti")
    shared, own = golden.pick(all_of, "ti."), golden.pick(all_of, f"{case}.")
    method = compose("ti", base, [Subject("it", how["placeholder"], how["initializer"])], num_vectors=how["vectors"])
    widths = base.widths
    for number, rows in enumerate(method.vectors.detach()[0].split(widths, dim=-1), 1):
        close(f"ti init_{number}", rows, shared[f"init_{number}"], 0)
    optimizer = torch.optim.AdamW(method.parameters(), lr=how["ti_lr"], weight_decay=1e-2)
    placeholder_ids = range(len(base.tokenizer), len(base.tokenizer) + how["vectors"])
    for step in range(len(own["loss"])):
        now = {name: shared[name][step] for name in INPUTS}
        prompts = texts(base.tokenizer, now["ids_1"], placeholder_ids, how["placeholder"])
        for number, tokens in enumerate([(t := base.tokenize(prompts, method.slots)), *t.further], 1):
            filled = torch.where(tokens.slots >= 0, placeholder_ids[0] + tokens.slots, tokens.ids)
            assert torch.equal(filled, now[f"ids_{number}"])
        states, prediction = seen(method, now, prompts)
        assert states.pooled is not None
        close(f"{case} pooled", states.pooled, own["pooled"][step], 1e-5)
        if case == "ti":
            close("ti context", states.keys[0], own["context"][step], 1e-5)
            close("ti pred", prediction, own["pred"][step], 1e-5)
        loss = replayed(method, now, prompts, monkeypatch)
        close(f"{case} loss", loss, own["loss"][step], 5e-6)
        loss.backward()
        for number, part in enumerate(method.vectors.grad[0].split(widths, dim=-1), 1):
            close(f"{case} grad_{number}", part, own[f"grad_{number}"][step], 2e-4)
        optimizer.step()
        optimizer.zero_grad()
        for number, rows in enumerate(method.vectors.detach()[0].split(widths, dim=-1), 1):
            close(f"{case} rows_{number}", rows, own[f"rows_{number}"][step], 1e-5)


@torch.no_grad()
def drawn(method: Method, text: str, meta: dict[str, Any], start: Tensor) -> tuple[Conditioning, Tensor]:
    """What the U-Net reads of a text, and the last latents of Euler's path with no negative text."""
    how, stack = meta["settings"], method.model
    step = Step([text], ZERO, ZERO, None, variant=method.variants[0])
    states = method.eval().condition(step).sized(sizes(how))
    empty = method.negative_condition("", method.variants[0], [0]).zeroed().sized(sizes(how))
    sampler = Sampler(meta["a"]["schedulers"]["euler"], how["steps"], how["guidance"], {})
    latents = denoise(stack, start, sampler.build(stack, how["steps"]), lambda t: states, empty, how["guidance"])
    return states, latents


@pytest.mark.parametrize("case", ["ti", "ti_eos"])
def test_the_learnt_pair_draws_their_picture(case, stack, argmax, root, meta, how, g, recorded) -> None:
    base, own = (argmax if case == "ti" else stack), golden.pick(recorded("ti"), f"{case}.loaded.")
    text = meta["ti"]["loaded_prompt"].replace(how["placeholder"], "<it>")
    found = []
    for name in ("pair.safetensors", embedding.SAFE):
        method = compose("ti", base, [Subject("it", "<it>", how["initializer"])], num_vectors=how["vectors"])
        method.load_foreign(0, root / "ti" / name)
        found.append(method.vectors.detach().clone())
    assert torch.equal(*found), "the pair and the two files hold the same rows"
    states, latents = drawn(method, text, meta, g["a.start"])
    assert states.pooled is not None
    close(f"{case} loaded.pooled", states.pooled, own["pooled"], 1e-5)
    close(f"{case} loaded.latents", latents, own["latents"], 2e-5)
    if "states" in own:
        close(f"{case} loaded.states", states.keys[0], own["states"], 1e-5)


def test_rows_of_one_encoder_are_refused(stack, root, how, tmp_path) -> None:
    method = compose("ti", stack, [Subject("it", "<it>", how["initializer"])], num_vectors=how["vectors"])
    alone = tmp_path / embedding.SAFE
    alone.write_bytes((root / "ti" / embedding.SAFE).read_bytes())
    with pytest.raises(UserError, match="holds the rows of one text encoder, and this model has two"):
        method.load_foreign(0, alone)


def test_the_pair_is_read_and_written(root, how, tmp_path) -> None:
    pair = golden.tensors(root / "ti" / "pair.safetensors")
    rows = torch.cat([pair["clip_l"], pair["clip_g"]], dim=1)
    widths = [pair["clip_l"].shape[1], pair["clip_g"].shape[1]]
    assert torch.equal(embedding.read_like(root / "ti" / "pair.safetensors", rows, "", widths), rows)
    assert torch.equal(embedding.read_like(root / "ti" / embedding.SECOND, rows, "", widths), rows)
    written = embedding.write(tmp_path, "it", how["placeholder"], rows, "sdxl", widths)
    for path, name in zip(written, ("pair.safetensors", embedding.SAFE, embedding.SECOND), strict=True):
        ours, theirs = golden.tensors(path), golden.tensors(root / "ti" / name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.fixture
def lora(how) -> Callable[..., Any]:
    def build(base: Any, path: Path | None = None, **changes: Any) -> Any:
        *_, token, noun = how["instance_prompt"].split()
        template = how["instance_prompt"].replace(f"{token} {noun}", "{}")
        settings = {"rank": how["rank"], "alpha": how["rank"], "text_encoder": True, "identifier": token}
        settings["prior"] = {"weight": 0.0}
        method = compose("lora", base, [Subject("it", "<it>", noun)], template=template, **settings | changes)
        if path is not None:
            method.load_foreign(0, path)
        return method

    return build


def names_of(method: Any) -> dict[str, torch.nn.Parameter]:
    """The matrices by the names that the script's parameters have, without "text_model."."""
    found = {}
    for letter, matrices in (("A", method.down), ("B", method.up)):
        for key, value in matrices.items():
            part, _, name = key.replace("/", ".").partition(".")
            found[f"{'unet.' if part == 'unet' else ''}{name}.lora_{letter}.weight"] = value
    return found


def test_lora_training(stack, root, meta, how, recorded, lora, monkeypatch) -> None:
    """The script's steps: gradients of all three networks, clipped together, in its groups of rates and decays."""
    all_of, how_lora = golden.pick(recorded("lora"), "lora."), meta["lora"]
    unet, first, second = how_lora["groups"]
    assert all(first[name] == second[name] for name in ("lr", "weight_decay", "eps"))
    method = lora(
        stack, root / "lora" / "initial.safetensors", text_lr=first["lr"], text_decay=first["weight_decay"],
        optimizer={name: unet[name] for name in ("lr", "weight_decay", "eps")},
    )  # fmt: skip
    own = names_of(method)
    names = [name.replace("text_model.", "") for name in how_lora["names"]]
    unread = {name.replace("text_model.", "") for name in how_lora["without_gradient"]}
    assert own.keys() == set(names) - unread, "all their matrices but those that get no gradient"
    optimizer = method.configure_optimizers()
    for step in range(len(all_of["loss"])):
        now = {name: all_of[name][step] for name in INPUTS}
        prompts = [method.template.replace("{}", "<it>")] * len(now["latents"])
        states, prediction = seen(method, now, prompts)
        assert states.pooled is not None
        limits = (1e-5, 1e-5, 2e-5) if step == 0 else (1e-4, 1e-4, 2e-4)
        close("lora.context", states.keys[0], all_of["context"][step], limits[0])
        close("lora.pooled", states.pooled, all_of["pooled"][step], limits[1])
        close("lora.pred", prediction, all_of["pred"][step], limits[2])
        loss = replayed(method, now, prompts, monkeypatch)
        close("lora.loss", loss, all_of["loss"][step], 1e-5)
        loss.backward()
        norms = torch.stack([own[name].grad.norm() if name in own else torch.tensor(torch.nan) for name in names])
        theirs = all_of["grad_norms"][step]
        assert torch.equal(norms.isnan(), theirs.isnan())
        close("lora.grad_norms", norms.nan_to_num(), theirs.nan_to_num(), 4e-3)
        total = norms.nan_to_num().norm()
        close("lora.grad_norm", total, all_of["grad_norm"][step], 1e-4)
        method.configure_gradient_clipping(optimizer, how_lora["max_grad_norm"])
        clipped = torch.stack([value.grad.norm() for value in own.values()]).norm()
        assert float(clipped) <= how_lora["max_grad_norm"] * (1 + 1e-5)
        optimizer.step()
        optimizer.zero_grad()
        norms = torch.stack([own[name].detach().norm() for name in names if name in own])
        kept = torch.tensor([name in own for name in names])
        close("lora.weight_norms", norms, all_of["weight_norms"][step][kept], 1e-4)


@pytest.mark.parametrize("name", LORA_FILES)
def test_lora_files(name, stack, root, meta, how, g, recorded, lora) -> None:
    """Every form of the same matrices draws what diffusers draws with it, with its alpha."""
    values, item = recorded("lora"), LORA_FILES[name]
    method = lora(stack, root / "lora" / f"{name}.safetensors")
    word = how["instance_prompt"].split()[-2:]
    states, latents = drawn(method, how["instance_prompt"].replace(" ".join(word), "<it>"), meta, g["a.start"])
    assert states.pooled is not None
    close(f"lora.loaded.{item}.states", states.keys[0], values[f"lora.loaded.{item}.states"], 1e-5)
    close(f"lora.loaded.{item}.pooled", states.pooled, values[f"lora.loaded.{item}.pooled"], 1e-5)
    close(f"lora.loaded.{item}", latents, values[f"lora.loaded.{item}"], 3e-5)
    assert not torch.allclose(latents, values["lora.loaded.none"], atol=1.0)


def test_lora_strength(stack, root, meta, how, g, recorded, lora) -> None:
    method = lora(stack, root / "lora" / "pytorch_lora_weights.safetensors", strength=[0.5])
    word = how["instance_prompt"].split()[-2:]
    _, latents = drawn(method, how["instance_prompt"].replace(" ".join(word), "<it>"), meta, g["a.start"])
    for item in ("diffusers_weight_0.5", "diffusers_scale_0.5"):
        close(f"lora.loaded.{item}", latents, recorded("lora")[f"lora.loaded.{item}"], 3e-5)


def test_lora_forms_hold_the_same_matrices(root) -> None:
    first = None
    for name in LORA_FILES:
        adapter = lora_files.read(root / "lora" / f"{name}.safetensors", sdxl=True)
        first = first or adapter
        scale = 0.5 if name == "kohya_sgm_half_alpha" else 1.0
        for ours, theirs in ((adapter.unet, first.unet), (adapter.text, first.text)):
            assert ours.keys() == theirs.keys() and ours
            for key, (down, up) in ours.items():
                assert torch.equal(down, theirs[key][0]) and torch.equal(up, scale * theirs[key][1])
    assert {key.split(".")[0] for key in first.text} == {"text_encoder", "text_encoder_2"}


def test_lora_files_that_are_refused(root) -> None:
    with pytest.raises(UserError, match=r"kohya_as_the_script_writes.* is no LoRA that diffusers can convert"):
        lora_files.read(root / "lora" / "kohya_as_the_script_writes.safetensors", sdxl=True)
    with pytest.raises(UserError, match="is a LoRA for SDXL, which has a second text encoder"):
        lora_files.read(root / "lora" / "kohya_sgm.safetensors")


@pytest.mark.parametrize("case", ["plain", "min_snr", "prior", "prior_two", "prior_min_snr"])
@torch.no_grad()
def test_losses(case, stack, how, recorded) -> None:
    """Two cases are what the script means, not what it computes, see golden/sdxl/README.md."""
    x = golden.pick(recorded("loss"), f"{case}.")
    right = "_right_pairing" if case == "prior_two" else ""
    noun = how["class_prompt"]
    if case.startswith("prior"):
        half = len(x["latents"]) // 2
        prompts = [how["instance_prompt"]] * half + [noun] * half
    else:
        prompts = [how["instance_prompt"]] * len(x["latents"])
    states = stack.condition_text(prompts).sized(x["time_ids"])
    z_t = stack.add_noise(x["latents"], x["noise"], x["timesteps"])
    prediction = stack.predict(z_t, x["timesteps"], states)
    close(f"loss.{case}.pred{right}", prediction, x[f"pred{right}"], 1e-5)
    if not right:
        close(f"loss.{case}.context", states.keys[0], x["context"], 1e-5)
    weights = min_snr(stack.alpha_bar[x["timesteps"]], how["snr_gamma"], stack.prediction_type)
    if case == "prior_min_snr":
        found = preserved(prediction, x["noise"], how["prior_weight"])
        wanted, loss = x["loss_instance_weight_only"], (weights[: len(found[""])] * found[""]).mean()
        loss = loss + found["prior"].mean()
    elif case.startswith("prior"):
        found = preserved(prediction, x["noise"], how["prior_weight"])
        wanted, loss = x[f"loss{right}"], found[""].mean() + found["prior"].mean()
    else:
        rows = denoising_loss(prediction, x["noise"])
        wanted, loss = x["loss"], (rows * weights if case == "min_snr" else rows).mean()
    close(f"loss.{case}.loss{right}", loss, wanted, 2e-6)
