"""Settings of the measurement that differ between compared groups are named, with their values, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hiperlab.compare import page, tables
from hiperlab.compare.conditions import unlike
from hiperlab.compare.labels import Contender
from hiperlab.compare.main import main
from hiperlab.compare.runs import find, read
from hiperlab.compare.summary import summarise
from tests.compare.folders import CONFIG, run

SAYS = "Not measured alike, so that a difference may come from this: "


def pair(root: Path, config: dict, asked: tuple[str, ...] = ()) -> str:
    """What is said of two methods, of which one has another config."""
    run(root / "a", "ti", {"clip": 0.5}, pictures=False)
    run(root / "b", "neti", {"clip": 0.6}, pictures=False, config=config, asked=asked)
    return read(find([root])).unlike


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, ""),
        ({"sampler": {**CONFIG["sampler"], "steps": 50}}, "sampler.steps: 25 (ti), 50 (neti)."),
        ({"sampler": {**CONFIG["sampler"], "guidance": 7.5}}, "sampler.guidance: 4 (ti), 7.5 (neti)."),
        ({"sample": {"seeds": [0, 1], "batch_size": 8}}, "sample.seeds: [0] (ti), [0,1] (neti)."),
        ({"sample": {"seeds": [0], "batch_size": 2}}, ""),
        ({"sample": {"seeds": [0], "negative": "ugly, low res"}}, ""),
        ({"precision": {"unet": "bf16", "vae": "bf16"}}, "precision.unet, precision.vae: float32 (ti), bf16 (neti)."),
        ({"model": {"name": "mini", "path": "other", "note": "m"}}, "model.path: mini (ti), other (neti)."),
        ({"fit": {"steps": 5}, "method": {"rank": 3}}, ""),
    ],
)
def test_what_differs_is_named_with_its_values(tmp_path, config, expected) -> None:
    assert pair(tmp_path, config).removeprefix(SAYS) == expected


def test_size_and_prompts_of_the_same_data_are_named(tmp_path) -> None:
    for name, data in (("ti", {"resolution": 128, "prompts": None}), ("neti", {"resolution": 64, "prompts": "own"})):
        run(tmp_path / name, name, {"clip": 0.5}, config={"data": {**data, "word": name}})
    assert read(find([tmp_path])).unlike.removeprefix(SAYS) == (
        "data.resolution: 64 (neti), 128 (ti); data.prompts: own (neti), null (ti)."
    )


def test_settings_of_several_data_sets_are_compared_within_each(tmp_path) -> None:
    for method, own in (("ti", 128), ("neti", 64)):
        for data, size in (("cats", 512), ("dogs", own)):
            run(tmp_path / method / data, method, {"clip": 0.5}, data=data, config={"data": {"resolution": size}})
    run(tmp_path / "lora", "lora", {"clip": 0.5}, data="cats", config={"data": {"resolution": 512}})
    assert read(find([tmp_path])).unlike.removeprefix(SAYS) == "data.resolution of dogs: 64 (neti), 128 (ti)."


def test_what_every_name_shows_is_not_said_again(tmp_path) -> None:
    for method in ("ti", "neti"):
        for steps in (25, 50):
            config = {"sampler": {"scheduler": "DDIMScheduler", "steps": steps, "guidance": 4.0}}
            run(tmp_path / f"{method}{steps}", method, {"clip": 0.5}, asked=[f"sampler.steps={steps}"], config=config)
    found = read(find([tmp_path]))
    assert "ti sampler.steps=50" in found.names and not found.unlike
    run(tmp_path / "lora", "lora", {"clip": 0.5}, config={"sampler": {"steps": 100}})
    assert "sampler.steps: 100 (lora), 25 (neti sampler.steps=25, ti sampler.steps=25), 50 (" in (
        read(find([tmp_path])).unlike
    )
    for name, settings in (("a", ()), ("b", (("sampler", "pndm"),))):  # a group's member shows all settings of it
        both = [(Contender(m, settings, ""), [("d", {"sampler.steps": m})]) for m in ("1", "2")]
        assert bool(unlike(both)) == (name == "a")


def test_other_weights_of_one_models_name_are_named(tmp_path) -> None:
    """Concept files say which embedding they live in; runs without any are of unknown weights."""
    for name, norm in (("ti", 0.2), ("neti", 0.2), ("lora", 0.3), ("hiper", None)):
        folder = run(tmp_path / name, name, {"clip": 0.5})
        (folder / "artifacts").mkdir()
        base = {"base": json.dumps({"name": "mini", "fingerprint": [norm, 0.1]})} if norm else {"base": "[]"}
        save_file({"x": np.zeros(1, np.float32)}, folder / "artifacts" / "a.safetensors", base)
    said = read(find([tmp_path])).unlike
    assert said.startswith(f"{SAYS}model weights: ") and "(lora), " in said and "hiper" not in said
    (tmp_path / "lora" / "artifacts" / "a.safetensors").write_bytes(b"torn")
    assert not read(find([tmp_path])).unlike


def test_runs_of_one_name_that_were_measured_in_two_ways_are_named(tmp_path) -> None:
    """A default that changed between them is in no name; they are averaged."""
    for number, steps in enumerate((25, 50)):
        run(tmp_path / str(steps), "ti", {"clip": 0.5}, training_seed=number, config={"sampler": {"steps": steps}})
    assert read(find([tmp_path])).unlike == f"{SAYS}sampler.steps: 25 and 50 (ti)."


def test_without_a_config_only_overrides_are_known_and_that_is_said(tmp_path) -> None:
    for name, asked in (("ti", ["sampler.steps=25", "fit.steps=7"]), ("neti", ["sampler.steps=50"])):
        run(tmp_path / name, name, {"clip": 0.5}, asked=asked)
    for text in ("", "- 1", "a: ["):
        for name in ("ti", "neti"):
            (tmp_path / name / "config.yaml").write_text(text)
        found = read(find([tmp_path]))
        assert found.unlike == f"{SAYS}sampler.steps: 50 (neti), 25 (ti)."
        assert any("keep no config.yaml" in note for note in found.notes)


def test_it_is_the_first_line_everywhere(tmp_path, capsys) -> None:
    said = pair(tmp_path, {"sampler": {**CONFIG["sampler"], "steps": 50}})
    found = summarise(read(find([tmp_path])))
    assert found.notes[0] == said and tables.document(found)["notes"][0] == said
    assert page.write(found, [], tmp_path, "none").split("<li>")[1].startswith(said)
    assert tables.markdown(found).split("> ")[1].startswith("Not measured alike")
    assert tables.escape_latex(said) in tables.latex(found)
    assert main([str(tmp_path), "--pictures", "none"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == said and out.count("Not measured alike") == 1


def test_most_have_one_value(tmp_path) -> None:
    groups = [(Contender(m, (), ""), [("d", {"sample.negative": "ugly, low res" * (m == "e")})]) for m in "abcde"]
    assert unlike(groups) == f'{SAYS}sample.negative: "ugly, low res" (e), "" (the 4 others).'
    long = [(Contender(m, (), ""), [("d", {"sample.negative": f"{'a ' * 60}{m} {'b ' * 60}"})]) for m in "xy"]
    assert " x " in unlike(long) and " y " in unlike(long) and len(unlike(long)) < 300


def test_an_absent_negative_is_an_empty_one(tmp_path) -> None:
    sample = {"seeds": [0], "batch_size": 8}
    for name, negative in (("ti", None), ("lora", "")):
        run(tmp_path / name, name, {"identity": 0.5}, config={"sample": {**sample, "negative": negative}})
    assert read(find([tmp_path])).unlike == ""
    run(tmp_path / "neti", "neti", {"identity": 0.5}, config={"sample": {**sample, "negative": "blurry"}})
    assert "blurry" in read(find([tmp_path])).unlike
