"""Methods on SDXL's twin: each runs there or says why not; files load in diffusers' own pipeline."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from hydra.utils import get_class
from safetensors.torch import load_file

from hiperlab.base import artifact
from hiperlab.base.composition import Composition
from hiperlab.errors import UserError
from hiperlab.model.kind import config_is_sdxl
from hiperlab.model.shared_calls import alone as answered_alone
from hiperlab.model.shared_calls import together
from hiperlab.model.tiny import tiny, tiny_sdxl
from tests.composed import METHODS, SUBJECTS, batch, build, config, kept, trains

CATS = SUBJECTS[:1]
WORD = CATS[0].placeholder
REFUSE = [name for name in METHODS if get_class(config(name).method._target_).why_not_sdxl]


@pytest.fixture(scope="module")
def xl():
    """The twin at 64 px."""
    return tiny_sdxl(seed=0, size=64)


def train_small(method, steps: int) -> None:
    optimizer = method.configure_optimizers()
    method.train()
    for step in range(steps):
        rows = batch(list(method.concepts), [2 * step, 2 * step + 1], method.model.size)
        sizes = torch.tensor([[100.0, 200.0, 0.0, 30.0, 64.0, 64.0]]).expand(len(rows.prompts), -1)
        method.training_step(rows._replace(sizes=sizes), step).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", [name for name in METHODS if name not in REFUSE])
def test_trains_keeps_and_draws(name, xl, tmp_path) -> None:
    """Every trained tensor moves, the stack does not; a kept concept draws the same picture."""
    before = {key: value.clone() for key, value in xl.state_dict().items()}
    method = build(name, xl, CATS)
    start = {key: p.detach().clone() for key, p in method.named_parameters() if p.requires_grad}
    if trains(name):
        train_small(method, 2)
        now = dict(method.named_parameters())
        assert start and all(not torch.equal(now[key], value) for key, value in start.items())
    path = tmp_path / "concept.safetensors"
    artifact.write(path, method, 0, {}, steps=2)
    again = build(name, xl, CATS)
    artifact.load_into(again, 0, path)
    ours, theirs = (
        each.sample([f"a photo of a {WORD}"], [3], steps=2, guidance=3.0, variant=each.variants[0])
        for each in (method, again)
    )
    assert torch.isfinite(ours).all() and ours.shape == (1, 3, 64, 64)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    after = xl.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", REFUSE)
def test_says_why_it_does_not_run(name, xl) -> None:
    reason = get_class(config(name).method._target_).why_not_sdxl
    with pytest.raises(UserError, match=r"does not run on SDXL \(model=tiny_sdxl\): ") as refused:
        build(name, xl, CATS)
    assert reason in str(refused.value) and "\n" not in str(refused.value)


def test_artifacts_of_sd1_are_refused_by_width(stack, xl, tmp_path) -> None:
    """Both ways, with both widths; and one that was learnt with another pooled row."""
    path = tmp_path / "concept.safetensors"
    artifact.write(path, build("ti", stack, CATS), 0, {}, steps=0)
    with pytest.raises(UserError, match=r"made for base 'tiny' \(width 32, here 72 \(32\+40\)"):
        artifact.load_into(build("ti", xl, CATS), 0, path)
    artifact.write(path, build("ti", xl, CATS), 0, {}, steps=0)
    kept_base = artifact.read(path).base
    assert (kept_base.name, kept_base.widths, kept_base.pooled_at) == ("tiny_sdxl", (32, 40), "end")
    with pytest.raises(UserError, match=r"made for base 'tiny_sdxl' \(width 72 \(32\+40\), here 32"):
        artifact.load_into(build("ti", stack, CATS), 0, path)
    other = tiny_sdxl(seed=0, size=64, pooled_at="argmax")
    with pytest.raises(UserError, match=r"set model\.pooled_at=end\.$"):
        artifact.load_into(build("ti", other, CATS), 0, path)


def test_absent_and_empty_negatives_differ(xl) -> None:
    method = build("ti", xl, CATS)
    absent, empty, default = (
        method.sample([f"a {WORD}"], [1], steps=2, guidance=5.0, **how)
        for how in ({"negative": None}, {"negative": ""}, {})
    )
    assert torch.equal(absent, default) and not torch.allclose(absent, empty, atol=1e-3)


def test_sizes_of_the_pictures_reach_the_unet(xl) -> None:
    method, rows = build("ti", xl, CATS), batch(CATS, [0, 1], 64)
    own = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]).expand(2, -1)
    with torch.no_grad():
        plain, same, other = (
            float(method.training_step(rows._replace(sizes=sizes), 0)) for sizes in (None, own, 3 * own)
        )
    assert plain == same and abs(plain - other) > 1e-4


def test_pooled_row_of_a_learnt_word(xl) -> None:
    """The gradient comes through the pooled row, too; at argmax it is the placeholder's own row."""
    for at in ("end", "argmax"):
        stack = tiny_sdxl(seed=0, size=64, pooled_at=at)
        vectors = stack.word_embedding("cat")[None, None].requires_grad_()
        states = stack.condition_tokens(stack.tokenize(["a photo of <x> on a mat"], {"<x>": [0]}), vectors)
        assert states.pooled is not None
        first, second = torch.autograd.grad(states.pooled.sum(), vectors)[0].split(stack.widths, dim=-1)
        assert not first.any() and second.abs().max() > 1e-3, "only the second encoder's part reaches it"
        plain = stack.condition_text(["a photo of cat on a mat"]).pooled
        assert torch.allclose(states.pooled, plain, atol=1e-5) == (at == "end")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(dtype, xl) -> None:
    """The U-Net in half, text encoders and autoencoder in float32, as the precision groups have them."""
    states, latents = xl.condition_text(["a cat", "a dog"]), torch.ones(2, *xl.latent_shape)
    expected = xl.predict(latents, torch.tensor([10, 900]), states)
    half = copy.deepcopy(xl)
    half.unet.to(dtype)
    found = half.predict(latents, torch.tensor([10, 900]), states)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)


def test_latents_with_means_of_their_own(xl) -> None:
    """As some fine-tunes' autoencoders say, by channel."""
    other, latents = copy.deepcopy(xl), torch.randn(2, *xl.latent_shape)
    other.vae.register_to_config(latents_mean=[1.0, 0.0, -1.0, 2.0], latents_std=[2.0, 1.0, 0.5, 4.0])
    scaled = other.scale(latents)
    torch.testing.assert_close(scaled[:, 3], (latents[:, 3] - 2.0) / 4.0 * 0.13025)
    torch.testing.assert_close(other.unscale(scaled), latents, atol=1e-5, rtol=0)
    assert torch.equal(xl.scale(latents), 0.13025 * latents)


def test_text_encoders_have_a_rate_of_their_own(xl) -> None:
    method = build("lora", xl, CATS, text_encoder=True, text_lr=1e-3, text_decay=0.0)
    rest, text = method.configure_optimizers().param_groups
    assert (text["lr"], text["weight_decay"]) == (1e-3, 0.0) and rest["lr"] == 1e-4
    own = {id(value) for each in (method.down, method.up) for key, value in each.items() if key.startswith("text/")}
    assert {id(value) for value in text["params"]} == own and not own & {id(value) for value in rest["params"]}
    (only,) = build("lora", xl, CATS, text_encoder=True).configure_optimizers().param_groups
    assert len(only["params"]) == len(rest["params"]) + len(own)
    for changes, message in (
        ({"text_encoder": True, "text_lr": 0.0}, "method.text_lr=0.0 is out of range"),
        ({"text_lr": 1e-3}, "add method.text_encoder=true"),
    ):
        with pytest.raises(UserError, match=message):
            build("lora", xl, CATS, **changes)


def test_side_by_side_each_has_its_own_sizes_and_pooled_row() -> None:
    """Two trainings in shared calls are what each is alone; so they are when their passes are replayed in blocks."""
    stack = tiny_sdxl(seed=0, size=64).double()
    rows = batch(CATS, [0, 1], 64)
    told = [rows._replace(sizes=torch.full((2, 6), 64.0) * factor) for factor in (1, 3)]

    def gradients(shared: bool) -> list[torch.Tensor]:
        methods = [build(name, stack, CATS).double() for name in ("ti", "xti")]
        works = [method.training_calls(each) for method, each in zip(methods, told, strict=True)]
        losses = together(stack, works) if shared else [answered_alone(stack, work) for work in works]
        torch.stack(losses).sum().backward()
        return [p.grad for method in methods for p in method.parameters() if p.grad is not None]

    alone = gradients(shared=False)
    for ours, theirs in zip(gradients(shared=True), alone, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-6)
    stack.optimise(channels_last=False, compile=False, gradient_checkpointing=True)
    for ours, theirs in zip(gradients(shared=True), alone, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-6)


def test_drawn_together(xl) -> None:
    """One concept composed alone is the method's own picture; two of different methods make one."""
    first, second = kept("xti", xl, SUBJECTS[0]), kept("lora", xl, SUBJECTS[1], text_encoder=True)
    texts = [f"a {WORD} on a beach"]
    alone = Composition([first]).sample(texts, [1], steps=2, guidance=3.0)
    torch.testing.assert_close(alone, first.sample(texts, [1], steps=2, guidance=3.0), atol=1e-5, rtol=0)
    both = Composition([first, second]).sample(
        [f"a {WORD} and a {SUBJECTS[1].placeholder}"], [1], steps=2, guidance=3.0
    )
    assert torch.isfinite(both).all()


# ---- files in diffusers' own pipeline --------------------------------------------------------------------------------


def pipeline(stack) -> StableDiffusionXLPipeline:
    """Around copies: its adapters change modules in place."""
    parts = copy.deepcopy(stack)
    (first, one), (second, two) = [(tower.text, tower.tokenizer) for tower in parts.towers]
    pipe = StableDiffusionXLPipeline(
        parts.vae, first, second, one, two, parts.unet, DDIMScheduler.from_config(parts.scheduler_config),
        add_watermarker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: StableDiffusionXLPipeline, prompt: str, size: int) -> torch.Tensor:
    return pipe(
        prompt, num_inference_steps=3, guidance_scale=5.0, height=size, width=size, output_type="pt",
        generator=torch.Generator().manual_seed(7),
    ).images  # fmt: skip


def ours(method, prompt: str) -> torch.Tensor:
    return method.eval().sample([prompt], [7], steps=3, guidance=5.0, variant=method.variants[0])


def test_plain_pictures_are_the_pipelines(xl) -> None:
    text = "a photo of a dog on a beach"
    method = build("lora", xl, CATS)  # not trained: its second factor is zero
    torch.testing.assert_close(ours(method, text), drawn(pipeline(xl), text, 64), atol=2e-5, rtol=0)


def test_the_pair_in_the_pipeline(xl, tmp_path) -> None:
    """Its pooled row is transformers', as the pipeline's configuration says here: the end token's."""
    method = kept("ti", xl, CATS[0], num_vectors=2)
    written = {path.name: path for path in method.export(0, tmp_path, steps=1)}
    pair = load_file(written["my-cat.safetensors"])
    pipe = pipeline(xl)
    for key, encoder, tokenizer in (
        ("clip_l", pipe.text_encoder, pipe.tokenizer), ("clip_g", pipe.text_encoder_2, pipe.tokenizer_2),
    ):  # fmt: skip
        pipe.load_textual_inversion(pair[key], token=WORD, text_encoder=encoder, tokenizer=tokenizer)
    text = f"a photo of {WORD} on a beach"
    torch.testing.assert_close(ours(method, text), drawn(pipe, text, 64), atol=2e-5, rtol=0)
    for name in ("my-cat.safetensors", "learned_embeds.safetensors"):
        again = build("ti", xl, CATS, num_vectors=2)
        again.load_foreign(0, written[name])
        assert torch.equal(again.vectors, method.vectors)


def test_lora_files_in_the_pipeline(xl, tmp_path) -> None:
    """Diffusers' and kohya's forms draw our picture there; all three load again."""
    method = kept("lora", xl, CATS[0], text_encoder=True, alpha=2.0)
    text = f"a photo of {WORD}"
    picture = ours(method, text)
    assert not torch.allclose(picture, ours(build("lora", xl, CATS), text), atol=1e-2)
    written = {path.relative_to(tmp_path).as_posix(): path for path in method.export(0, tmp_path, steps=1)}
    assert {"peft/adapter_model.safetensors", "peft_text_encoder/adapter_model.safetensors"} <= written.keys()
    assert "peft_text_encoder_2/adapter_model.safetensors" in written
    kohya = load_file(written["my-cat.safetensors"])
    wanted = ("lora_unet_input_blocks_4_1_", "lora_unet_middle_block_1_", "lora_unet_output_blocks_0_1_", "lora_te1_")
    for beginning in (*wanted, "lora_te2_text_model_"):
        assert any(key.startswith(beginning) for key in kohya), beginning
    for name in ("pytorch_lora_weights.safetensors", "my-cat.safetensors"):
        pipe = pipeline(xl)
        pipe.load_lora_weights(tmp_path, weight_name=name)
        torch.testing.assert_close(drawn(pipe, "a photo of sks cat", 64), picture, atol=1e-4, rtol=0)
        again = build("lora", xl, CATS, text_encoder=True)
        again.load_foreign(0, written[name])
        torch.testing.assert_close(ours(again, text), picture, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["peft", "dreambooth"])
def test_files_of_both_text_encoders(name, xl, tmp_path) -> None:
    changes = {"export_weights": True} if name == "dreambooth" else {}
    method = kept(name, xl, CATS[0], text_encoder=True, size=0.01, **changes)
    path, *others = method.export(0, tmp_path, steps=1)
    assert {each.parent.name.removeprefix("peft_") for each in others} == {"text_encoder", "text_encoder_2"}
    again = build(name, xl, CATS, text_encoder=True, **changes)
    again.load_foreign(0, path)
    text = f"a photo of {WORD}"
    torch.testing.assert_close(ours(again, text), ours(method, text), atol=1e-4, rtol=0)


def test_half_of_a_pair_is_refused(xl, tmp_path) -> None:
    """Neither model takes one encoder's rows for the whole: not SD 1.x of an SDXL file, not SDXL of a half."""
    method = kept("ti", xl, CATS[0])
    written = {path.name: path for path in method.export(0, tmp_path, steps=1)}
    small = build("ti", tiny(seed=0, size=64), CATS)
    for name in ("my-cat.safetensors", "learned_embeds.safetensors"):
        with pytest.raises(UserError, match="is an embedding for SDXL"):
            small.load_foreign(0, written[name])
    (tmp_path / "learned_embeds_2.safetensors").unlink()
    with pytest.raises(UserError, match="put diffusers' other file beside it"):
        build("ti", xl, CATS).load_foreign(0, written["learned_embeds.safetensors"])
    more = build("ti", xl, CATS, num_vectors=2)
    with pytest.raises(UserError, match=r"this run 2 of 32\+40: Set method\.num_vectors=1\.$"):
        more.load_foreign(0, written["my-cat.safetensors"])


def test_a_config_built_in_code_is_told_too() -> None:
    assert config_is_sdxl({"_target_": "hiperlab.model.tiny.tiny_sdxl"})
    assert not config_is_sdxl({"_target_": "hiperlab.model.tiny.tiny"})
