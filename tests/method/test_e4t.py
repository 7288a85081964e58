"""E4T: formulas written naively, what each option trains, domains, and the reimplementation's files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hiperlab.base import artifact
from hiperlab.base.method import Step
from hiperlab.errors import UserError
from hiperlab.formats import e4t as formats
from hiperlab.method import e4t as module
from hiperlab.method.e4t import E4T
from hiperlab.model import vision_loader as towers
from hiperlab.model import vision_tower as vision
from hiperlab.model.vision_tower import Seen, SeenCache
from tests.composed import SUBJECTS, batch, build, config, picture, train

CAT = SUBJECTS[0]
ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn2"


def e4t(stack, **changes) -> E4T:
    """As published, but the U-Net's own weights are left alone where a test does not ask for them: it is faster."""
    method = build("e4t", stack, [CAT], **{"tune": "offsets", **changes})
    assert isinstance(method, E4T)
    return method


def step(stack, rows: int = 2, samples: bool = False, images: Tensor | None = None) -> Step:
    noise = torch.randn(rows, *stack.latent_shape, generator=torch.Generator().manual_seed(1))
    numbers = torch.arange(rows)
    return Step(
        [f"a photo of a {CAT.placeholder}"] * rows,
        0 * numbers,
        300 + numbers,
        noise,
        numbers if samples else None,
        images,
    )


@torch.no_grad()
def keys(method: E4T, at: Step) -> Tensor:
    return method.condition(at).keys[0]


def test_word_without_offset_is_the_class_word(stack) -> None:
    method = e4t(stack)
    torch.nn.init.zeros_(method.head.final_linear.weight)
    torch.nn.init.zeros_(method.head.final_linear.bias)
    plain = stack.encode_text(["a photo of a cat"])[0]
    torch.testing.assert_close(keys(method, step(stack)), plain.expand(2, -1, -1), atol=1e-5, rtol=0)
    torch.nn.init.ones_(method.head.final_linear.bias)
    moved = stack.tokenize([f"a photo of a {CAT.placeholder}"], {CAT.placeholder: [0]})
    word = stack.word_embedding("cat") + 0.1  # s = 0.1 times an output of ones
    wanted = stack.normalise_text(stack.hidden_states(moved, word[None, None]))[0]
    torch.testing.assert_close(keys(method, step(stack)), wanted.expand(2, -1, -1), atol=1e-5, rtol=0)


def test_words_differ_by_row_and_by_step(stack) -> None:
    found = keys(e4t(stack), step(stack))
    assert (found[0] - found[1]).abs().max() > 1e-5


def test_weights_are_w_plus_d_times_one_plus_delta(stack) -> None:
    method = e4t(stack, tune="all")
    with torch.no_grad():
        for value in method.unet_offsets.values():
            value.normal_(generator=torch.Generator().manual_seed(0))
        made = method.changes().weights(stack.unet)
        frozen = dict(stack.unet.named_parameters())
        assert made.keys() == frozen.keys()
        for name in (f"{ATTENTION}.to_k.weight", f"{ATTENTION}.to_out.0.weight", "conv_in.bias"):
            wanted = frozen[name] + method.unet_offsets[name.replace(".", "/")][0]
            if ".to_k." in name:
                offset = method.weight_offsets[name.removesuffix(".weight").replace(".", "/")]
                vx, vy = offset.linear1(offset.v), offset.linear2(offset.v)
                columns = offset.linear_column(torch.outer(vx, vy).T).T
                wanted = wanted * (1 + offset.linear_row(columns).T)
            torch.testing.assert_close(made[name], wanted, atol=1e-6, rtol=1e-5)
    assert len(method.weight_offsets) == 96
    assert not any(key.startswith(("vae", "text")) for key in made)


def test_zero_start_is_the_bare_unet(stack) -> None:
    method, at = e4t(stack, offsets_init="zero", tune="all"), step(stack)
    with torch.no_grad():
        states = method.condition(at)
        bare = type(states)(states.keys)
        ours, theirs = (stack.predict(at.latents, at.timestep, each) for each in (states, bare))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("target", ["embedding", "offset"])
def test_penalty_is_a_sum_over_the_whole_batch(stack, target) -> None:
    """Whatever the micro batches: rows are averaged twice, over a micro batch and over the micro batches."""
    method = e4t(stack, batch_size=4, reg_lambda=0.5, reg_target=target)
    at = step(stack, rows=4, samples=True)
    with torch.no_grad():
        words, offset = method.words(at.latents, at.timestep, method._seen(at), method.changes())
        method.condition(at)
        rows = method.extra_losses(at, at.latents)["reg"]
    torch.testing.assert_close(words, method.class_word + offset)
    wanted = 0.5 * (words if target == "embedding" else offset).square().sum()
    torch.testing.assert_close(rows.mean(), wanted)
    torch.testing.assert_close((rows[:2].mean() + rows[2:].mean()) / 2, wanted)


@pytest.mark.parametrize("which", ["offset", "base"])
def test_which_unet_the_encoder_reads(stack, which) -> None:
    one, other = (e4t(stack, encoder_unet=which, offsets_init=init) for init in ("linear", "zero"))
    other.head.load_state_dict(one.head.state_dict())
    apart = (keys(one, step(stack)) - keys(other, step(stack))).abs().max()
    assert apart > 1e-6 if which == "offset" else apart == 0


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"tune": "all"}, {"head", "weight_offsets", "unet_offsets"}),
        ({"tune": "offsets"}, {"head", "weight_offsets"}),
        ({"tune": "encoder_only"}, {"head"}),
        ({"phase": "pretrain", "tune": "all"}, {"head", "weight_offsets"}),
        ({"phase": "pretrain", "tune": "encoder_only"}, {"head", "weight_offsets"}),
    ],
)
def test_what_is_trained(stack, changes, parts) -> None:
    method = e4t(stack, **changes)
    assert {name.split(".")[0] for name, p in method.named_parameters() if p.requires_grad} == parts
    assert {name.split(".")[0] for name in method.trainable_state()} >= {
        *parts,
        "weight_offsets",
        "class_word",
        "picture",
    }


def test_encoder_of_the_paper_trains(stack) -> None:
    method = e4t(stack, encoder="cls_layers")
    assert method.head.final_linear.in_features == 16 + 32 + 32 + 64 + 64
    start = {name: value.clone() for name, value in method.head.state_dict().items()}
    losses = train(method, 1)
    assert losses[0] > 0 and all(
        not torch.equal(value, start[name]) for name, value in method.head.state_dict().items()
    )


def test_tuning_draws_its_latents_once(stack) -> None:
    """B posterior samples of one picture, again at every step; pre-training draws anew."""
    tuning, other = e4t(stack), e4t(stack, phase="pretrain")
    first, again = batch([CAT], [0, 1]), batch([CAT], [2, 3])
    noise = tuning.posterior_noise(first, (4, 2, 2))
    assert torch.equal(noise, tuning.posterior_noise(again, (4, 2, 2))) and not torch.equal(noise[0], noise[1])
    assert not torch.equal(other.posterior_noise(first, (4, 2, 2)), other.posterior_noise(again, (4, 2, 2)))
    assert tuning.one_picture and not other.one_picture


def test_clipping_is_by_the_norm_of_everything(stack) -> None:
    method = e4t(stack, tune="encoder_only")
    optimizer = method.configure_optimizers()
    for p in method.parameters():
        if p.requires_grad:
            p.grad = torch.ones_like(p)
    method.configure_gradient_clipping(optimizer, None)
    assert float(method.head.final_linear.bias.grad[0]) == 1
    method.configure_gradient_clipping(optimizer, 1.0)
    total = torch.stack([p.grad.norm() for p in method.parameters() if p.requires_grad]).norm()
    assert float(total) == pytest.approx(1, abs=1e-4)


def test_which_picture_the_encoder_sees(stack) -> None:
    """Tuning: its own whatever the rows show; pre-training: the rows'; sampling: what is given, else its own."""
    other = torch.stack([picture(SUBJECTS[1], 0, stack.size)] * 2)
    tuning, domain = e4t(stack), e4t(stack, phase="pretrain")
    for method, samples, reads in ((tuning, True, False), (domain, True, True), (tuning, False, True)):
        own = keys(method, step(stack, samples=samples))
        given = keys(method, step(stack, samples=samples, images=other))
        assert torch.equal(own, given) != reads
    before = keys(tuning, step(stack))
    tuning.set_reference(0, other[0])
    assert torch.equal(keys(tuning, step(stack)), keys(tuning, step(stack, images=other)))
    assert not torch.equal(before, keys(tuning, step(stack)))
    with torch.no_grad():
        tuning.picture.zero_()
    with pytest.raises(UserError, match="has no picture"):
        keys(tuning, step(stack))


def test_a_picture_asks_the_encoder_at_every_step_and_the_weights_once(stack, monkeypatch) -> None:
    method, asked, made = e4t(stack), [], []
    method.head.register_forward_hook(lambda *_: asked.append(1))
    materialise = module.materialise
    monkeypatch.setattr(module, "materialise", lambda *given: made.append(1) or materialise(*given))
    how = {"steps": 3, "guidance": 2.0}
    one = method.sample([f"a {CAT.placeholder}"], [1], **how)
    assert (len(asked), len(made)) == (3, 1)
    with torch.no_grad():
        for value in method.weight_offsets.parameters():
            value.mul_(0.5)
    assert not torch.equal(one, method.sample([f"a {CAT.placeholder}"], [1], **how)), (
        "weights of an earlier call are kept"
    )


# ---- the tower -------------------------------------------------------------------------------------------------------


def test_tower_reads_a_picture_once(monkeypatch) -> None:
    see = SeenCache(towers.tiny_tower(seed=0))
    asked = []
    see.tower.register_forward_hook(lambda *_: asked.append(1))
    one, two = (picture(CAT, view, 64)[None] for view in (0, 1))
    both = see(torch.cat([one, two]))
    assert torch.equal(see(two).tokens[0], both.tokens[1]) and len(asked) == 2
    monkeypatch.setattr(vision, "CACHE_BYTES", 1)
    see(one + 0.1)
    assert len(see.kept) == 1 and see.bytes == sum(each.nbytes for each in next(iter(see.kept.values())))
    assert isinstance(both, Seen) and not any(each.requires_grad for each in both)


def test_tower_from_a_folder(tmp_path) -> None:
    made = towers.tiny_tower(seed=3)
    made.network.save_pretrained(tmp_path / "image_encoder")
    assert (
        towers.beside(str(tmp_path)) == str(tmp_path / "image_encoder") and towers.beside(str(tmp_path / "no")) is None
    )
    read = towers.load(str(tmp_path / "image_encoder"))
    pixels = picture(CAT, 0, 64)[None]
    assert torch.equal(read(pixels).tokens, made(pixels).tokens)
    mean, std = [0.5] * 3, [0.5] * 3
    prepared = tmp_path / "image_encoder" / "preprocessor_config.json"
    prepared.write_text(json.dumps({"image_mean": mean, "image_std": std}))
    small = torch.nn.functional.interpolate(pixels, (32, 32), mode="bicubic", align_corners=True)
    theirs = made.network(pixel_values=small).last_hidden_state[:, 1:]
    torch.testing.assert_close(towers.load(str(prepared.parent)).forward(pixels).tokens, theirs)
    for wrong in ("{}", '{"image_mean": [1], "image_std": [1]}', "no"):
        prepared.write_text(wrong)
        with pytest.raises(UserError, match="image_mean"):
            towers.load(str(prepared.parent))
    with pytest.raises(UserError, match=r"method\.tower=.*does not exist"):
        towers.load(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot be loaded"):
        towers.load(str(tmp_path / "empty"))


def test_tower_from_its_tensors() -> None:
    """Sizes follow from the tensors; a tower of OpenCLIP's narrow heads is told by its width."""
    state = {
        name.removeprefix("vision_model."): v for name, v in towers.tiny_tower(seed=0).network.state_dict().items()
    }
    made = towers.from_state(state)
    assert (made.size, made.width, made.patches, made.layers) == (32, 16, 16, 4)
    assert all(
        torch.equal(v, state[name.removeprefix("vision_model.")]) for name, v in made.network.state_dict().items()
    )
    with pytest.raises(UserError, match="holds no picture tower"):
        towers.from_state({})
    with pytest.raises(UserError, match="is another than method"):
        towers.fill(made, {**state, "post_layernorm.bias": torch.zeros(3)})


# ---- domains and files -----------------------------------------------------------------------------------------------


def settings(**changes) -> dict:
    return {"_target_": config("e4t").method._target_, "encoder": "patch_tokens", **changes}


def test_domain_is_where_tuning_starts(stack, tmp_path) -> None:
    domain = e4t(stack, phase="pretrain")
    train(domain, 1)
    path = tmp_path / "cats.safetensors"
    artifact.write(path, domain, 0, settings(phase="pretrain"), steps=1)
    tuned = e4t(stack, domain=str(path))
    found = tuned.trainable_state()
    for name, value in domain.trainable_state().items():
        if name != "picture":
            assert torch.equal(found[name], value), name
    artifact.write(path, domain, 0, settings(phase="tune"), steps=1)
    with pytest.raises(UserError, match="is no pre-trained domain"):
        e4t(stack, domain=str(path))
    artifact.write(path, domain, 0, settings(phase="pretrain", embed_scale=0.2), steps=1)
    with pytest.raises(UserError, match=r"trained with embed_scale=0\.2"):
        e4t(stack, domain=str(path))
    towers.tiny_tower(seed=1).network.save_pretrained(tmp_path / "other")
    artifact.write(path, domain, 0, settings(phase="pretrain"), steps=1)
    with pytest.raises(UserError, match="another picture tower"):
        e4t(stack, domain=str(path), tower=str(tmp_path / "other"))
    with pytest.raises(UserError, match="another picture tower"):
        artifact.load_into(e4t(stack, phase="pretrain", tower=str(tmp_path / "other")), 0, path)


def test_domain_in_the_models_own_folder_in_half_precision(stack, tmp_path) -> None:
    domain = e4t(stack, phase="pretrain")
    train(domain, 1)
    artifact.write(tmp_path / "e4t" / "cat.safetensors", domain, 0, settings(phase="pretrain"), steps=1, half=True)
    whole, halved = domain.trainable_state(), e4t(stack, model_folder=str(tmp_path)).trainable_state()
    assert all(value.dtype == whole[name].dtype for name, value in halved.items())
    for name, value in whole.items():
        if name != "picture":
            torch.testing.assert_close(halved[name], value, rtol=1e-3, atol=1e-6)
    fresh, none = e4t(stack).trainable_state(), e4t(stack, model_folder=str(tmp_path), domain="none").trainable_state()
    assert all(torch.equal(none[name], value) for name, value in fresh.items())
    assert not torch.equal(fresh["head.final_linear.weight"], halved["head.final_linear.weight"])
    torch.nn.init.constant_(domain.head.final_linear.bias, 1e6)
    with pytest.raises(UserError, match="does not fit into float16"):
        artifact.write(tmp_path / "big.safetensors", domain, 0, settings(phase="pretrain"), steps=1, half=True)


@pytest.fixture
def eyes(tmp_path) -> Path:
    """The tiny tower as a folder: its two heads are in no tensor."""
    towers.tiny_tower(seed=0).network.save_pretrained(tmp_path / "eyes")
    return tmp_path / "eyes"


@pytest.mark.parametrize("changes", [{"phase": "pretrain"}, {"tune": "all"}])
def test_reimplementations_files(stack, eyes, tmp_path, changes) -> None:
    """Written, then read as an artifact and (pre-trained) as a domain: everything is back, the picture to 8 bits."""
    method = e4t(stack, export_files=True, **changes)
    train(method, 1)
    written = {path.name for path in method.export(0, tmp_path, steps=1)}
    weights = "unet.pt" if "tune" in changes else "weight_offsets.pt"
    assert written == {weights, "encoder.pt", "config.json", "domain.png"}
    fresh = e4t(stack, offsets_init="zero", **changes)
    artifact.load_into(fresh, 0, tmp_path / weights)
    found = fresh.trainable_state()
    for name, value in method.trainable_state().items():
        # A tuned U-Net's difference comes back through two roundings of a weight of about 1.
        limit = 1 / 127 if name == "picture" else 2e-7 if name.startswith("unet_offsets") else 0
        torch.testing.assert_close(found[name], value, atol=limit, rtol=0, msg=name)
    if "tune" not in changes:
        tuned = e4t(stack, domain=str(tmp_path), tower=str(eyes))
        assert torch.equal(tuned.head.first_weight, method.head.first_weight)
    else:
        with pytest.raises(UserError, match=r"set method\.phase=tune method\.tune=all"):
            e4t(stack, domain=str(tmp_path), tower=str(eyes))
    assert e4t(stack).export(0, tmp_path / "none", steps=1) == []


def test_files_that_do_not_fit_are_told(stack, eyes, tmp_path) -> None:
    method = e4t(stack, phase="pretrain", export_files=True)
    method.export(0, tmp_path, steps=1)

    def refuse(what: str, **changes) -> None:
        with pytest.raises(UserError, match=what):
            e4t(stack, domain=str(tmp_path), tower=str(eyes), **changes)

    refuse(r"set method\.encoder=patch_tokens", encoder="cls_layers")
    refuse(r"trained with s=0\.1", embed_scale=0.3)
    (tmp_path / "config.json").write_text("{")
    refuse("is no JSON")
    (tmp_path / "config.json").unlink()
    refuse("does not exist")
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_args": {"domain_class_token": "dog"}}))
    other = e4t(stack, domain=str(tmp_path), tower=str(eyes))
    assert torch.equal(other.class_word, stack.word_embedding("dog")), "the domain's word, not the concept's"
    torch.save({"more": torch.zeros(1)}, tmp_path / "weight_offsets.pt")
    refuse("holds no weight offsets")
    torch.save({"first_linears.1.weight": torch.zeros(1)}, tmp_path / "encoder.pt")
    with pytest.raises(UserError, match=r"first_linears\.0, 1"):
        formats._split(torch.load(tmp_path / "encoder.pt", weights_only=True), tmp_path / "encoder.pt")


def test_choices_are_told(stack) -> None:
    for name in module.CHOICES:
        with pytest.raises(UserError, match=rf"method\.{name}='nonsense' is unknown"):
            e4t(stack, **{name: "nonsense"})
