"""The main job on the tiny stack, through the door: what it leaves behind, its stages alone, and its mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from hiperlab import files
from hiperlab.run.main import main

ROOT = Path(__file__).parents[2]
SMALL = [
    "model=tiny", "model.size=64", "data.resolution=64", "data.max_views=2", "logger=csv", "trainer=cpu",
    "fit.steps=3", "fit.batch_size=2", "fit.checkpoint_every=1", "fit.sample_every=0", "sampler.steps=2",
    "sample.prompts=2", "sample.seeds=[0,1]",
]  # fmt: skip


def run(folder: Path, *overrides: str) -> int:
    return main([*SMALL, *overrides, f"run_dir='{folder}'"])


# Where weights are compared: at 64 px the innermost group norm sees two numbers and gradients are rounding noise.
EXACT = ["model.size=128", "data.resolution=128"]
CLOSE = {"atol": 2e-4, "rtol": 0}  # 2 % of the learning rate: Adam divides float32's rounding by tiny gradients


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """One finished NeTI run, W&B offline and training samples included."""
    folder = tmp_path_factory.mktemp("run") / "neti"
    assert run(folder, "method=neti", "logger=wandb", "fit.sample_every=2") == 0
    return folder


def test_a_disk_too_small_is_named_before_training(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda folder: 10_000)
    assert run(tmp_path / "run", "method=neti", "stages=[fit,sample]") == 2
    told = capsys.readouterr().err
    assert "needs about" in told and "(checkpoints 13.5 MB, artifacts 2.99 MB, pictures 49.2 kB)" in told
    assert "10 kB are free there. Make room" in told and not list(tmp_path.rglob("*.ckpt"))
    monkeypatch.setattr(files, "free_bytes", lambda folder: 10**8)
    assert run(tmp_path / "run", "method=neti", "stages=[fit,sample]") == 0
    monkeypatch.setattr(files, "free_bytes", lambda folder: 9 * 10**6)  # with what is there already, it is enough
    assert run(tmp_path / "run", "method=neti", "stages=[fit]", "resume=auto", "fit.steps=4") == 0


def test_folder_holds_everything(finished) -> None:
    found = results(finished)
    assert found["status"] == "finished" and list(found["stages"]) == ["fit", "sample", "score", "summary"]
    assert found["stages"]["fit"]["steps"] == 3 and found["stages"]["sample"]["pictures"] == 4
    for name in (
        "config.yaml", "overrides.yaml", "environment.json", "metrics.jsonl", "metrics.csv", "scores.jsonl",
        "report.html", "run.log", "artifacts/cats.safetensors", "artifacts/README.md", "artifacts/cats/mapper-final.pt",
        "checkpoints/step-000003.ckpt", "samples/samples.jsonl", "samples/cats/01_1.png", "grids/cats.png",
        "grids/train-000002.png",
    ):  # fmt: skip
        assert (finished / name).is_file(), name
    assert list((finished / "wandb").glob("offline-run-*/*.wandb")), "the offline W&B run"
    assert yaml.safe_load((finished / "config.yaml").read_text())["method"]["sigma_t"] == 0.03
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["git"] and "torch" in json.dumps(environment)


def test_notes_say_what_is_not_real(finished) -> None:
    page = (finished / "report.html").read_text()
    for note in ("random weights", "UNTRAINED"):
        assert any(note in line for line in results(finished)["notes"]), note
        assert note in page


def test_metrics_have_one_line_per_step(finished) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 3 and all(0 < loss < 10 for loss in losses)


def test_checkpoint_is_small_and_plain(finished) -> None:
    path = finished / "checkpoints" / "step-000003.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert not any(key.startswith("model.") for key in checkpoint["state_dict"])
    own = sum(value.numel() * 4 for value in checkpoint["state_dict"].values())
    assert path.stat().st_size < 4 * own, "weights and two Adam moments, no frozen stack"


def test_pictures_say_what_they_show(finished) -> None:
    record = json.loads((finished / "samples" / "samples.jsonl").read_text().splitlines()[0])
    with Image.open(finished / record["path"]) as picture:
        assert picture.size == (64, 64) and picture.text["prompt"] == record["text"]
    assert "<cats>" in record["text"] and record["word"] == "cat"


def test_stages_alone_on_an_earlier_run(finished, capsys) -> None:
    before = (finished / "samples" / "cats" / "00_0.png").stat().st_mtime_ns
    weights = load_file(finished / "artifacts" / "cats.safetensors")
    assert main(["stages=[sample,score,summary]", f"run_dir='{finished}'", "method.truncation=[16,null]"]) == 0
    found = results(finished)
    assert found["stages"]["sample"]["pictures"] == 8 and found["stages"]["fit"]["steps"] == 3
    assert (finished / "samples" / "cats" / "00_0_truncation-16.png").is_file()
    assert (finished / "samples" / "cats" / "00_0.png").stat().st_mtime_ns == before, "drawn before, kept"
    assert {row["variant"] for row in found["scores"]} == {"", "truncation=16"}
    after = load_file(finished / "artifacts" / "cats.safetensors")
    assert all(torch.equal(weights[key], after[key]) for key in weights)


def test_finished_run_is_left_alone(finished, capsys) -> None:
    before = results(finished)
    assert run(finished, "method=neti", "logger=wandb", "fit.sample_every=2", "resume=auto") == 0
    assert "is finished; nothing to do" in capsys.readouterr().out
    assert results(finished) == before


def test_training_over_an_earlier_run_is_refused(finished, capsys) -> None:
    assert run(finished, "method=neti") == 2
    assert "already holds training up to step 3. Add resume=auto" in capsys.readouterr().err


def test_resume_under_other_settings_is_refused(finished, capsys) -> None:
    assert run(finished, "method=neti", "resume=auto", "fit.steps=5", "method.optimizer.lr=1", "seed=3") == 2
    error = capsys.readouterr().err
    assert "method.optimizer.lr (was 0.008, now 1)" in error and "seed (was 0, now 3)" in error
    assert "Traceback" not in error


def test_more_steps_go_on_from_the_last(finished) -> None:
    assert run(finished, "method=neti", "resume=auto", "fit.steps=4", "stages=[fit]", "logger=csv") == 0
    assert results(finished)["stages"]["fit"]["steps"] == 4
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [0, 1, 2, 3]


def test_several_concepts_at_once_equal_each_alone(tmp_path) -> None:
    """The whole run, not only the step: data order, flips, templates and artifacts of a concept are its own."""
    shared = ["method=ti", "stages=[fit]", *EXACT]
    assert run(tmp_path / "both", *shared, "data.concepts=[puppy,bunny]") == 0
    assert run(tmp_path / "one", *shared, "data.concepts=[bunny]") == 0
    both = load_file(tmp_path / "both" / "artifacts" / "bunny.safetensors")["vectors"]
    one = load_file(tmp_path / "one" / "artifacts" / "bunny.safetensors")["vectors"]
    torch.testing.assert_close(both, one, **CLOSE)
    assert (tmp_path / "both" / "artifacts" / "puppy.safetensors").is_file()


def test_artifact_of_another_tool_can_be_sampled(tmp_path) -> None:
    assert run(tmp_path / "a", "method=ti", "stages=[fit]") == 0
    file = tmp_path / "a" / "artifacts" / "cats" / "learned_embeds.safetensors"
    (tmp_path / "b").mkdir()
    assert run(tmp_path / "b", "method=ti", "stages=[sample]", f"artifact='{file}'") == 0
    (tmp_path / "c").mkdir()
    own = tmp_path / "a" / "artifacts" / "cats.safetensors"
    assert run(tmp_path / "c", "method=ti", "stages=[sample]", f"artifact='{own}'") == 0
    pictures = [(tmp_path / each / "samples" / "cats" / "00_0.png") for each in "bc"]
    assert Image.open(pictures[0]).tobytes() == Image.open(pictures[1]).tobytes()


def test_missing_judge_keeps_the_samples(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run(tmp_path / "run", "method=ti", "metric=neti") == 0
    found = results(tmp_path / "run")
    assert found["status"] == "finished" and found["stages"]["sample"]["pictures"] == 4
    assert any("Not scored" in line for line in found["score_messages"]) and found["scores"] == []
    assert (tmp_path / "run" / "report.html").is_file()
    assert main(["stages=[score,summary]", "metric=twin", f"run_dir='{tmp_path / 'run'}'"]) == 0, "scored later"
    assert results(tmp_path / "run")["scores"]


MISTAKES = {
    "broken picture": (["data=folder", "data.dir={photos}"], "broken.jpg"),
    "no pictures": (["data=folder", "data.dir={empty}"], "no picture"),
    "prompt without placeholder": (['data.prompts=["a cat on a boat"]'], "a cat on a boat"),
    "placeholder that is a word": (["data.placeholder=cat"], "already a word"),
    "class noun of several tokens": (["data.word=hippopotamuses"], "tokens"),
    "unknown cat": (["data.concepts=pupi"], "puppy"),
    "artifact that is not there": (["artifact=/nowhere/x.pt"], "does not exist"),
    "unknown scheduler": (["sampler.scheduler=DDIMSchedular"], "DDIMScheduler"),
    "batch of nothing": (["fit.batch_size=0"], "fit.batch_size=0: expected a whole number, 1 or more"),
    "number that is none": (["method.optimizer.lr=fast"], "method.optimizer.lr=fast: expected a number"),
    "seeds that are no list": (["sample.seeds=3"], "expected a list, e.g. sample.seeds=[0,1]"),
    "vectors out of range": (["method.num_vectors=100"], "Choose 1 to 60"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_without_traceback(name, tmp_path, capsys) -> None:
    overrides, expected = MISTAKES[name]
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "photos" / "good.png")
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"\xff\xd8\xff torn")
    filled = [each.format(photos=f"'{tmp_path / 'photos'}'", empty=f"'{tmp_path / 'empty'}'") for each in overrides]
    own = [each for each in SMALL if not (each.startswith("data.resolution") and "data=folder" in filled)]
    code = main([*own, "method=ti", f"run_dir='{tmp_path / 'run'}'", *filled])
    error = capsys.readouterr().err
    assert code == 2, error
    line = [each for each in error.splitlines() if each.startswith("hiperlab:")]
    assert len(line) == 1 and expected in error and "Traceback" not in error, error
    assert not (tmp_path / "run" / "artifacts").exists()


def test_real_photographs(tmp_path) -> None:
    """A folder of odd pictures: greyscale, transparent, portrait, 16 bit, with a hidden file among them."""
    folder = tmp_path / "My Cat 2"
    folder.mkdir()
    Image.new("L", (70, 50), 90).save(folder / "grey.png")
    Image.new("RGBA", (50, 90), (200, 30, 30, 128)).save(folder / "alpha.png")
    Image.new("I;16", (64, 64), 40000).save(folder / "deep.png")
    Image.new("CMYK", (64, 80), (10, 200, 30, 0)).save(folder / "print.jpg")
    (folder / ".DS_Store").write_bytes(b"\0\1")
    own = [each for each in SMALL if not each.startswith(("data.resolution", "data.max_views"))]
    assert main([*own, "method=xti", "data=folder", f"data.dir='{folder}'", "data.word=cat",
                 f"run_dir='{tmp_path / 'run'}'"]) == 0  # fmt: skip
    assert len(list((tmp_path / "run" / "artifacts").glob("*.safetensors"))) == 1


@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32"])
def test_precisions(precision, tmp_path) -> None:
    """The frozen parts in low precision, what is trained in float32, and a loss near float32's."""
    assert run(tmp_path / "low", "method=ti", f"precision={precision}", "stages=[fit]") == 0
    assert run(tmp_path / "full", "method=ti", "stages=[fit]") == 0
    trained = load_file(tmp_path / "low" / "artifacts" / "cats.safetensors")["vectors"]
    assert trained.dtype == torch.float32
    low, full = (results(tmp_path / each)["stages"]["fit"]["loss"] for each in ("low", "full"))
    assert abs(low - full) < 0.02 * full


def test_frozen_parts_take_the_asked_type(tmp_path) -> None:
    from hydra import compose, initialize_config_dir

    from hiperlab.run.session import Session

    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        cfg = compose("config", overrides=["model=tiny", "precision=bf16", "hydra/launcher=basic"])
    stack = Session(cfg, tmp_path).stack
    kinds = {part: {p.dtype for p in getattr(stack, part).parameters()} for part in ("unet", "vae", "text")}
    assert kinds == {"unet": {torch.bfloat16}, "vae": {torch.bfloat16}, "text": {torch.float32}}
    assert stack.alpha_bar.dtype == torch.float32


def test_out_of_memory_halves_the_micro_batch(tmp_path, monkeypatch) -> None:
    """Injected: the first attempt with 4 rows fails; the same batch in two halves gives the same weights."""
    from hiperlab.method.ti import TextualInversion

    original = TextualInversion.training_step

    def greedy(self, batch, index):
        if len(batch.prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return original(self, batch, index)

    shared = ["method=ti", "stages=[fit]", "fit.batch_size=4", *EXACT]
    assert run(tmp_path / "whole", *shared) == 0
    monkeypatch.setattr(TextualInversion, "training_step", greedy)
    assert run(tmp_path / "halved", *shared) == 0
    assert results(tmp_path / "halved")["stages"]["fit"]["micro_batch_size"] == 2
    vectors = [load_file(tmp_path / each / "artifacts" / "cats.safetensors")["vectors"] for each in ("whole", "halved")]
    torch.testing.assert_close(*vectors, **CLOSE)


def test_concepts_that_do_not_fit_in_a_pass_go_one_by_one(tmp_path, monkeypatch) -> None:
    """One picture of each is too much: nothing is left to halve but the number of concepts."""
    from hiperlab.method.ti import TextualInversion

    original = TextualInversion.training_step

    def greedy(self, batch, index):
        if len(batch.prompts) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return original(self, batch, index)

    shared = ["method=ti", "stages=[fit]", "fit.batch_size=2", "data.concepts=[puppy,bunny]", *EXACT]
    assert run(tmp_path / "whole", *shared) == 0
    monkeypatch.setattr(TextualInversion, "training_step", greedy)
    assert run(tmp_path / "split", *shared) == 0
    assert "out of memory with 2 concepts in a pass: they go one by one" in (tmp_path / "split" / "run.log").read_text()
    for name in ("puppy", "bunny"):
        vectors = [
            load_file(tmp_path / run / "artifacts" / f"{name}.safetensors")["vectors"] for run in ("whole", "split")
        ]
        torch.testing.assert_close(*vectors, **CLOSE)
    assert run(tmp_path / "split", *shared, "resume=auto", "fit.steps=4") == 0, "it goes on as it went"
    assert len(list((tmp_path / "split" / "checkpoints").glob("*/step-000004.ckpt"))) == 2


def test_a_method_that_cannot_stack_goes_one_by_one(tmp_path, monkeypatch) -> None:
    from hiperlab.method.ti import TextualInversion

    monkeypatch.setattr(TextualInversion, "stacks_concepts", False)
    assert run(tmp_path / "run", "method=ti", "data.concepts=[puppy,bunny]", *EXACT) == 0
    assert {path.name for path in (tmp_path / "run" / "artifacts").glob("*.safetensors")} == {
        "puppy.safetensors", "bunny.safetensors",
    }  # fmt: skip
    for concept in ("puppy", "bunny"):
        lines = (tmp_path / "run" / "concepts" / concept / "metrics.jsonl").read_text().splitlines()
        assert sum('"loss"' in line for line in lines) == 3
        assert concept in (tmp_path / "run" / "artifacts" / "README.md").read_text()
    assert (tmp_path / "run" / "report.html").read_text().count("running mean") == 2
    monkeypatch.undo()
    assert run(tmp_path / "stacked", "method=ti", "data.concepts=[puppy,bunny]", "stages=[fit]", *EXACT) == 0
    alone, stacked = (
        load_file(tmp_path / each / "artifacts" / "bunny.safetensors")["vectors"] for each in ("run", "stacked")
    )
    torch.testing.assert_close(alone, stacked, **CLOSE)


def test_a_learnt_word_in_the_negative_text_is_refused(tmp_path, capsys) -> None:
    assert main([*SMALL, "sample.negative='ugly <cats>'", f"run_dir='{tmp_path / 'run'}'"]) == 2
    assert "names the placeholder <cats>" in capsys.readouterr().err.strip().splitlines()[-1]


def test_weights_of_the_web_uis_are_said_to_be_letters(tmp_path, caplog) -> None:
    words = ["data.prompts=['a {} in (deep:1.4) snow']", "stages=[fit]", f"run_dir='{tmp_path / 'run'}'"]
    assert main([*SMALL, *words]) == 0
    assert "are read as letters: a {} in (deep:1.4) snow" in (tmp_path / "run" / "run.log").read_text()
