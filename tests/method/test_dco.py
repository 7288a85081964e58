"""`loss=dco`, `consistency` and a learnt word: what they promise for every method with a rare token."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from diffusers import StableDiffusionPipeline

from hiperlab.base.method import Step
from hiperlab.base.rare_token_method import RareTokenMethod
from hiperlab.errors import UserError
from hiperlab.loss.dco import DCO
from hiperlab.method.lora import LoRA
from hiperlab.model.tiny import tiny
from tests.composed import METHODS, SUBJECTS, batch, build, kept, train, train_together
from tests.method.test_conformance import gradients, method_class

NAMES = [name for name in METHODS if issubclass(method_class(name), RareTokenMethod)]
CATS = SUBJECTS[:1]
SETTINGS = {"loss": "dco", "prior": {"weight": 0}}


def extra(name: str) -> dict:
    return {"augment": False} if name == "custom_diffusion" else {}


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


def test_it_starts_at_ln_2_and_falls(name, stack) -> None:
    """The tuned model is the frozen one at first; what it then gains over it lowers the loss."""
    method = build(name, stack, CATS, **SETTINGS, **extra(name))
    rows = batch(list(CATS), [0, 1])
    method.train()
    optimizer = method.configure_optimizers()
    losses = []
    for _ in range(3):
        loss = method.training_step(rows, 0)
        loss.backward()
        assert any(bool(grad.any()) for grad in gradients(method).values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[0]
    step = Step(["a <my-cat>"], torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    if method.frozen_texts(step) == method.texts(step):  # else the prompts hold a new word, the frozen model's do not
        assert losses[0] == pytest.approx(math.log(2), abs=2e-3)


def test_beside_another_it_is_itself(name, stack) -> None:
    if method_class(name).why_alone:
        pytest.skip(method_class(name).why_alone)
    double = copy.deepcopy(stack).double()

    def make(seed: int):
        return build(name, double, CATS, seed=seed, **SETTINGS, **extra(name)).double()

    alone = [train_together([make(seed)], [3])[0] for seed in (0, 1)]
    beside = train_together([make(0), make(1)], [3, 3])
    for mine, one in zip(beside, alone, strict=True):
        assert mine == pytest.approx(one, rel=0, abs=1e-9)


def test_concepts_in_one_pass_have_a_loss_each(name, stack) -> None:
    if not method_class(name).stacks_concepts:
        pytest.skip("takes one concept")
    double = copy.deepcopy(stack).double()
    pair = list(SUBJECTS[:2])
    together = build(name, double, pair, **SETTINGS, **extra(name)).double()
    single = [build(name, double, [subject], **SETTINGS, **extra(name)).double() for subject in pair]
    for step in range(2):
        samples = [2 * step, 2 * step + 1]
        whole = together.training_step(batch(pair, samples), step)
        parts = [one.training_step(batch([one.concepts[0]], samples), step) for one in single]
        assert float(whole) == pytest.approx(sum(float(part) for part in parts), abs=1e-9)
        for method, loss in ((together, whole), *zip(single, parts, strict=True)):
            loss.backward()
            with torch.no_grad():
                for parameter in method.parameters():
                    if parameter.grad is not None:
                        parameter -= 1e-3 * parameter.grad
                        parameter.grad = None


def test_offset_noise_moves_whole_channels(name, stack) -> None:
    plain, offset = (build(name, stack, CATS, loss="dco", prior={"weight": 0}, dco={"offset_noise": o}, **extra(name))
                     for o in (0.0, 0.5))  # fmt: skip
    rows = batch(list(CATS), [0, 1])
    apart = offset.training_noise(rows, stack.latent_shape) - plain.training_noise(rows, stack.latent_shape)
    assert apart.flatten(2).std(-1).max() < 1e-6 and apart[:, :, 0, 0].std() > 0.1


def test_consistency_is_the_way_from_the_frozen_model_to_the_tuned_one(name) -> None:
    """Without other guidance 1 is the tuned model itself and 0 the frozen one; 0.5 is between."""
    stack = tiny(seed=0, size=64)
    word = SUBJECTS[0].placeholder
    how = {"steps": 3, "guidance": 1.0}

    def draw(**changes):
        method = kept(name, stack, SUBJECTS[0], **extra(name), **changes).double()
        return method.sample([f"a {word}"], [1], **how)

    stack.double()
    plain, whole, none, half = draw(), draw(consistency=1.0), draw(consistency=0.0), draw(consistency=0.5)
    torch.testing.assert_close(whole, plain, atol=1e-6, rtol=0)
    frozen = build(name, stack, CATS, **extra(name), consistency=0.0).double().sample([f"a {word}"], [1], **how)
    torch.testing.assert_close(none, frozen, atol=0, rtol=0)
    assert not torch.equal(half, plain) and not torch.equal(half, none)


def test_what_does_not_go_together_is_refused(name, stack) -> None:
    with pytest.raises(UserError, match=r"prior\.weight=0"):
        build(name, stack, CATS, loss="dco", prior={"weight": 1.0}, **extra(name))
    with pytest.raises(UserError, match=r"unknown\. Did you mean dco"):
        build(name, stack, CATS, loss="dcoo", prior={"weight": 0.0})
    with pytest.raises(UserError, match="beta"):
        DCO(beta=0.0, snr_gamma=None, offset_noise=0.0)


def test_custom_diffusion_says_that_it_moves_pictures(stack) -> None:
    with pytest.raises(UserError, match="augment=false"):
        build("custom_diffusion", stack, CATS, **SETTINGS, augment=True)


# ---- LoRA's learnt word --------------------------------------------------------------------------------------------


def test_a_learnt_word_keeps_its_norm_and_is_the_words_own(stack) -> None:
    method = build("lora", stack, CATS, learn_word=True, word_lr=0.1)
    assert isinstance(method, LoRA)
    before = method.word.detach().clone()
    assert torch.equal(before[0], stack.word_embedding(CATS[0].word).to(before))
    train(method, 2)
    assert not torch.equal(method.word, before)
    torch.testing.assert_close(method.word.norm(dim=-1), before.norm(dim=-1), rtol=1e-6, atol=0)


def test_a_learnt_word_goes_through_files(stack, tmp_path) -> None:
    """Ours and diffusers' own loaders draw the same."""
    method = kept("lora", stack, SUBJECTS[0], learn_word=True)
    assert isinstance(method, LoRA)
    method.export(0, tmp_path, 0)
    again = build("lora", stack, CATS, learn_word=True)
    again.load_foreign(0, tmp_path / "pytorch_lora_weights.safetensors")
    word = SUBJECTS[0].placeholder
    how = {"steps": 2, "guidance": 4.0}
    mine, theirs = (each.sample([f"a {word}"], [1], **how) for each in (method, again))
    torch.testing.assert_close(theirs, mine, atol=1e-5, rtol=0)
    pipeline = StableDiffusionPipeline(
        vae=stack.vae, text_encoder=copy.deepcopy(stack.text), tokenizer=copy.deepcopy(stack.tokenizer),
        unet=copy.deepcopy(stack.unet), scheduler=None, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.load_textual_inversion(str(tmp_path / "learned_embeds.safetensors"))
    row = pipeline.text_encoder.get_input_embeddings().weight[-1]
    torch.testing.assert_close(row, method.word[0].to(row), atol=1e-7, rtol=0)


def test_a_word_beside_the_file_is_named_where_none_is_learnt(stack, tmp_path, caplog) -> None:
    kept("lora", stack, SUBJECTS[0], learn_word=True).export(0, tmp_path, 0)
    build("lora", stack, CATS).load_foreign(0, tmp_path / "pytorch_lora_weights.safetensors")
    assert "method.learn_word=true" in caplog.text
