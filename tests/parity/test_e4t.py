"""E4T against the numbers of the public reimplementation. Items are named as in golden/e4t/README.md.

Limits are ten times the errors of a second implementation on the same recorded inputs. The committed slice holds
single offsets and both encoders.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from transformers import CLIPVisionConfig, CLIPVisionModel

from hiperlab import draws
from hiperlab.base.method import Step, Subject
from hiperlab.data.batch import Batch
from hiperlab.formats import e4t as formats
from hiperlab.formats.open_clip import to_open_clip, to_transformers
from hiperlab.layer.image_encoder import LayerHead, PatchHead, pool
from hiperlab.layer.weight_offset import WeightOffset
from hiperlab.method.e4t import E4T
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.offsets import Offsets
from hiperlab.model.sampler import ddim, denoise
from hiperlab.model.unet_encoder import UNetEncoder
from hiperlab.model.vision_tower import VisionTower, preprocess
from hiperlab.model.weight_changes import Multiplied
from tests.composed import build as compose
from tests.parity import golden

close = golden.close


@pytest.fixture(scope="module")
def root() -> Path:
    return golden.folder("e4t")


@pytest.fixture(scope="module", params=["golden", "slice"])
def core(request) -> Path:
    """The full golden folder, and the slice of it that is committed."""
    return golden.folder("e4t") if request.param == "golden" else golden.SLICE / "e4t"


@pytest.fixture(scope="module")
def twin(meta):
    return golden.twin(int(meta["d"]["args"]["resolution"]), "golden")


def offsets(root: Path) -> dict[str, WeightOffset]:
    """The initial offsets, by the projection's name in the U-Net."""
    state = golden.tensors(root / "init_weight_offsets.safetensors")
    names = sorted({name.rsplit(".wo_", 1)[0] + ".to_" + name.rsplit(".wo_", 1)[1][0] for name in state})
    made = {}
    for name in names:
        own = golden.pick(state, f"{name[: -len('to_q')]}wo_{name[-1]}.")
        made[name] = WeightOffset(len(own["linear1.bias"]), len(own["linear2.bias"]))
        made[name].load_state_dict(own)
    return made


def changes(made: dict[str, WeightOffset]) -> Offsets:
    return Offsets({f"{name}.weight": Multiplied(*offset()) for name, offset in made.items()})


@pytest.mark.parametrize("which", ["square", "wide"])
def test_one_offset(core, which) -> None:
    g = golden.pick(golden.tensors(core / "a_weight_offsets.safetensors"), f"{which}.")
    outputs, inputs = g["base_weight"].shape
    offset = WeightOffset(inputs, outputs)
    offset.load_state_dict(golden.pick(g, "param."))
    left, right = offset()
    close("e4t delta", left @ right.T, g["delta"], 3e-6)
    weight = Multiplied(left, right).apply(g["base_weight"])
    close("e4t effective_weight", weight, g["effective_weight"], 3e-6)
    loss = F.mse_loss(g["x"] @ weight.T, g["y"])
    close("e4t offset loss", loss, g["loss"], 3e-6)
    loss.backward()
    for name, parameter in offset.named_parameters():
        close("e4t offset grad", parameter.grad, g[f"grad.{name}"], 3e-6)  # type: ignore[arg-type]


def test_unet_with_offsets_and_its_first_half(root, twin) -> None:
    g = golden.tensors(root / "b_unet.safetensors")
    made = offsets(root)
    assert {f"{name}.weight" for name in made} <= dict(twin.unet.named_parameters()).keys()
    with torch.no_grad():
        changed = changes(made)
        weights = changed.weights(twin.unet)
        for name, value in golden.pick(g, "merged.").items():
            close("e4t merged", weights[name], value, 3e-6)
        states = Conditioning(g["encoder_hidden_states"][None])
        close("e4t noise_pred_without_offsets", twin.predict(g["sample"], g["timesteps"], states),
              g["noise_pred_without_offsets"], 1e-5)  # fmt: skip
        with_offsets = Conditioning(states.keys, offsets=changed)
        close("e4t noise_pred", twin.predict(g["sample"], g["timesteps"], with_offsets), g["noise_pred"], 1e-5)
        half = UNetEncoder(twin.unet)
        named = {f"unet.{name}": weight for name, weight in weights.items()}
        maps = functional_call(half, named, (g["sample"], g["timesteps"], states))
    wanted = golden.pick(g, "feature.")
    assert len(maps) == len(wanted)
    for number, found in enumerate(maps):
        close("e4t features", found, wanted[f"{number:02d}"], 1.5e-5)


def tower(state: dict[str, Tensor], size: int, activation: str) -> VisionTower:
    """A tower from transformers' names."""
    width, _, patch, _ = state["embeddings.patch_embedding.weight"].shape
    layers = len({name.split(".")[2] for name in state if name.startswith("encoder.layers.")})
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=4,
        image_size=size, patch_size=patch, hidden_act=activation,
    )  # fmt: skip
    network = CLIPVisionModel(config).eval()
    prefix = "vision_model." if next(iter(network.state_dict())).startswith("vision_model.") else ""
    network.load_state_dict({f"{prefix}{name}": value for name, value in state.items()}, strict=True)
    return VisionTower(network, size)


def test_the_reimplementations_encoder(core) -> None:
    g, state = (golden.tensors(core / f"{name}.safetensors") for name in ("c_encoder", "init_encoder"))
    small = preprocess(g["image"], 224)
    close("e4t preprocessed_image", small[0][:, 80:144, 80:144], g["preprocessed_image_0_crop"], 1e-6)
    close("e4t preprocessed sums", small.double().sum((2, 3)), g["preprocessed_image_sums"], 1e-6)
    theirs = golden.pick(state, "clip_vision.")
    renamed = to_transformers(theirs)
    back = to_open_clip(renamed)
    assert back.keys() == theirs.keys() and all(torch.equal(back[name], theirs[name]) for name in theirs)
    seen = tower(renamed, 224, "gelu")(g["image"])
    close("e4t clip_pooled", seen.pooled, g["clip_pooled"], 5e-6)
    close("e4t clip_tokens", seen.tokens, g["clip_tokens"], 5e-6)
    pooled = g["unet_pooled"]
    linears = len({name.split(".")[1] for name in state if name.startswith("first_linears.")})
    head = PatchHead(g["embedding"].shape[-1], g["clip_tokens"].shape[-1], linears, pooled.shape[-1])
    own = {name: value for name, value in state.items() if not name.startswith(("clip_vision.", "first_linears."))}
    for part in ("weight", "bias"):
        own[f"first_{part}"] = torch.stack([state[f"first_linears.{number}.{part}"] for number in range(linears)])
    head.load_state_dict(own)
    close("e4t unet_embedded", head.unet_feature_embedder(pooled), g["unet_embedded"], 5e-6)
    close("e4t embedding", head(seen.pooled, seen.tokens, pooled), g["embedding"], 5e-6)


def test_the_unets_maps_are_pooled(root) -> None:
    g, maps = (golden.tensors(root / f"{name}.safetensors") for name in ("c_encoder", "b_unet"))
    pooled = pool([value for _, value in sorted(golden.pick(maps, "feature.").items())])
    close("e4t unet_pooled", pooled, g["unet_pooled"], 1e-6)


def test_the_papers_encoder(core) -> None:
    g = golden.tensors(core / "c2_encoder_paper.safetensors")
    settings = golden.config(core / "meta.json")["c2_vision_config"]
    seen = tower(golden.pick(g, "state.clip_vision.vision_model."), settings["image_size"], settings["hidden_act"])(
        g["image"]
    )
    rows, width = len(g["image"]), settings["hidden_size"]
    assert seen.classes.shape == (rows, settings["num_hidden_layers"] // 2, width)
    features = pool([value for _, value in sorted(golden.pick(g, "feature.").items())])
    head = LayerHead(g["embedding"].shape[-1], width, features.shape[-1])
    own = {name: value for name, value in golden.pick(g, "state.").items() if not name.startswith("clip_vision.")}
    head.load_state_dict({name.replace("linear.", "vision_linear.", 1) if name.startswith("linear.") else name: value
                          for name, value in own.items()})  # fmt: skip
    close("e4t c2 embedding", head(seen.classes, features), g["embedding"], 5e-6)


# ---- (d) to (g): whole steps, files, pictures ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eyes(root, tmp_path_factory) -> Path:
    """The random tower as a folder: that it has 4 heads is in no tensor."""
    folder = tmp_path_factory.mktemp("tower")
    state = golden.pick(golden.tensors(root / "init_encoder.safetensors"), "clip_vision.")
    tower(to_transformers(state), 224, "gelu").network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def started(root, tmp_path_factory) -> Path:
    """The recorded start state as a folder of the reimplementation, which is how its script was started."""
    folder = tmp_path_factory.mktemp("start")
    for name in ("weight_offsets", "encoder"):
        torch.save(dict(golden.tensors(root / f"init_{name}.safetensors")), folder / f"{name}.pt")
    (folder / "config.json").write_bytes((root / "g_pretrained" / "config.json").read_bytes())
    return folder


@pytest.fixture(scope="module")
def face(meta) -> Subject:
    word = meta["d"]["args"]["domain_class_token"]
    return Subject("subject", meta["d"]["placeholder_token"], word)


def e4t(twin, face: Subject, domain: Path | None, eyes: Path, **changes: Any) -> E4T:
    """E4T as conf/method/e4t.yaml publishes it: set here are the start, the tower and what meta.json says."""
    method = compose("e4t", twin, [face], domain=domain and str(domain), tower=str(eyes), **changes)
    assert isinstance(method, E4T)
    return method


def record(method: E4T, monkeypatch) -> dict[str, Tensor]:
    """What a step computes, by the golden names."""
    seen: dict[str, Tensor] = {}
    predict, words = type(method.model).predict, method.words

    def watch(self, latents, timestep, conditioning):
        out = predict(self, latents, timestep, conditioning)
        seen.update(noisy_latents=latents, encoder_hidden_states=conditioning.keys[0], noise_pred=out)
        return out

    def watch_words(*given):
        word, offset = words(*given)
        seen.update(domain_embed=word, embedding=offset / method.embed_scale)
        return word, offset

    monkeypatch.setattr(type(method.model), "predict", watch)
    monkeypatch.setattr(method, "words", watch_words)
    return seen


def step(method: E4T, prompts, pixels, latents, noise, timesteps, monkeypatch) -> tuple[Tensor, Tensor]:
    """Loss and penalty of one recorded step through `training_step`."""
    monkeypatch.setattr(method, "clean_latents", lambda rows: latents)
    monkeypatch.setattr(draws, "normal", lambda *_: noise)
    monkeypatch.setattr(draws, "integers", lambda *_: timesteps)
    rows = torch.arange(len(prompts))
    method._losses.clear()
    loss = method.training_step(Batch(pixels, prompts, 0 * rows, rows, rows, rows.bool()), 0)
    noted = dict(zip(method._loss_names, method._losses[-1].tolist(), strict=True))
    return loss, torch.tensor(noted["loss/reg"])


def theirs_by_ours(method: E4T) -> dict[str, tuple[str, int | None]]:
    """Golden parameter name -> our parameter and, where ours are stacked, the place."""
    found: dict[str, tuple[str, int | None]] = {}
    for name, value in method.named_parameters():
        part, _, rest = name.partition(".")
        if part == "head" and rest.startswith("first_"):
            kind = rest.removeprefix("first_")
            found |= {f"encoder.first_linears.{number}.{kind}": (name, number) for number in range(len(value))}
        elif part == "head":
            found[f"encoder.{rest}"] = (name, None)
        elif part == "weight_offsets":
            projection, _, rest = rest.partition(".")
            found[f"unet.{projection.replace('/', '.').replace('.to_', '.wo_')}.{rest}"] = (name, None)
        elif part == "unet_offsets":
            found[f"unet.{rest.replace('/', '.')}"] = (name, 0)
    return found


def test_pretraining_step_and_the_file_it_writes(root, meta, twin, face, started, eyes, tmp_path, monkeypatch) -> None:
    """(d) through `training_step`, then AdamW to (g_pretrained)."""
    g, settings = golden.tensors(root / "d_pretrain_step.safetensors"), meta["d"]
    adam, args = settings["optimizer"], settings["args"]
    method = e4t(
        twin, face, started, eyes, phase="pretrain", reg_lambda=float(args["reg_lambda"]), optimizer=adam,
        embed_scale=float(args["domain_embed_scale"]), export_files=True,
    )  # fmt: skip
    prompts = settings["prompts"]
    tokens = twin.tokenize(prompts, {face.placeholder: [0]})
    place = tokens.slots >= 0
    assert torch.equal(tokens.ids[~place], g["input_ids"][~place])
    assert (g["input_ids"][place] == settings["placeholder_token_id"]).all()
    assert torch.equal(twin.tokenize([""]).ids, g["empty_input_ids"])
    close("e4t d empty_hidden_states", twin.encode_text([""]), g["empty_hidden_states"], 1e-5)
    seen = record(method, monkeypatch)
    loss, penalty = step(method, prompts, g["pixel_values"], g["latents"], g["noise"], g["timesteps"], monkeypatch)
    for name, value in seen.items():
        close(f"e4t d {name}", value, g[name], 1.3e-5 if name == "noise_pred" else 6e-6)
    close("e4t d loss", loss, g["loss"], 6e-6)
    close("e4t d loss_reg", penalty, g["loss_reg"], 6e-6)
    close("e4t d loss_diff", loss - penalty, g["loss_diff"], 6e-6)
    optimizer = method.configure_optimizers()
    group = optimizer.param_groups[0]
    for key, value in settings["optimizer"].items():
        assert (list(group[key]) if key == "betas" else group[key]) == value, key
    loss.backward()
    ours, parameters = theirs_by_ours(method), dict(method.named_parameters())
    assert len(golden.pick(g, "gradnorm.")) == settings["n_grads"] == len(ours)
    for name, value in golden.pick(g, "grad.").items():
        parameter, number = ours[name]
        grad = parameters[parameter].grad if number is None else parameters[parameter].grad[number]
        limit = 3e-3 if name.endswith(".v") else 3e-5  # a scalar is a sum of large terms that cancel
        apart = float((grad - value).norm() / value.norm())
        golden.close(f"e4t d grad{' v' if limit > 1e-3 else ''}", torch.tensor(apart), torch.tensor(0.0), limit, True)
    for name, value in golden.pick(g, "gradnorm.").items():
        parameter, number = ours[name]
        grad = parameters[parameter].grad if number is None else parameters[parameter].grad[number]
        close("e4t d gradnorm", grad.norm(), value.reshape(()), 3e-3)
    # AdamW's first step is a sign: with our gradients it would differ by lr where they are near eps.
    for name, value in golden.pick(g, "grad.").items():
        parameter, number = ours[name]
        (parameters[parameter].grad if number is None else parameters[parameter].grad[number]).copy_(value)
    method.configure_gradient_clipping(optimizer, None)
    optimizer.step()
    (weights, encoder, config, _) = method.export(0, tmp_path, steps=1)
    recorded = set(golden.pick(g, "grad."))
    for path, prefix in ((weights, "unet"), (encoder, "encoder")):
        mine, wanted = (torch.load(file, weights_only=True) for file in (path, root / "g_pretrained" / path.name))
        assert mine.keys() == wanted.keys()
        for name, value in wanted.items():
            limit = (
                6e-7 if f"{prefix}.{name}" in recorded or "clip_vision" in name else settings["optimizer"]["lr"] / 10
            )
            item = "e4t d->g" if limit == 6e-7 else "e4t d->g (gradient not stored)"
            golden.close(f"{item} (absolute)", mine[name], value, limit, absolute=True)
    written, theirs = (golden.config(file) for file in (config, root / "g_pretrained" / "config.json"))
    for key in ("placeholder_token", "domain_class_token", "domain_embed_scale", "reg_lambda", "resolution"):
        assert written[key] == theirs[key], key


def test_tuning_steps(root, meta, twin, face, eyes, monkeypatch) -> None:
    """(e) from the pre-trained files, every U-Net weight trained, to (g_tuned)."""
    g, settings = golden.tensors(root / "e_tuning.safetensors"), meta["e"]
    penalty_weight = float(settings["args"]["reg_lambda"])
    method = e4t(twin, face, root / "g_pretrained", eyes, reg_lambda=penalty_weight, optimizer=settings["optimizer"])
    method.set_reference(0, g["pixel_values"][0])
    ours, parameters = theirs_by_ours(method), dict(method.named_parameters())
    assert len(ours) == settings["n_trainable_tensors"]
    before = {name: value.clone() for name, value in twin.state_dict().items()}
    optimizer = method.configure_optimizers()
    seen = record(method, monkeypatch)
    pixels = g["pixel_values"].expand(len(settings["prompts"][0]), -1, -1, -1)
    for number in range(len(settings["prompts"])):
        now = golden.pick(g, f"step{number}.")
        loss, penalty = step(
            method, settings["prompts"][number], pixels, g["latents"], now["noise"], now["timesteps"], monkeypatch
        )
        close(f"e4t e{number} loss", loss, now["loss"], 1e-5)
        close(f"e4t e{number} loss_reg", penalty, now["loss_reg"], 1e-5)
        close(f"e4t e{number} loss_diff", loss - penalty, now["loss_diff"], 1e-5)
        for name in ("embedding", "domain_embed", "noise_pred"):
            close(f"e4t e{number} {name}", seen[name], now[name], 1.3e-5)
        loss.backward()
        grads = [p.grad for p in method.parameters() if p.grad is not None]
        total = torch.stack([grad.norm() for grad in grads]).norm()
        close(f"e4t e{number} grad_norm", total, now["grad_norm"], 1e-5)
        method.configure_gradient_clipping(optimizer, settings["max_grad_norm"])
        if number == 0:
            for name, value in golden.pick(now, "clipped_grad.").items():
                parameter, place = ours[name]
                grad = parameters[parameter].grad if place is None else parameters[parameter].grad[place]
                close("e4t e0 clipped_grad", grad, value, 3e-3 if name.endswith(".v") else 3e-5)
        optimizer.step()
        optimizer.zero_grad()
    first, last = (formats.read(root / folder) for folder in ("g_pretrained", "g_tuned"))
    assert last.unet is not None
    made = {name.removeprefix("unet_offsets.").replace("/", "."): value[0]
            for name, value in method.named_parameters() if name.startswith("unet_offsets.")}  # fmt: skip
    update, wanted = [], []
    for name, value in last.unet.items():
        update.append(made[name].detach().flatten())
        wanted.append((value - before[f"unet.{name}"]).flatten())
    for name, value in last.head.items():
        update.append((parameters[f"head.{name}"].detach() - first.head[name]).flatten())
        wanted.append((value - first.head[name]).flatten())
    for name, value in last.offsets.items():
        projection, _, part = name.partition(".to_")
        mine = parameters[f"weight_offsets.{projection.replace('.', '/')}/to_{part}"]
        update.append((mine.detach() - first.offsets[name]).flatten())
        wanted.append((value - first.offsets[name]).flatten())
    one, other = torch.cat(update), torch.cat(wanted)
    golden.close("e4t e->g parameters (absolute)", one, other, settings["optimizer"]["lr"], absolute=True)
    apart = (one - other).norm() / other.norm()
    golden.close("e4t e->g (norm of update)", apart, torch.zeros(()), 1.2e-2, absolute=True)
    assert all(torch.equal(value, before[name]) for name, value in twin.state_dict().items()), "the stack stays"


@pytest.mark.parametrize("which", ["pretrained_cfg", "pretrained_nocfg", "tuned_cfg"])
def test_sampling(which, root, meta, twin, face, eyes, monkeypatch) -> None:
    """(f): the encoder looks at every step; the tuned U-Net is read as its difference from the frozen one."""
    g, how = golden.pick(golden.tensors(root / "f_sampling.safetensors"), f"{which}."), meta["f"][which]
    picture = golden.tensors(root / "f_sampling.safetensors")["image_uint8"].permute(2, 0, 1) / 127.5 - 1
    tuned = how["unet_file"] == "unet.pt"
    method = e4t(twin, face, None, eyes, phase="tune" if tuned else "pretrain").eval()
    method.load_foreign(0, root / how["checkpoint"] / how["unet_file"])
    method.set_reference(0, picture)
    seen, embeddings, trajectory = record(method, monkeypatch), [], []
    rows = len(g["latents_in"])

    def condition(t, latents):
        states = method.condition(
            Step([how["prompt"]] * rows, torch.zeros(rows, dtype=torch.long), t.expand(rows), latents)
        )
        embeddings.append(seen["embedding"])
        return states

    method._sampling = True
    scheduler = ddim(how["steps"], how["guidance_scale"]).build(twin, how["steps"])
    assert scheduler.timesteps.tolist() == how["timesteps"]
    empty = Conditioning(method.negative_condition("", "", [0]).keys[0][None].expand(-1, rows, -1, -1))
    final = denoise(
        twin, g["latents_in"], scheduler, condition, empty, how["guidance_scale"],
        watch=lambda _, latents: trajectory.append(latents), reads_latents=True,
    )  # fmt: skip
    close(f"e4t f {which} embeddings", torch.stack(embeddings), g["embeddings"], 2e-5)
    close(f"e4t f {which} trajectory", torch.stack(trajectory), g["trajectory"], 2e-5)
    close(f"e4t f {which} latents_out", final, g["latents_out"], 2e-5)
