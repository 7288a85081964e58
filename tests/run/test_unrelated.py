"""Pictures of other things: the frozen model's beside what a method makes of them, drawn once and kept by content."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf
from PIL import Image

from hiperlab import files
from hiperlab.base.capability import EditsPicture
from hiperlab.errors import UserError
from hiperlab.model.sampler import ddim
from hiperlab.run import unrelated
from hiperlab.run.unrelated import is_unchanged, read_unrelated
from tests.composed import METHODS, SUBJECTS, config, kept
from tests.run.test_run import results, run

WORDS = ("ti", "xti", "dti", "neti", "cross_initialization")  # embeddings: the model and other texts stay as they are
DRIFT = [
    "+metric.members.drift={_target_: hiperlab.metric.drift.DriftScore, encoder: clip}", "sample.unrelated=2",
    "sample.prompts=1", "sample.seeds=[0]", "stages=[fit,sample,score]",
]  # fmt: skip
CONCEPT_METHODS = [
    name
    for name in METHODS
    if not issubclass(get_class(config(name).method._target_), EditsPicture) and name != "copier"
]


@pytest.mark.parametrize("name", CONCEPT_METHODS)
def test_embeddings_leave_other_texts_alone_and_weights_do_not(name, stack) -> None:
    """With numbers as after a training; what is drawn says the same, bit for bit or not at all."""
    method = kept(name, stack, SUBJECTS[0], size=0.2).eval()
    sampler = ddim(2, 7.5)
    same = is_unchanged(method, 0, "a photo of a train", method.variants[0], "", sampler)
    assert same == (name in WORDS)
    assert not is_unchanged(method, 0, "a <my-cat>", method.variants[0], "", sampler), "its own word is not unrelated"


def scores(folder: Path) -> list[float]:
    rows = files.read_jsonl(folder / "scores.jsonl")
    return [row["value"] for row in rows if row["metric"] == "drift"]


def test_a_words_drift_is_exactly_zero_and_a_weights_is_not(tmp_path, monkeypatch) -> None:
    shared = f"outputs_dir='{tmp_path}'"
    assert run(tmp_path / "neti", "method=neti", shared, *DRIFT) == 0
    records = read_unrelated(tmp_path / "neti")
    assert [record["path"] == record["frozen"] for record in records] == [True, True]
    assert scores(tmp_path / "neti") == [0.0, 0.0] and results(tmp_path / "neti")["stages"]["sample"]["unrelated"] == 2
    assert not list((tmp_path / "neti" / "unrelated" / "cats").glob("*"))
    assert len(list((tmp_path / unrelated.CACHE).iterdir())) == 2

    def fail(*args, **how):
        raise AssertionError("the frozen model's pictures are there already")

    with monkeypatch.context() as patch:
        patch.setattr(unrelated, "draw_plain", fail)
        assert run(tmp_path / "lora", "method=lora", shared, "method.optimizer.lr=0.05", *DRIFT) == 0
    records = read_unrelated(tmp_path / "lora")
    assert [record["path"] for record in records] == ["unrelated/cats/00_0.png", "unrelated/cats/01_0.png"]
    assert all(value > 0 for value in scores(tmp_path / "lora")) and len(scores(tmp_path / "lora")) == 2
    for record in records:
        assert (tmp_path / "lora" / record["frozen"]).read_bytes() == (
            tmp_path / "neti" / record["frozen"]
        ).read_bytes()
        assert record["concept"] == "cats" and "cat" not in record["text"] and record["word"] == "cat"
    assert all(line["metric"] != "drift" or line["n"] == 2 for line in results(tmp_path / "lora")["scores"])


def test_a_kept_picture_belongs_to_everything_it_was_made_of(tmp_path) -> None:
    """Another sampler draws anew, a damaged or foreign file in the cache is not believed, and 0 leaves no old list."""
    base, shared = tmp_path / "run", f"outputs_dir='{tmp_path}'"
    assert run(base, "method=ti", shared, *DRIFT) == 0
    first = {record["key"]: (base / record["frozen"]).read_bytes() for record in read_unrelated(base)}
    one, other = sorted(first)
    cache = tmp_path / unrelated.CACHE
    (cache / f"{one}.png").write_bytes(b"damaged")
    (cache / f"{other}.png").write_bytes(first[one])  # a whole picture under another's name
    assert run(tmp_path / "second", "method=ti", shared, *DRIFT) == 0
    for key, content in first.items():
        assert (tmp_path / "second" / "unrelated" / "_frozen" / f"{key}.png").read_bytes() == content
        assert (cache / f"{key}.png").read_bytes() == content, "mended"
    again = ["method=ti", shared, *DRIFT[:-1], "stages=[sample,score]"]
    assert run(base, *again, "sampler.guidance=2") == 0
    assert not {record["key"] for record in read_unrelated(base)} & set(first)
    assert run(base, *again, "sample.unrelated=0") == 0
    assert read_unrelated(base) == [] and scores(base) == []


def test_the_frozen_pictures_are_the_frozen_models(tmp_path, stack) -> None:
    """As a concept method that was never trained draws the same plain text."""
    assert run(tmp_path / "run", "method=ti", f"outputs_dir='{tmp_path}'", "model.size=128", *DRIFT) == 0
    record = read_unrelated(tmp_path / "run")[0]
    method = kept("ti", stack, SUBJECTS[0])
    drawn = method.sample([record["text"]], [record["seed"]], steps=2, guidance=7.5)[0]
    with Image.open(tmp_path / "run" / record["frozen"]) as picture:
        there = torch.tensor(list(picture.convert("RGB").getdata())).view(128, 128, 3).permute(2, 0, 1)
    assert ((drawn * 255).round() - there).abs().max() <= 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["sample.unrelated=99"], "sample.unrelated=99: there are 13 texts for cats"),
        (["sample.unrelated=-1"], "sample.unrelated=-1: expected a whole number, 0 or more"),
    ],
)
def test_mistakes_are_told_before_training(changes, said, tmp_path, capsys) -> None:
    assert run(tmp_path / "run", "method=ti", *changes) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.rglob("*.ckpt"))


def test_an_editing_method_says_why_it_has_none(tmp_path) -> None:
    assert run(tmp_path / "run", "method=ddim_inversion", "fit.steps=0", "method.cache=null", *DRIFT) == 0
    log = (tmp_path / "run" / "run.log").read_text()
    assert "sample.unrelated: none are drawn, as DDIMInversion edits one picture and draws nothing else." in log
    assert read_unrelated(tmp_path / "run") == []


def test_kept_concepts_drawn_together_have_none() -> None:
    cfg = OmegaConf.create({"sample": {"unrelated": 2}, "stages": ["sample"]})
    asked = SimpleNamespace(cfg=cfg, kept=["one"])
    with pytest.raises(UserError, match=r"leave it away where artifacts=\[…\] are drawn"):
        unrelated.check_unrelated(asked)  # type: ignore[arg-type]
