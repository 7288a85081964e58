"""The training recipe: every stage starts, learns, is checked and not done twice; others can load what comes out."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hiperlab.errors import UserError
from hiperlab.files import expand
from hiperlab.miniature import bars, record
from hiperlab.miniature.main import MODULES, main
from hiperlab.miniature.plan import ORDER, Workshop

BASE = expand("hiperlab:weights/mini")
STAGES = [stage for stage in ORDER if stage != "report"]
LEARNING = ("unet", "identity", "reader", "scorer")  # the decoder begins where the shipped one ended


def workshop(out: Path) -> Workshop:
    return Workshop(out=out, base=BASE, seed=2026, size=64, reading_size=32, device=torch.device("cpu"))


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


@pytest.mark.parametrize("stage", LEARNING)
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
        for name in ("main", "calm", "two", "judge", "judge_two", "held", "pairs")
    }  # fmt: skip
    training, judging = seen["main"] | seen["calm"] | seen["two"], seen["judge"] | seen["judge_two"]
    assert not training & judging and len(seen["main"]) == 128 and len(seen["judge"]) == 32
    assert all(who in TRAINED for who in training | judging)
    assert all(who in HELD_OUT for who in seen["held"] | seen["pairs"])


def test_calm_pictures_share_one_camera_and_two_subjects_stand_side_by_side():
    from hiperlab.miniature.draw_shard import CALM, Source, truth, wording
    from hiperlab.world.caption import parse
    from hiperlab.world.vocabulary import KINDS

    calm, two = Source("calm", 2026), Source("two", 2026)
    shots = [calm.picture(number) for number in range(800)]
    assert {shot.now.seed for shot in shots} == {2026} and len({shot.who.coat for shot in shots}) > 790
    assert all(getattr(shot.now, name) == value for shot in shots for name, value in CALM.items())
    counts = Counter(shot.now.style for shot in shots)
    assert len(counts) == 8 and max(counts.values()) < 130  # 100 expected, standard deviation 9.4
    for number, shot in enumerate(shots[:100]):
        said = parse(wording(calm, number, 0, shot))
        assert said.get("pattern", "plain") == shot.who.pattern and said.get("accessory", "none") == shot.now.accessory
        assert truth(shot)["second"] == "none"
    for number in range(50):
        shot = two.picture(number)
        assert shot.beside is not None and shot.now.x < 0 < shot.beside[1].x
        kinds = [word for word in wording(two, number, 0, shot).split() if word in KINDS]
        assert kinds == [shot.who.kind, shot.beside[0].kind] == [truth(shot)["kind"], truth(shot)["second"]]


def test_a_name_stands_where_the_kind_would_and_is_as_long(out):
    from hiperlab.miniature.names import FEATURES, Namer, features, put
    from hiperlab.miniature.parts import load_tokenizer, token_ids
    from hiperlab.miniature.pictures import Pictures
    from hiperlab.world.identity import identity
    from hiperlab.world.vocabulary import KINDS

    tokenizer = load_tokenizer(BASE)
    pictures = Pictures(out / "data" / "two", torch.device("cpu"))
    ids = pictures.tokens(tokenizer, named=True)[:, 0].long()
    nouns = torch.tensor([token_ids(tokenizer, kind)[0] for kind in KINDS])[pictures.labels["kind"]]
    places = put(ids, nouns)
    assert bool((places > 0).all()) and torch.equal(ids[torch.arange(len(ids)), places], nouns)
    namer = Namer(12)
    table = torch.randn(4, 12)
    who = torch.tensor([features(identity(seed)) for seed in range(4)])
    assert who.shape == (4, FEATURES) and float(who.abs().max()) < 4
    torch.testing.assert_close(namer(who, table), table)  # before it learns: the word for the kind
    torch.nn.init.normal_(namer.network[-1].weight)
    named = namer(who, table)
    torch.testing.assert_close(named.norm(dim=1), table.norm(dim=1))
    assert len({tuple(row) for row in named.tolist()}) == 4


def test_a_batch_takes_its_shares_of_the_sets_and_timesteps_are_spread():
    from hiperlab.miniature.unet import ema_decay, share_out, timesteps

    assert share_out({"calm": 0.5, "main": 0.4, "two": 0.1}, 32) == {"calm": 16, "main": 13, "two": 3}
    for wrong in ({}, {"main": 0.5}, {"main": 1.5, "calm": -0.5}):
        with pytest.raises(UserError, match="add up to 1"):
            share_out(wrong, 32)
    drawn = torch.cat([timesteps(1, step, 32, 0.5) for step in range(200)])
    near = ((drawn >= 450) & (drawn < 950)).float().mean()
    assert int(drawn.min()) < 10 and int(drawn.max()) > 990 and 0.72 < float(near) < 0.78  # 0.5 + 0.5 * 0.5
    even = timesteps(1, 0, 10, 0.0).sort().values
    assert torch.equal(even // 100, torch.arange(10))
    assert ema_decay(0, 0.999) == pytest.approx(0.1) and ema_decay(10**6, 0.999) == 0.999


@pytest.mark.parametrize(
    ("stage", "words", "said"),
    [
        ("unet", "unet.shares.main=0.9", "expected shares of the sets"),
        ("unet", "unet.start=nowhere", "holds no U-Net and text tower of these sizes"),
        ("reader", "reader.recoded=1.5", "recoded=1.5: expected a share"),
        ("reader", "reader.recoded=0.5", "recoded=0.5 needs stage recoded"),
        ("reader", "reader.start=nowhere", "nowhere holds no judge"),
        ("identity", "identity.start=nowhere", "nowhere holds no judge"),
    ],
)
def test_a_stage_says_what_it_lacks(stage, words, said, out, tmp_path, capsys):
    folder = linked(out, tmp_path / "again", ("data", "latents"))
    assert call(f"out={folder}", f"stages=[{stage}]", "reader.recoded=0", "identity.recoded=0", words) == 2
    assert said in capsys.readouterr().err


def test_a_judge_reads_recoded_pictures_and_goes_on_from_another(out, tmp_path: Path) -> None:
    from hiperlab.metric.world.network import load
    from hiperlab.miniature.recoded import Reading

    shop = workshop(out)
    plain, all_coded = Reading(shop, ("judge", "judge_two"), 0.0), Reading(shop, ("judge", "judge_two"), 1.0)
    rows = torch.arange(len(plain))
    sharp, coded = (each.batch(rows, 1, "test", 0) for each in (plain, all_coded))
    assert sharp.shape == (128 + 64, 3, 32, 32) and not torch.equal(sharp, coded)
    known = np.load(out / "recoded" / "weights" / "judge_two-00000.npy")
    assert torch.equal(((coded[128:] + 1) * 127.5).round().byte().permute(0, 2, 3, 1), torch.from_numpy(known))
    half = Reading(shop, ("judge",), 0.5).batch(rows[:128], 1, "test", 0)
    same = (half == sharp[:128]).flatten(1).all(1)
    assert 40 < int(same.sum()) < 88 and torch.equal(half[~same], coded[:128][~same])
    first = out / "reader" / "weights"
    judge: Any = load(first)
    folder = linked(out, tmp_path / "again", ("data", "recoded"))
    words = (f"reader.start={first}", "reader.fit.lr=1e-9", "reader.fit.muon=1e-9", "reader.fit.steps=2")
    assert call(f"out={folder}", "stages=[reader]", *words) == 0
    again = load(folder / "reader" / "weights")
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(judge.parameters(), again.parameters(), strict=True))


def test_finished_stages_are_not_done_again(out, capsys):
    file = out / "decoder" / "weights" / "diffusion_pytorch_model.safetensors"
    before = file.stat().st_mtime_ns
    assert call(f"out={out}", "stages=[data,decoder]") == 0
    assert capsys.readouterr().out.count("(done before)") == 2
    assert file.stat().st_mtime_ns == before


def test_the_decoder_alone_learns_and_the_encoder_stays(out):
    ours, theirs = (
        load_file(folder / "diffusion_pytorch_model.safetensors")
        for folder in (out / "decoder" / "weights", BASE / "vae")
    )
    changed = {name.split(".")[0] for name in theirs if not torch.equal(ours[name].float(), theirs[name].float())}
    assert changed == {"decoder", "post_quant_conv"}


def linked(out: Path, folder: Path, stages: tuple[str, ...]) -> Path:
    """A training that has some stages of another one."""
    folder.mkdir()
    for stage in stages:
        (folder / stage).symlink_to(out / stage)
    return folder


def test_a_stopped_training_goes_on_exactly(out, tmp_path, monkeypatch):
    from hiperlab.errors import StoppedError
    from hiperlab.miniature import fit, unet

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
    for name in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "namer.safetensors"):
        assert (folder / "unet/weights" / name).read_bytes() == (out / "unet/weights" / name).read_bytes()


def test_a_budget_ends_a_stage_and_a_larger_one_goes_on(out, tmp_path):
    folder = linked(out, tmp_path / "short", ("data",))
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
        (["unet.fit.stepz=3"], "Did you mean unet.fit.steps"),
        (["+identity.fit.stepz=3", "stages=[data,identity]"], "identity.fit takes exactly"),
        (["stages=[uent]"], "Did you mean unet"),
        (["stages=unet"], "expected a list"),
        (["base=nowhere"], "base=nowhere is no exported miniature"),
        (["size=100"], "expected 64, 128"),
        (["seed=-1"], "expected a whole number"),
        (["budget_minutes=0"], "positive number"),
        (["device=gpu"], "Choices: auto, cpu, cuda"),
        (["stages=[unet]"], "needs stage data"),
        (["stages=[report]"], "is no exported miniature"),
        (["data.sets.pairs.views=3", "stages=[data]"], "must divide"),
        (["-m", "seed=1,2"], "no sweep"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, words, said):
    known = [] if words[0].startswith("preset") else ["preset=smoke"]
    quick = [f"data.sets.{name}.pictures=4" for name in ("held", "pairs", "judge", "judge_two", "main", "calm", "two")]
    extra = quick if words[0].startswith("+") else []
    assert main([*known, f"out={tmp_path}", *extra, *words]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1 and err[0].startswith("hiperlab: ") and said in err[0]


def test_other_settings_do_not_mix_with_what_is_there(out, capsys):
    assert call(f"out={out}", "stages=[decoder]", "decoder.decibels=0.1") == 2
    assert "begun with other settings" in capsys.readouterr().err


def test_what_was_trained_on_something_older_is_not_gone_on_with(out, tmp_path, capsys):
    folder = linked(out, tmp_path / "newer", ("latents", "unet"))
    shutil.copytree(out / "data", folder / "data")
    assert call(f"out={folder}", "stages=[data]", "data.wordings=1", "resume=false") == 0
    capsys.readouterr()
    assert call(f"out={folder}", "stages=[unet]") == 2
    assert "begun with another data" in capsys.readouterr().err


def test_help_lists_the_settings(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "budget_minutes=null" in text and "preset=gpu|cpu|smoke" in text


# ---- what comes out ----------------------------------------------------------------------------------------------


def test_hiperlab_loads_the_export(export):
    from hiperlab.model.load import pretrained

    stack = pretrained("mini", str(export), size=64)
    assert stack.layers == 16 and stack.width == 96 and stack.latent_shape == (4, 8, 8)
    assert stack.prediction_type == "v_prediction"
    assert stack.word_embedding("cat").shape == (96,)
    assert stack.encode_text(["a photo of <my-cat> on the beach", ""]).shape == (2, 77, 96)
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
    assert set(STAGES) - {"export"} <= set(card["stages"]) and not card["stages"]["unet"].get("from_base")
    assert card["environment"]["packages"]["torch"] and "seconds" in card["stages"]["unet"]
    assert "| unet | finished | 16 |" in (export / "README.md").read_text()


def test_what_is_not_trained_comes_from_the_base(out, tmp_path):
    folder = linked(out, tmp_path / "bare", ("data", "latents", "reader"))
    assert call(f"out={folder}", "stages=[export]", "commit=abc123") == 0
    made = folder / "export" / "weights"
    card = json.loads((made / "card.json").read_text())
    assert card["commit"] == "abc123" and card["stages"]["unet"]["from_base"]
    assert not card["stages"]["reader"].get("from_base") and "| unet | " in (made / "README.md").read_text()
    for part in ("judges/identity", "unet", "text_encoder"):
        ours, theirs = (merged(each / part) for each in (made, BASE))
        assert all(torch.equal(ours[name].float(), theirs[name].float()) for name in theirs), part
    reader = "judges/attributes/model.safetensors"
    assert (made / reader).read_bytes() == (out / "reader" / "weights" / "model.safetensors").read_bytes()
    words = (f"out={tmp_path / 'on'}", f"base={made}", "unet.start=" + str(out / "export" / "weights"))
    for stage in ("data", "latents"):
        (tmp_path / "on").mkdir(exist_ok=True)
        (tmp_path / "on" / stage).symlink_to(out / stage)
    assert call(*words, "stages=[unet,export]", "unet.fit.steps=1") == 0
    again = json.loads((tmp_path / "on" / "export" / "weights" / "card.json").read_text())
    assert again["stages"]["unet"]["settings"]["start"] == "weights"  # a card travels, folders do not


def merged(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, whatever files they lie in."""
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def test_too_heavy_an_export_is_refused(out, tmp_path, capsys):
    folder = linked(out, tmp_path / "heavy", ("data", "unet"))
    assert call(f"out={folder}", "stages=[export]", "export.limit_mb=0.5") == 2
    assert "more than export.limit_mb=0.5" in capsys.readouterr().err
    assert not (folder / "export" / "weights").exists()


def test_the_report_measures_what_it_can_and_says_the_rest(export, capsys, tmp_path):
    from hiperlab.miniature.report import SAMPLED

    assert call(f"out={tmp_path}", "stages=[report]", f"report.folder={export}", "report.subjects=4") == 0
    found = {row["key"]: row for row in json.loads((export / "report.json").read_text())}
    assert set(found) == set(bars.BARS)
    assert all(row["value"] is not None for row in found.values())
    assert found["identity_retrieval"]["reached"] == "not compared"  # 4 subjects are not 400
    assert not any(row["reached"] == "yes" for row in found.values() if row["key"] in SAMPLED)
    assert (tmp_path / "report" / "styled.png").is_file() and (tmp_path / "report" / "two.png").is_file()
    assert "| what | measured |" in capsys.readouterr().out


# ---- the mathematics ---------------------------------------------------------------------------------------------


def test_the_rate_warms_up_by_steps_and_ends_with_time_or_steps():
    from hiperlab.miniature.module import rate

    assert rate(0, 10, 0.0) == pytest.approx(0.1) and rate(9, 10, 0.0) == 1
    assert rate(500, 10, 0.5) == pytest.approx(0.505) and rate(500, 10, 1.0) == pytest.approx(0.01)
    assert rate(500, 10, 0.6, hold=0.6) == 1 and rate(500, 10, 0.8, hold=0.6) == pytest.approx(0.505)


def test_budgets_are_shared_in_proportion_among_the_asked_stages():
    from hiperlab.miniature.plan import share_budget

    plan = {"data": {"minutes": 2}, "vae": {"fit": {"minutes": 6, "steps": 5}}, "unet": {"fit": {"minutes": 9}}}
    shared = share_budget(plan, ["data", "vae"], 4.0)
    assert shared["data"]["minutes"] == 1 and shared["vae"]["fit"] == {"minutes": 3, "steps": 5}
    assert shared["unet"]["fit"]["minutes"] == 9


def test_contrastive_losses_by_hand():
    from hiperlab.miniature.identity import supervised_contrastive, top1
    from hiperlab.miniature.scorer import contrastive

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
    from hiperlab.miniature.decoder import centre, psnr, pyramid_loss

    picture, shifted = torch.zeros(1, 3, 64, 64), torch.full((1, 3, 64, 64), 0.2)
    flat = 0.2 + 10 * 0.04  # L1 and squares; the weights' own slope is all that the edges see
    assert float(pyramid_loss(picture, picture)) == 0 and flat < float(pyramid_loss(shifted, picture)) < flat + 0.05
    weights = centre(64, 64)
    assert float(weights.mean()) == pytest.approx(1, abs=1e-5) and 2.5 < float(weights.max() / weights.min()) <= 3
    assert float(psnr(shifted, picture)) == pytest.approx(20.0, abs=1e-4)  # peak 2, error 0.2


@pytest.mark.parametrize("preset", ["gpu", "cpu"])
def test_a_preset_fits_its_limit_and_its_lease(preset):
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf
    from open_clip import CLIP

    from hiperlab.cli.process import config_dir
    from hiperlab.metric.world.network import Judge, Shape
    from hiperlab.miniature import scorer, unet
    from hiperlab.miniature.export import megabytes

    with initialize_config_dir(str(config_dir() / "miniature"), version_base="1.3"):
        cfg: Any = OmegaConf.to_container(compose("train", overrides=[f"preset={preset}"]), resolve=True)
    size, small = cfg["size"], cfg["reading_size"]
    with torch.device("meta"):
        parts = [
            unet.build(size // 8, 96, cfg["unet"]["channels"], cfg["unet"]["heads"], cfg["unet"]["groups"]),
            *(Judge(Shape(small, tuple(cfg[name]["channels"]), {"out": 64}, {})) for name in ("identity", "reader")),
            CLIP(**scorer.config(small, 2048, cfg["scorer"]["space"], cfg["scorer"]["vision"],
                                 cfg["scorer"]["text"])["model_cfg"]),
        ]  # fmt: skip
    weight = sum(2 * p.numel() for part in parts for p in part.parameters()) / 1e6
    kept = sum(megabytes(BASE / part) for part in ("vae", "text_encoder", "image_encoder", "tokenizer"))
    assert weight + kept < cfg["export"]["limit_mb"] - 1  # cards take less than one
    minutes = sum((cfg[s].get("fit") or cfg[s]).get("minutes", 0) for s in MODULES)
    assert minutes <= {"gpu": 15, "cpu": 450}[preset]
    assert all(cfg["data"]["shard"] % each["views"] == 0 for each in cfg["data"]["sets"].values())


def test_muon_turns_matrices_and_leaves_the_rest_to_adamw():
    from hiperlab.optim.muon import Muon, orthogonal, split

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
