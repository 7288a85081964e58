"""HiPer's own promises; its numbers are in tests/parity/test_hiper.py."""

from __future__ import annotations

import logging

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from hiperlab import draws
from hiperlab.base.method import Step, Subject
from hiperlab.errors import UserError
from hiperlab.formats import hiper as files
from hiperlab.method.hiper import replace_tail
from hiperlab.model.load import pretrained
from tests.composed import ROOT, SUBJECTS, batch, build, train

DOG = Subject("dog", "<dog>", "dog", "a standing dog", ("a sitting dog",))
CATS = SUBJECTS[:1]


def condition(method, text, variant="", samples=None):
    with torch.no_grad():
        step = Step([text], torch.tensor([0]), torch.tensor([0]), samples=samples, variant=variant)
        return method.condition(step).keys[0, 0]


def test_replace_tail_by_hand() -> None:
    text = torch.arange(8.0).view(1, 4, 2)
    tail = torch.full((1, 1, 2), -1.0)
    assert replace_tail(text, tail).tolist() == [[[0, 1], [2, 3], [4, 5], [-1, -1]]]


def test_factors(stack) -> None:
    """1 behind the source text, else the edit's factor; the rows of the text are never scaled."""
    method = build("hiper", stack, [DOG], scale_edit=[0.8, 0.5])
    assert method.variants == ("scale=0.8", "scale=0.5")
    h = method.hiper.detach()[0]
    target = stack.encode_text(["a sitting dog"])[0]
    for variant, factor in (("", 0.8), ("scale=0.8", 0.8), ("scale=0.5", 0.5)):
        states = condition(method, "a sitting <dog>", variant)
        torch.testing.assert_close(states[:72], target[:72], atol=1e-6, rtol=0)
        assert torch.equal(states[72:], factor * h)
        assert torch.equal(condition(method, "a standing <dog>", variant)[72:], h), "the source is never scaled"
    trained = condition(method, "a sitting <dog>", samples=torch.tensor([0]))
    assert torch.equal(trained[72:], h), "what is trained on is the source by definition"


def test_start(stack, tmp_path) -> None:
    standing, sitting = stack.encode_text(["a standing dog", "a sitting dog"])
    source = build("hiper", stack, [DOG])
    torch.testing.assert_close(source.hiper[0].detach(), standing[-5:], atol=1e-6, rtol=0)
    target = build("hiper", stack, [DOG], init="target_tail", n_hiper=30)
    torch.testing.assert_close(target.hiper[0].detach(), sitting[-30:], atol=1e-6, rtol=0)
    saved = files.write(tmp_path / "hiper_embeddings_step7.pt", torch.randn(5, 32))
    assert torch.equal(build("hiper", stack, [DOG], init=str(saved)).hiper[0].detach(), files.read(saved))
    with pytest.raises(UserError, match="needs a target text"):
        build("hiper", stack, CATS, init="target_tail")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_hiper": 0}, "Choose 1 to 76"),
        ({"n_hiper": 77}, "Choose 1 to 76"),
        ({"scale_edit": []}, "draws nothing"),
        ({"latent": "once"}, "Choose sample_once, mean, resample"),
        ({"init": "source_tial"}, "source_tial is not a file"),
    ],
)
def test_mistakes_are_named(stack, changes, message) -> None:
    with pytest.raises(UserError, match=message):
        build("hiper", stack, [DOG], **changes)


def test_long_text_is_warned_about_once(stack, caplog) -> None:
    method = build("hiper", stack, [DOG], n_hiper=70)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            condition(method, "a sitting <dog> in a green garden")  # 7 words, begin and end: 9 of 7 rows
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "'a sitting dog in a green garden' is 9 tokens long"
    ]


def test_a_picture_is_drawn_from_the_posterior_once(stack) -> None:
    first, later = batch(CATS, [0]), batch(CATS, [3])  # the same view, other samples
    assert torch.equal(first.view, later.view)

    def latents(latent, item):
        return build("hiper", stack, CATS, latent=latent).clean_latents(item)

    assert torch.equal(latents("sample_once", first), latents("sample_once", later))
    assert not torch.equal(latents("resample", first), latents("resample", later))
    mean = stack.scale(stack.encode_moments(first.pixels).chunk(2, dim=1)[0])
    assert torch.equal(latents("mean", first), mean) and not torch.equal(latents("sample_once", first), mean)


def test_text_and_picture_are_encoded_once(stack, monkeypatch) -> None:
    """Everything that a step repeats is the U-Net, and one pass of it serves all pictures."""
    method = build("hiper", stack, SUBJECTS)
    calls = {"encode_text": 0, "encode_moments": 0, "predict": 0}
    for name in calls:
        original = getattr(type(stack), name)

        def counted(self, *args, name=name, original=original):
            calls[name] += 1
            return original(self, *args)

        monkeypatch.setattr(type(stack), name, counted)
    one = [batch(SUBJECTS, [3 * k]) for k in range(3)]  # always view 0
    for step, item in enumerate(one):
        method.training_step(item, step).backward()
    assert calls == {"encode_text": 0, "encode_moments": 4, "predict": 3}


def test_the_authors_cadence(stack) -> None:
    method = build("hiper", stack, [DOG])
    due = [steps for steps in range(1, 1002) if method.exports_at(steps)]
    assert [files.name(steps) for steps in due] == [f"hiper_embeddings_step{k}.pt" for k in range(0, 1001, 100)]
    never = build("hiper", stack, [DOG], export_every=0)
    assert not any(never.exports_at(steps) for steps in range(1, 1002))


def test_files_of_another_size_or_kind_are_refused(stack, tmp_path) -> None:
    method = build("hiper", stack, [DOG])
    with pytest.raises(UserError, match=r"Set method.n_hiper=30 and a base model of text width 768"):
        method.load_foreign(0, files.write(tmp_path / "wide.pt", torch.zeros(30, 768)))
    torch.save({"a": torch.zeros(5, 32)}, tmp_path / "dict.pt")
    with pytest.raises(UserError, match="expected one tensor"):
        method.load_foreign(0, tmp_path / "dict.pt")
    torch.save(torch.full((1, 5, 32), float("inf")), tmp_path / "inf.pt")
    with pytest.raises(UserError, match="NaN or infinite"):
        method.load_foreign(0, tmp_path / "inf.pt")


def test_plain_pipeline_draws_the_same_picture(stack, tmp_path) -> None:
    """The exported tensor and diffusers' `prompt_embeds` are enough to draw what the authors' inference.py draws."""
    pipe = StableDiffusionPipeline(
        vae=stack.vae, text_encoder=stack.text, tokenizer=stack.tokenizer, unet=stack.unet,
        scheduler=DDIMScheduler.from_config(stack.scheduler_config), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(tmp_path / "twin")
    method = build("hiper", pretrained("twin", str(tmp_path / "twin"), size=64), [DOG])
    train(method, 2)
    ours = method.sample(["a sitting <dog>"], [7], steps=3, guidance=7.5)
    (path,) = method.export(0, tmp_path, steps=2)

    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "twin", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    h = torch.load(path, weights_only=True).detach()
    ids = pipe.tokenizer("a sitting dog", padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        text = pipe.text_encoder(ids).last_hidden_state
    theirs = pipe(
        prompt_embeds=torch.cat([text[:, :-5], 0.8 * h], dim=1), num_inference_steps=3, guidance_scale=7.5,
        height=64, width=64, output_type="pt", generator=torch.Generator().manual_seed(7),
    ).images  # fmt: skip
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_published_settings() -> None:
    """SD 1.4, the authors' step1000, their rate (not argparse's), 50 DDIM steps at 7.5."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        cfg = compose("config", overrides=["experiment=hiper_published", "hydra/launcher=basic"])
    assert cfg.model.path == "CompVis/stable-diffusion-v1-4" and cfg.model.size == 512
    assert cfg.fit.steps == 1001 and cfg.fit.batch_size == 1 and cfg.fit.gradient_clip is None
    assert cfg.method.n_hiper == 5 and cfg.method.optimizer.lr == 5e-3 and cfg.method.latent == "sample_once"
    assert (cfg.sampler.scheduler, cfg.sampler.steps, cfg.sampler.guidance) == ("DDIMScheduler", 50, 7.5)


def test_draws_are_those_of_other_methods(stack, monkeypatch) -> None:
    """Noise and timesteps of a sample do not depend on the method: methods are compared on common random numbers."""
    asked: list[tuple] = []
    original = draws.normal
    monkeypatch.setattr(draws, "normal", lambda *args: asked.append(args[1:3]) or original(*args))
    for name in ("hiper", "ti"):
        build(name, stack, CATS).training_step(batch(CATS, [4]), 0)
    noise = [samples.tolist() for purpose, samples in asked if purpose == "noise"]
    assert noise == [[4], [4]]
