"""`artifacts=[…]` through the door: concepts kept by different runs and methods in one picture, scored for each."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hiperlab.base import artifact
from hiperlab.run.main import main

SMALL = [
    "model=tiny", "model.size=64", "data.resolution=64", "logger=csv", "trainer=cpu", "fit.steps=1", "fit.batch_size=1",
    "fit.sample_every=0", "sampler.steps=1", "sample.seeds=[0,1]",
]  # fmt: skip
TEXTS = 'sample.texts=["a photo of <cats> next to <puppy>","a photo of <puppy>"]'
BOTH = "data.concepts=[cats,puppy]"
AGAIN = ["data=cats", "stages=[sample,score,summary]"]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("together")


@pytest.fixture(scope="module")
def kept(outputs) -> tuple[Path, Path]:
    """A cat as a word, a puppy as weights."""
    for name, data, changes in (("ti", "cats", []), ("lora", "puppy", ["method.identifier=sks"])):
        folder = outputs / name
        assert main([*SMALL, f"method={name}", f"data={data}", *changes, "stages=[fit]", f"run_dir='{folder}'"]) == 0
    return outputs / "ti/artifacts/cats.safetensors", outputs / "lora/artifacts/puppy.safetensors"


def given(*paths: Path) -> str:
    return f"artifacts=[{','.join(map(str, paths))}]"


def test_two_concepts_in_one_picture(kept, outputs) -> None:
    folder = outputs / "both"
    assert main([*SMALL, *AGAIN, BOTH, given(*kept), TEXTS, f"run_dir='{folder}'"]) == 0
    assert len(list((folder / "samples/cats-puppy").glob("*.png"))) == 4
    records = [json.loads(line) for line in (folder / "samples/samples.jsonl").read_text().splitlines()]
    assert [(r["concept"], r["path"][-8:]) for r in records] == [
        ("cats", "00_0.png"), ("puppy", "00_0.png"), ("cats", "00_1.png"), ("puppy", "00_1.png"),
        ("puppy", "01_0.png"), ("puppy", "01_1.png"),
    ]  # fmt: skip
    results = json.loads((folder / "results.json").read_text())
    assert results["method"] == "ti+lora" and results["concepts"] == ["cats", "puppy"]
    assert results["status"] == "finished" and results["stages"]["sample"]["pictures"] == 4
    assert {row["concept"] for row in results["scores"]} == {"cats", "puppy", ""}
    assert (folder / "grids/cats-puppy.png").is_file() and (folder / "report.html").is_file()
    first = folder / "samples/cats-puppy/00_0.png"
    with Image.open(first) as picture:
        assert picture.text["prompt"] == "a photo of <cats> next to <puppy>"
    stamp = first.stat().st_mtime_ns
    assert main([f"run_dir='{folder}'", "stages=[sample]"]) == 0
    assert first.stat().st_mtime_ns == stamp, "pictures already there are kept"


def test_no_earlier_run_is_needed_and_data_may_lack_a_concept(kept, outputs, caplog) -> None:
    where = ["data=puppy", f"outputs_dir='{outputs / 'new'}'", TEXTS, "sample.seeds=[0]"]
    assert main([*SMALL, *where, "stages=[sample,score]", given(*kept)]) == 0
    (folder,) = (outputs / "new/together_puppy_tiny").iterdir()
    rows = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    assert {row["concept"] for row in rows} == {"puppy"}
    assert "cats: no such concept in the data" in (folder / "run.log").read_text()


REFUSED = {
    "no texts": ([], "sample.texts must be a list of what to draw, e.g.*a photo of <cats> next to <puppy>"),
    "text without a concept": (['sample.texts=["a cat"]'], "'a cat' names none of <cats>, <puppy>"),
    "training": ([TEXTS, "stages=[fit,sample]"], "draws kept concepts"),
    "another base": ([TEXTS, "model.seed=1"], "was made for base"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(kept, tmp_path, capsys, case) -> None:
    changes, message = REFUSED[case]
    assert main([*SMALL, *AGAIN, BOTH, given(*kept), f"run_dir='{tmp_path / 'run'}'", *changes]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hiperlab: ")]
    assert len(said) == 1 and re.search(message, said[0]), said


def test_files_that_cannot_be_used(kept, tmp_path, capsys) -> None:
    base = [*SMALL, *AGAIN, BOTH, TEXTS, f"run_dir='{tmp_path / 'run'}'"]
    for files, message in (
        ((kept[0], kept[0]), "two artifacts are of a concept 'cats'"),
        ((kept[0], tmp_path / "absent.safetensors"), "does not exist"),
        ((kept[0].parent / "cats/learned_embeds.safetensors", kept[1]), "is another tool's"),
    ):
        assert main([*base, given(*files)]) == 2
        assert message in capsys.readouterr().err
    assert main([*SMALL, "data=cats", TEXTS, f"run_dir='{tmp_path / 'other'}'"]) == 2
    assert "sample.texts goes with artifacts=" in capsys.readouterr().err


def rewritten(good: Path, bad: Path, settings: dict[str, Any]) -> None:
    """An artifact with other settings and a checksum that fits."""
    with safe_open(good, "pt") as file:
        metadata = {**file.metadata(), "settings": json.dumps(settings)}
    tensors = load_file(good)
    save_file(tensors, bad, {**metadata, artifact.CHECKSUM: artifact._checksum(tensors, metadata)})


def test_a_file_writes_nothing_and_chooses_no_folder(kept, tmp_path, capsys) -> None:
    """Its optimizer is not even looked at, other values must be of a method's kind, and its cache is not used."""
    with safe_open(kept[0], "pt") as file:
        metadata = file.metadata()
    victim, bad = tmp_path / "victim", tmp_path / "bad.safetensors"
    evil = {"_target_": "hiperlab.files.atomic_write", "path": str(victim), "content": "owned"}
    command = [*SMALL, *AGAIN, BOTH, TEXTS, given(bad, kept[1]), f"run_dir='{tmp_path / 'run'}'"]
    for key, code in (("optimizer", 0), ("prior", 2), ("num_vectors", 2)):
        settings = {**json.loads(metadata["settings"]), key: evil}
        rewritten(kept[0], bad, settings)
        assert main(command) == code, key
        assert not victim.exists(), key
    assert f"method.{key}._target_=hiperlab.files.atomic_write is not allowed" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["os.system", "hiperlab.model.tiny.tiny"])
def test_a_file_starts_nothing_but_a_method(kept, tmp_path, capsys, target) -> None:
    with safe_open(kept[0], "pt") as file:
        metadata = file.metadata()
    settings = {**json.loads(metadata["settings"]), "_target_": target}
    bad = tmp_path / "bad.safetensors"
    rewritten(kept[0], bad, settings)
    assert main([*SMALL, *AGAIN, BOTH, TEXTS, given(bad, kept[1]), f"run_dir='{tmp_path / 'run'}'"]) == 2
    assert re.search(r"is not allowed|is no method here", capsys.readouterr().err)
