"""The training recipe: every stage starts, learns, is checked and not done twice; others can load what comes out."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hiperlab.errors import UserError
from hiperlab.world.train import bars, record
from hiperlab.world.train.door import MODULES, main
from hiperlab.world.train.plan import ORDER, Workshop

STAGES = [stage for stage in ORDER if stage != "report"]
TRAINED = ("vae", "decoder", "clip", "critic", "unet", "identity", "reader", "scorer")


def call(*words: str) -> int:
    return main(["preset=smoke", "say_every=0", *words])


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "smoke"
    assert call(f"out={folder}", f"stages=[{','.join(STAGES)}]") == 0
    return folder


@pytest.fixture(scope="module")
def export(out) -> Path:
    return out / "export" / "weights"


def test_every_stage_has_a_module_and_a_place_in_the_order():
    assert set(MODULES) == set(ORDER)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_ends_with_a_record_and_a_check(out, stage):
    found = record.read(out / stage)
    assert found["status"] == "finished" and found["check"] and found["seed"] == 2026


@pytest.mark.parametrize("stage", TRAINED)
def test_the_loss_falls(out, stage):
    curve = [loss for _, loss in record.read(out / stage)["curve"]]
    third = len(curve) // 3
    assert len(curve) >= 12 and np.mean(curve[-third:]) < np.mean(curve[:third])


def test_drawn_again_the_pictures_are_the_same(out, tmp_path):
    assert call(f"out={tmp_path}", "stages=[data]", "data.sets.main.pictures=64") == 0
    for file in ("00000.npy", "00000.json"):
        assert (tmp_path / "data" / "main" / file).read_bytes() == (out / "data" / "main" / file).read_bytes()


def test_no_subject_is_in_two_sets_and_held_out_ones_are_held_out(out):
    from hiperlab.world.subjects import HELD_OUT, TRAINED

    seen = {
        name: {who for path in (out / "data" / name).glob("*.json") if path.stem.isdigit()
               for who in json.loads(path.read_text())["identity"]}
        for name in ("main", "calm", "judge", "held", "pairs")
    }  # fmt: skip
    assert not seen["main"] & seen["judge"] and len(seen["main"]) == 64 and len(seen["judge"]) == 32
    assert not seen["calm"] & seen["judge"]
    assert all(who in TRAINED for who in seen["main"] | seen["calm"] | seen["judge"])
    assert all(who in HELD_OUT for who in seen["held"] | seen["pairs"])


def test_calm_pictures_differ_in_what_words_say_and_in_colours_only():
    from collections import Counter

    from hiperlab.world.caption import parse
    from hiperlab.world.train.draw_shard import CALM, Source, wording

    calm, main_set = Source("calm", 2026), Source("main", 2026)
    pictures = [calm.picture(number) for number in range(800)]
    scenes = [now for _, now in pictures]
    assert {(who.head, who.ear, who.tail, who.leg, who.body) for who, _ in pictures} == {(1.0,) * 5}
    assert {now.seed for now in scenes} == {2026} and len({who.coat for who, _ in pictures}) > 790
    for number, (who, now) in enumerate(pictures[:100]):
        said = parse(wording(calm, number, 0, who, now))
        assert said.get("pattern", "plain") == who.pattern and said.get("accessory", "none") == now.accessory
    assert all(getattr(now, name) == value for now in scenes for name, value in CALM.items())
    assert {now.pose for now in scenes} == {main_set.picture(number)[1].pose for number in range(100)}
    counts = Counter(now.style for now in scenes)
    assert len(counts) == 8 and max(counts.values()) < 130  # 100 expected, standard deviation 9.4
    assert len({main_set.picture(number)[1].zoom for number in range(100)}) == 100


def test_a_batch_takes_its_share_of_calm_pictures():
    from hiperlab.world.train.module import Fit
    from hiperlab.world.train.unet import UnetModule

    fit = Fit(steps=1, minutes=None, batch=10, lr=1e-3, warmup=1, weight_decay=0, clip=1, checkpoint_every=1, muon=None)

    def rows_of(calm: int, share: float) -> torch.Tensor:
        module = UnetModule(
            fit, 1, unet=torch.nn.Linear(1, 1), text=torch.nn.Identity(), moments=torch.zeros(100, 8, 8, 8),
            ids=torch.zeros(100, 2, 77), calm=calm, calm_share=share, empty=torch.zeros(77), dropout=0, gamma=None,
            power=0, decay=0.9, centred=False,
        )  # fmt: skip
        return torch.stack([module.choose(step) for step in range(50)])

    mixed, usual = rows_of(30, 0.6), rows_of(0, 0.0)
    assert bool((mixed[:, :6] >= 70).all()) and bool((mixed[:, 6:] < 70).all())
    assert len(mixed[:, :6].unique()) == 30 and len(mixed[:, 6:].unique()) > 50
    assert usual.shape == (50, 10) and usual.max() > 90


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("unet.calm=1.0", "unet.calm=1.0: expected a share"),
        ("unet.contrast=-1", "unet.contrast=-1, contrast_gain=1: expected at least 0"),
        ("unet.contrast_gain=0", "unet.contrast=3, contrast_gain=0: expected at least 0"),
        ("unet.whiten=0.5", "unet.whiten=0.5: expected at least 1"),
        ("unet.contrast=1", "unet.contrast needs stage critic"),
        ("unet.calm=0.01", "unet.calm=0.01: no picture of a batch of 8 is calm"),
    ],
)
def test_shares_and_weights_have_ranges(words, said, out, tmp_path, capsys):
    folder = linked(out, tmp_path / "again", ("tokenizer", "data", "vae", "latents", "clip"))
    assert call(f"out={folder}", "stages=[unet]", words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("reader.recoded=1.5", "reader.recoded=1.5: expected a share"),
        ("reader.recoded=0.5", "reader.recoded needs an autoencoder"),
        ("reader.start=nowhere", "nowhere holds no judge"),
    ],
)
def test_a_reader_says_what_it_lacks(words, said, out, tmp_path, capsys):
    folder = linked(out, tmp_path / "again", ("data",))
    assert call(f"out={folder}", "stages=[reader]", "reader.recoded=0", words) == 2
    assert said in capsys.readouterr().err


def test_a_reader_learns_from_recoded_pictures_and_goes_on_from_another(out, tmp_path: Path) -> None:
    from hiperlab.metric.truth_judge import load
    from hiperlab.world.train.module import Fit
    from hiperlab.world.train.reader import ReaderModule

    class Coder:
        def encode(self, pixels: torch.Tensor) -> Any:
            mode = SimpleNamespace(mode=lambda: 3 * pixels)
            return SimpleNamespace(latent_dist=mode)

        def decode(self, latent: torch.Tensor) -> Any:
            return SimpleNamespace(sample=latent)

    first = out / "reader" / "weights"
    judge: Any = load(first)
    fit = Fit(steps=1, minutes=None, batch=8, lr=1e-3, warmup=1, weight_decay=0, clip=1, checkpoint_every=1, muon=None)
    pixels = torch.linspace(-0.5, 0.5, 8)[:, None, None, None].expand(8, 3, 64, 64)
    nothing: Any = None
    back = ReaderModule(fit, 1, judge, nothing, Coder(), 0.25)._recode(pixels)
    torch.testing.assert_close(back[:2], (3 * pixels[:2]).clamp(-1, 1))
    assert torch.equal(back[2:], pixels[2:])
    folder = linked(out, tmp_path / "again", ("data", "vae", "decoder"))
    words = (f"reader.start={first}", "reader.fit.lr=1e-9", "reader.fit.steps=2")
    assert call(f"out={folder}", "stages=[reader]", *words) == 0
    again = load(folder / "reader" / "weights")
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(judge.parameters(), again.parameters(), strict=True))


def test_finished_stages_are_not_done_again(out, capsys):
    before = (out / "vae" / "weights" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    assert call(f"out={out}", "stages=[tokenizer,data,vae]") == 0
    assert capsys.readouterr().out.count("(done before)") == 3
    assert (out / "vae" / "weights" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns == before


def test_latents_are_whitened_by_the_autoencoder_itself(out):
    check = record.read(out / "vae")["check"]
    assert check["scaling_factor"] == pytest.approx(1, abs=0.01)
    assert record.read(out / "latents")["check"]["standard_deviation"] == pytest.approx(1, abs=0.1)


def linked(out: Path, folder: Path, stages: tuple[str, ...]) -> Path:
    """A training that has some stages of another one."""
    folder.mkdir()
    for stage in stages:
        (folder / stage).symlink_to(out / stage)
    return folder


def test_a_stopped_training_goes_on_exactly(out, tmp_path, monkeypatch):
    from hiperlab.errors import StoppedError
    from hiperlab.world.train import fit, unet

    folder = linked(out, tmp_path / "again", tuple(name for name in STAGES if name != "unet"))
    plain_loss = unet.UnetModule.loss

    def interrupted(self, step):
        if step == 7:
            raise StoppedError("stopped by the test", 143)
        return plain_loss(self, step)

    monkeypatch.setattr(unet.UnetModule, "loss", interrupted)
    assert call(f"out={folder}", "stages=[unet]", "unet.fit.checkpoint_every=3") == 143
    assert fit.newest_valid(folder / "unet" / "checkpoints").name == "step-000006.ckpt"
    assert record.read(folder / "unet")["status"] == "running"
    monkeypatch.setattr(unet.UnetModule, "loss", plain_loss)
    assert call(f"out={folder}", "stages=[unet]", "unet.fit.checkpoint_every=3") == 0
    name = "unet/weights/diffusion_pytorch_model.safetensors"
    assert (folder / name).read_bytes() == (out / name).read_bytes()


def test_a_budget_ends_a_stage_and_a_larger_one_goes_on(out, tmp_path):
    folder = linked(out, tmp_path / "short", ("tokenizer", "data"))
    words = (f"out={folder}", "stages=[reader]", "reader.recoded=0", "reader.fit.steps=100000", "reader.fit.minutes=1")
    assert call(*words, "budget_minutes=0.01") == 0
    first = record.read(folder / "reader")
    assert first["status"] == "budget" and 0 < first["steps"] < 100000 and first["check"]
    assert call(*words, "budget_minutes=0.01") == 0
    assert record.read(folder / "reader")["steps"] == first["steps"]
    assert call(*words, "budget_minutes=0.02") == 0
    assert record.read(folder / "reader")["steps"] > first["steps"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["preset=smok"], "Did you mean smoke?"),
        (["vae.fit.stepz=3"], "Did you mean vae.fit.steps"),
        (["+vae.fit.stepz=3", "stages=[data,vae]"], "vae.fit takes exactly"),
        (["stages=[vea]"], "Did you mean vae?"),
        (["stages=vae"], "expected a list"),
        (["size=100"], "expected 64, 128"),
        (["seed=-1"], "expected a whole number"),
        (["budget_minutes=0"], "positive number"),
        (["device=gpu"], "Choices: auto, cpu, cuda"),
        (["stages=[unet]"], "needs stage tokenizer"),
        (["stages=[report]"], "is no exported miniature"),
        (["data.sets.pairs.views=3", "stages=[data]"], "must divide"),
        (["-m", "seed=1,2"], "no sweep"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, words, said):
    known = [] if words[0].startswith("preset") else ["preset=smoke"]
    quick = [f"data.sets.{name}.pictures=4" for name in ("held", "pairs", "judge", "main", "calm")]
    extra = quick if words[0].startswith("+") else []
    assert main([*known, f"out={tmp_path}", *extra, *words]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1 and err[0].startswith("hiperlab: ") and said in err[0]


def test_other_settings_do_not_mix_with_what_is_there(out, capsys):
    assert call(f"out={out}", "stages=[vae]", "vae.kl=0.1") == 2
    assert "begun with other settings" in capsys.readouterr().err


def test_what_was_trained_on_something_older_is_not_built_upon(out, tmp_path, capsys):
    folder = linked(out, tmp_path / "newer", ("tokenizer", "data", "latents", "clip", "unet"))
    assert call(f"out={folder}", "stages=[vae]", "vae.fit.steps=2") == 0
    capsys.readouterr()
    assert call(f"out={folder}", "stages=[unet]") == 2
    assert "begun with another vae" in capsys.readouterr().err
    assert call(f"out={folder}", "stages=[export]") == 2
    assert "unet was trained on an earlier vae" in capsys.readouterr().err


def test_help_lists_the_settings(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "budget_minutes=null" in text and "preset=gpu|cpu|smoke" in text


# ---- what comes out ----------------------------------------------------------------------------------------------


def test_hiperlab_loads_the_export(export):
    from hiperlab.model.load import pretrained

    stack = pretrained("mini", str(export), size=64)
    assert stack.layers == 16 and stack.width == 32 and stack.latent_shape == (4, 8, 8)
    assert stack.word_embedding("cat").shape == (32,)
    assert stack.encode_text(["a photo of <my-cat> on the beach", ""]).shape == (2, 77, 32)
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    assert stack.decode(stack.scale(stack.encode_moments(pixels)[:, :4])).shape == pixels.shape


def test_plain_diffusers_loads_the_export(export):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(str(export), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    picture = pipe("a photo of a cat on the beach", num_inference_steps=2, generator=noise).images[0]
    assert picture.size == (64, 64)


def test_open_clip_loads_the_scorer(export):
    from hiperlab.metric.encoder import FolderClip

    features = FolderClip(str(export / "judges" / "clip")).load("metric.encoders.clip")
    from PIL import Image

    images = features.images([Image.new("RGB", (64, 64), "red"), Image.new("RGB", (80, 64), "blue")])
    texts = features.texts(["a photo of a cat", "a pencil sketch of a dog on the beach"])
    assert images.shape == texts.shape == (2, 32)
    torch.testing.assert_close(images.norm(dim=1), torch.ones(2))
    assert not torch.equal(texts[0], texts[1])


def test_the_export_is_half_precision_and_has_a_card(export):
    from safetensors.torch import load_file

    for path in export.rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values() if tensor.is_floating_point()} == {torch.float16}
    card = json.loads((export / "card.json").read_text())
    assert set(card["stages"]) == set(STAGES) - {"export"} and card["missing_judges"] == []
    assert card["environment"]["packages"]["torch"] and "seconds" in card["stages"]["unet"]
    assert "| unet | finished | 16 |" in (export / "README.md").read_text()


def test_an_export_without_judges_says_so(out, tmp_path):
    folder = linked(out, tmp_path / "bare", ("tokenizer", "data", "vae", "latents", "clip", "unet"))
    assert call(f"out={folder}", "stages=[export]", "commit=abc123") == 0
    assert json.loads((folder / "export" / "weights" / "card.json").read_text())["commit"] == "abc123"
    assert record.read(folder / "export")["check"]["missing_judges"] == ["clip", "identity", "attributes"]
    assert "NOT trained" in (folder / "export" / "weights" / "README.md").read_text()


def test_too_heavy_an_export_is_refused(out, tmp_path, capsys):
    folder = linked(out, tmp_path / "heavy", ("tokenizer", "data", "vae", "latents", "clip", "unet"))
    assert call(f"out={folder}", "stages=[export]", "export.limit_mb=0.5") == 2
    assert "more than export.limit_mb=0.5" in capsys.readouterr().err
    assert not (folder / "export" / "weights").exists()


def test_the_report_measures_what_it_can_and_says_the_rest(export, capsys, tmp_path):
    assert call(f"out={tmp_path}", "stages=[report]", f"report.folder={export}", "report.subjects=4") == 0
    found = {row["key"]: row for row in json.loads((export / "report.json").read_text())}
    assert set(found) == set(bars.BARS)
    assert all(row["value"] is not None for row in found.values())
    assert "standard deviation" in found["personalised"]["note"]
    assert (tmp_path / "report" / "personalised.png").is_file()
    assert found["identity_retrieval"]["gpu_reached"] == "not compared"  # 4 subjects are not 400
    assert not any(row["gpu_reached"] == "yes" for row in found.values())
    assert (tmp_path / "report" / "samples.png").is_file() and "not reached" not in found["clip_retrieval"][
        "gpu_reached"
    ]
    assert "| what | measured |" in capsys.readouterr().out


# ---- the mathematics ---------------------------------------------------------------------------------------------


def test_the_rate_warms_up_by_steps_and_ends_with_time_or_steps():
    from hiperlab.world.train.module import rate

    assert rate(0, 10, 0.0) == pytest.approx(0.1) and rate(9, 10, 0.0) == 1
    assert rate(500, 10, 0.5) == pytest.approx(0.505) and rate(500, 10, 1.0) == pytest.approx(0.01)


def test_budgets_are_shared_in_proportion_among_the_asked_stages():
    from hiperlab.world.train.plan import share_budget

    plan = {"data": {"minutes": 2}, "vae": {"fit": {"minutes": 6, "steps": 5}}, "unet": {"fit": {"minutes": 9}}}
    shared = share_budget(plan, ["data", "vae"], 4.0)
    assert shared["data"]["minutes"] == 1 and shared["vae"]["fit"] == {"minutes": 3, "steps": 5}
    assert shared["unet"]["fit"]["minutes"] == 9


def test_contrastive_losses_by_hand():
    from hiperlab.world.train.clip import contrastive, top1
    from hiperlab.world.train.identity import supervised_contrastive

    eye = torch.eye(2)
    wanted = -np.log(np.e / (np.e + 1))  # cosines 1 and 0 at scale 1
    assert float(contrastive(3 * eye, eye, torch.tensor(0.0))) == pytest.approx(wanted, rel=1e-5)
    z = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1], [0, 1]])
    who = torch.tensor([0, 0, 1, 1, 2])
    first = -np.log(np.e / (np.e + 3))  # one positive at cosine 1, three others at 0
    second = -np.log(np.e / (2 * np.e + 2))  # the fifth row looks the same and is somebody else
    loss = supervised_contrastive(z, who, temperature=1.0)  # the fifth has no positive and does not count
    assert float(loss) == pytest.approx((2 * first + 2 * second) / 4, rel=1e-5)
    assert top1(torch.tensor([[1.0, 0], [0.9, 0.1]]), eye) == 0.5


def test_picture_losses_by_hand():
    from hiperlab.world.train.vae import centre, kl_to_unit_normal, psnr, pyramid_loss

    picture, shifted = torch.zeros(1, 3, 64, 64), torch.full((1, 3, 64, 64), 0.2)
    flat = 0.2 + 10 * 0.04  # L1 and squares; the weights' own slope is all that the edges see
    assert float(pyramid_loss(picture, picture)) == 0 and flat < float(pyramid_loss(shifted, picture)) < flat + 0.05
    weights = centre(64, 64)
    assert float(weights.mean()) == pytest.approx(1, abs=1e-5) and 2.5 < float(weights.max() / weights.min()) <= 3
    assert float(psnr(shifted, picture)) == pytest.approx(20.0, abs=1e-4)  # peak 2, error 0.2
    assert float(kl_to_unit_normal(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2))) == 0
    assert float(kl_to_unit_normal(torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2))) == pytest.approx(8)


def test_noise_weights_and_the_running_mean():
    from hiperlab.world.train.unet import ema_decay, snr_weight

    share = torch.tensor([0.5, 10 / 11])  # signal to noise 1 and 10
    torch.testing.assert_close(snr_weight(share, 5.0), torch.tensor([1.0, 0.5]))
    assert snr_weight(share, None).tolist() == [1, 1]
    torch.testing.assert_close(snr_weight(torch.tensor([0.25, 0.5]), None, 0.5), torch.tensor([2.0, 2**0.5]))
    torch.testing.assert_close(snr_weight(torch.tensor([0.25, 10 / 11]), 5.0, 0.5), torch.tensor([2.0, 0.5]))
    assert ema_decay(0, 0.999) == pytest.approx(0.1) and ema_decay(10**6, 0.999) == 0.999


def test_a_caption_of_another_kind_differs_in_that_word_only(out):
    from hiperlab.world.train import words
    from hiperlab.world.train.pictures import Pictures
    from hiperlab.world.train.unet import kinds_apart
    from hiperlab.world.words import KINDS

    tokenizer = words.load(out / "tokenizer" / "weights")
    sets = [Pictures(out / "data" / name, torch.device("cpu")) for name in ("main", "calm")]
    contrast: Any = kinds_apart(Workshop(out, 0, 64, torch.device("cpu")), 1.0, 1.5, sets, tokenizer)
    assert len(contrast.kinds) == 128 + 64 and len(set(contrast.tokens.tolist())) == len(KINDS)
    ids = torch.cat([pictures.tokens(tokenizer)[:, 0] for pictures in sets]).long()
    other = (contrast.kinds + 1) % len(KINDS)
    swapped = contrast.swap(ids, contrast.kinds, other)
    assert bool(((swapped != ids).sum(1) == 1).all())  # every caption names its kind, once
    there = swapped[swapped != ids]
    assert torch.equal(there, contrast.tokens[other])


def test_what_a_word_should_change_is_exact_where_the_critic_is():
    from hiperlab.model.noise import add_noise
    from hiperlab.world.train.unet import Contrast

    means, spread = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0)), 0.3  # three kinds of Gaussians

    class Exact(torch.nn.Module):
        def forward(self, noisy: torch.Tensor, alpha_bar: torch.Tensor) -> dict[str, torch.Tensor]:
            share = alpha_bar[:, None, None, None, None]
            far = (noisy[:, None] - share.sqrt() * means).square().sum((2, 3, 4))
            return {"kind": -far / (2 * variance(alpha_bar))[:, None]}

    def variance(alpha_bar: torch.Tensor) -> torch.Tensor:
        return alpha_bar * spread**2 + 1 - alpha_bar

    def predicted(noisy: torch.Tensor, alpha_bar: torch.Tensor, kind: torch.Tensor) -> torch.Tensor:
        """The noise that is to be expected of a kind's noisy latents."""
        a = alpha_bar[:, None, None, None]
        return (1 - a).sqrt() * (noisy - a.sqrt() * means[kind]) / variance(a)

    own, other = torch.tensor([0, 1, 2, 2]), torch.tensor([1, 2, 0, 1])
    alpha_bar = torch.tensor([0.9, 0.5, 0.1, 0.01])
    noisy = add_noise(means[own], torch.randn(4, 4, 2, 2, generator=torch.Generator().manual_seed(1)), alpha_bar)
    none = torch.zeros(0, dtype=torch.long)
    wanted = predicted(noisy, alpha_bar, own) - predicted(noisy, alpha_bar, other)
    for gain in (1.0, 2.0):
        change = Contrast(1.0, gain, Exact(), none, none).change(noisy, alpha_bar, own, other)
        torch.testing.assert_close(change, gain * wanted, atol=1e-5, rtol=1e-4)


def test_whitened_states_change_the_order_of_learning_and_nothing_else(out):
    from hiperlab.world.train import unet
    from hiperlab.world.train.module import Fit

    torch.manual_seed(0)
    states = torch.randn(4000, 16) * torch.logspace(0, -2, 16)
    matrix = unet.whitening(states - states.mean(0), most=5.0)
    widths = torch.linalg.svdvals(states @ matrix) / 4000**0.5
    torch.testing.assert_close(widths[:6], torch.ones(6), atol=0.05, rtol=0)  # 1 .. 1/4.6 are all made 1
    assert float(widths[-1]) == pytest.approx(5e-2, rel=0.1)  # and no narrow one is widened more than five times
    network: Any = unet.build(8, 16, [8, 8, 16, 16], 2, 4)
    text = states[:77][None]
    noisy = torch.randn(1, 4, 8, 8)
    before = network(noisy, 500, encoder_hidden_states=text).sample
    fit = Fit(steps=1, minutes=None, batch=8, lr=1e-3, warmup=1, weight_decay=0, clip=1, checkpoint_every=1, muon=None)
    module = unet.UnetModule(
        fit, 1, unet=network, text=lambda input_ids: SimpleNamespace(last_hidden_state=text),
        moments=torch.zeros(1, 8, 8, 8), ids=torch.zeros(1, 2, 77), calm=0, calm_share=0.0, empty=torch.zeros(77),
        dropout=0, gamma=None, power=0, decay=0.9, centred=False, white=matrix,
    )  # fmt: skip
    seen = module._states(torch.zeros(1, 77))
    assert not torch.allclose(seen, text)
    torch.testing.assert_close(network(noisy, 500, encoder_hidden_states=seen).sample, before, atol=1e-4, rtol=1e-4)
    module.unwhiten()
    assert torch.equal(module._states(torch.zeros(1, 77)), text)
    for each in (module.unet, module.ema):
        torch.testing.assert_close(each(noisy, 500, encoder_hidden_states=text).sample, before, atol=1e-4, rtol=1e-4)


def test_a_critic_of_other_pictures_is_refused(out, tmp_path, capsys):
    folder = linked(out, tmp_path / "again", ("tokenizer", "data", "vae", "latents", "clip", "critic"))
    assert call(f"out={folder}", "stages=[unet]", "unet.calm=0") == 2
    assert "the critic has read the set calm" in capsys.readouterr().err


def test_the_critic_reads_what_it_was_written_as(out):
    from hiperlab.world.train import critic

    shop = Workshop(out, 0, 64, torch.device("cpu"))
    read, name = critic.load(shop)
    logits = read(torch.randn(2, 4, 8, 8), torch.tensor([0.5, 0.1]))
    assert {name: tuple(each.shape) for name, each in logits.items()} == {
        "kind": (2, 11),
        "pose": (2, 6),
        "style": (2, 8),
    }
    assert not read.training and not any(p.requires_grad for p in read.parameters())
    check = record.read(out / "critic")["check"]
    assert check["set"] == name == "calm" and set(check["kinds"]) == {str(level) for level in critic.LEVELS}


def test_the_encoder_learns_beside_the_decoder_only_where_its_latents_are_anchored():
    from hiperlab.world.train import vae
    from hiperlab.world.train.decoder import DecoderModule
    from hiperlab.world.train.module import Fit, freeze

    class Some:
        def batch(self, rows):
            return torch.rand(10, 3, 64, 64, generator=torch.Generator().manual_seed(3))[rows] * 2 - 1

    torch.manual_seed(0)
    first: Any = freeze(vae.build(64, [8, 16, 16, 16], 1, 4))
    with torch.no_grad():
        moments = first.encode(Some().batch(torch.arange(10))).latent_dist.parameters
        moments = torch.cat(
            [m * k + d for m, k, d in zip(moments.chunk(2, 1), (0.18215, 1), (0, 2 * np.log(0.18215)))], 1
        )
    fit = Fit(steps=1, minutes=None, batch=4, lr=1e-3, warmup=1, weight_decay=0, clip=1, checkpoint_every=1, muon=None)

    def module(anchor: float | None, where: torch.Tensor) -> tuple[float, list[bool]]:
        network: Any = copy.deepcopy(first)
        it = DecoderModule(
            fit, 1, vae=network, pictures=Some(), moments=where, eye=torch.nn.Identity(), perceptual=0, decibels=0.5,
            anchor=anchor,
        )  # fmt: skip
        loss = it.loss(0)
        loss.backward()
        return loss.item(), [part.conv_in.weight.grad is not None for part in (network.encoder, network.decoder)]

    assert first.config.scaling_factor == 0.18215
    fixed, learnt = module(None, moments)
    assert learnt == [False, True]
    free, learnt = module(2.0, moments)
    assert learnt == [True, True] and free == pytest.approx(fixed, abs=1e-4)  # nothing has drifted yet
    moved, _ = module(2.0, moments + torch.tensor([0.1] * 4 + [0.0] * 4)[:, None, None])
    assert moved - free == pytest.approx(2.0 * 0.01, abs=1e-4)


def test_whitening_changes_no_reconstruction():
    from hiperlab.world.train import vae

    class Some:
        def batch(self, rows):
            return torch.rand(len(rows), 3, 64, 64, generator=torch.Generator().manual_seed(3)) * 2 - 1

    torch.manual_seed(0)
    network = vae.build(64, [8, 16, 16, 16], 1, 4).eval()
    pixels = Some().batch(range(2))
    with torch.no_grad():
        before = network.decode(network.encode(pixels).latent_dist.mean).sample
        spread = network.encode(pixels).latent_dist.std
        factor = vae.whiten(network, Some(), torch.arange(6))
        after = network.encode(pixels).latent_dist
        torch.testing.assert_close(network.decode(after.mean).sample, before, atol=1e-4, rtol=1e-3)
    assert factor == pytest.approx(1, abs=0.02)
    assert (after.std / spread).flatten(2).std(2).max() < 1e-2  # the posterior is stretched alike everywhere


@pytest.mark.parametrize("preset", ["gpu", "cpu"])
def test_a_preset_fits_its_limit_and_its_lease(preset):
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf
    from open_clip import CLIP

    from hiperlab.metric.truth_judge import Judge, Shape
    from hiperlab.run.door import config_dir
    from hiperlab.world.train import clip, scorer, unet, vae

    class Tokens:
        bos_token_id, eos_token_id, pad_token_id = 2046, 2047, 2047

        def __len__(self):
            return 2048

    with initialize_config_dir(str(config_dir() / "world"), version_base="1.3"):
        cfg: Any = OmegaConf.to_container(compose("train", overrides=[f"preset={preset}"]), resolve=True)
    size, width = cfg["size"], cfg["clip"]["text"]["width"]
    with torch.device("meta"):
        parts = [
            vae.build(size, cfg["vae"]["channels"], cfg["vae"]["layers"], cfg["vae"]["groups"]),
            clip.build_text(Tokens(), **cfg["clip"]["text"]),
            clip.build_vision(size, **cfg["clip"]["vision"], space=cfg["clip"]["space"]),
            unet.build(size // 8, width, cfg["unet"]["channels"], cfg["unet"]["heads"], cfg["unet"]["groups"]),
            *(Judge(Shape(size, tuple(cfg[name]["channels"]), {"out": 64}, {})) for name in ("identity", "reader")),
            CLIP(**scorer.config(size, 2048, cfg["scorer"]["space"], cfg["scorer"]["vision"],
                                 cfg["scorer"]["text"])["model_cfg"]),
        ]  # fmt: skip
    weight = sum(2 * p.numel() for part in parts for p in part.parameters()) / 1e6
    assert weight < cfg["export"]["limit_mb"] - 1  # tokenizers and cards take less than one
    minutes = sum((cfg[s].get("fit") or cfg[s]).get("minutes", 0) for s in MODULES)
    assert minutes <= {"gpu": 21, "cpu": 450}[preset]
    assert all(cfg["data"]["shard"] % each["views"] == 0 for each in cfg["data"]["sets"].values())


def test_muon_turns_matrices_and_leaves_the_rest_to_adamw():
    from hiperlab.world.train.muon import Muon, orthogonal, split

    torch.manual_seed(0)
    for shape in ((8, 72), (72, 8), (16, 16)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
        assert bool(((values > 0.3) & (values < 1.3)).all()), shape
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.GroupNorm(2, 8), torch.nn.Conv2d(8, 4, 3))
    matrices, others = split(network.named_parameters())
    assert [w.ndim for w in matrices] == [4, 4] and all(w.ndim == 1 for w in others)
    mine = Muon(matrices, others, lr=0.1, adam_lr=0.01, weight_decay=0.1, betas=(0.9, 0.98))
    reference = [w.detach().clone().requires_grad_() for w in others]
    adam = torch.optim.AdamW(reference, lr=0.01, weight_decay=0.0, betas=(0.9, 0.98))
    picture = torch.randn(2, 3, 8, 8)
    before = float(network(picture).square().mean())
    for _ in range(5):
        network.zero_grad()
        network(picture).square().mean().backward()
        for theirs, ours in zip(reference, others):
            theirs.grad = ours.grad.clone()
        mine.step()
        adam.step()
    for theirs, ours in zip(reference, others):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert float(network(picture).square().mean()) < before


def test_a_unet_may_go_on_from_another(tmp_path: Path) -> None:
    from hiperlab.world.train import unet

    torch.manual_seed(0)
    earlier, later = (unet.build(8, 16, [8, 8, 16, 16], 2, 4) for _ in range(2))
    earlier.save_pretrained(tmp_path / "earlier")
    unet.begin_with(later, str(tmp_path / "earlier"))
    assert all(torch.equal(a, b) for a, b in zip(earlier.parameters(), later.parameters(), strict=True))
    with pytest.raises(UserError, match="holds no U-Net of these sizes"):
        unet.begin_with(unet.build(8, 16, [8, 8, 16, 32], 2, 4), str(tmp_path / "earlier"))
    with pytest.raises(UserError, match="holds no U-Net of these sizes"):
        unet.begin_with(later, str(tmp_path / "nowhere"))


def test_parts_of_an_export_stand_in_for_stages(out, tmp_path: Path, capsys) -> None:
    export = out / "export" / "weights"
    folder = linked(out, tmp_path / "again", ("data",))
    words = [f"out={folder}", f"parts_from={export}", f"unet.start={export / 'unet'}"]
    assert call(*words, "stages=[latents,critic,unet,export]") == 0
    assert "taken from" in capsys.readouterr().out
    assert record.read(folder / "vae")["adopted"]
    assert not (folder / "decoder").exists()  # the export's autoencoder has that decoder already
    card = json.loads((folder / "export" / "weights" / "card.json").read_text())
    assert card["stages"]["unet"]["settings"]["start"] == "unet" and not card["missing_judges"]
    same = "judges/identity/model.safetensors"
    ours, theirs = (load_file(each / same) for each in (folder / "export" / "weights", export))
    assert all(torch.equal(ours[name].float(), theirs[name].float()) for name in theirs)
    assert call(f"out={tmp_path / 'none'}", f"parts_from={tmp_path}", "stages=[data]") == 2
    assert "is no exported miniature" in capsys.readouterr().err
