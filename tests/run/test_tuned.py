"""A model's own settings for each method: put in unless the command says otherwise, and said at the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from hiperlab.cli.model_defaults import apply, line
from hiperlab.errors import UserError
from hiperlab.run import main as door
from tests.composed import METHODS
from tests.run import bench

MINI = Path(__file__).parents[2] / "conf" / "model" / "mini.yaml"


def composed(capsys: Any, *words: str) -> dict[str, Any]:
    assert door.main(["--cfg", "job", *words]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_the_models_settings_stand_in_for_the_published_ones(capsys) -> None:
    mine, published = composed(capsys, "method=lora"), composed(capsys, "method=lora", "defaults=published")
    assert published["fit"]["steps"] == 500 and published["tuned"] == {}
    assert published["method"]["optimizer"]["lr"] == 1e-4 and published["sampler"]["guidance"] == 7.5
    table = yaml.safe_load(MINI.read_text())["tuned"]
    wanted = {**table["default"], **table.get("lora", {})}
    assert mine["tuned"] and set(mine["tuned"]) <= set(wanted)
    for key, each in mine["tuned"].items():
        assert OmegaConf.select(OmegaConf.create(mine), key) == each["used"] == wanted[key]
        assert OmegaConf.select(OmegaConf.create(published), key) == each["published"]


def test_what_the_command_says_stays(capsys) -> None:
    asked = composed(capsys, "method=ti", "fit.steps=7", "sampler=dpmsolver", "sampler.guidance=2")
    assert asked["fit"]["steps"] == 7 and asked["sampler"]["guidance"] == 2
    assert "fit.steps" not in asked["tuned"] and "sampler.guidance" not in asked["tuned"]


def test_other_models_and_experiments_keep_theirs(capsys) -> None:
    assert composed(capsys, "method=ti", "model=tiny")["tuned"] == {}
    assert composed(capsys, "experiment=e4t_pretrain", "model=mini", "data=world_domain")["tuned"] == {}


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_of_the_table_exists(method, capsys) -> None:
    composed(capsys, f"method={method}")  # a setting that a method does not have is refused
    assert set(yaml.safe_load(MINI.read_text())["tuned"]) <= {"default", *METHODS}


def test_it_is_said_in_one_line_and_mistakes_are_named() -> None:
    choices = {"method": "ti", "model": "mini", "experiment": None}
    base = {"hydra": {"runtime": {"choices": choices}}, "defaults_from": "model", "fit": {"steps": 500}, "lr": 0.1}
    cfg = OmegaConf.create({**base, "tuned": {"default": {"lr": 0.2}, "ti": {"fit.steps": 3, "lr": 0.1}}})
    apply(cfg, ["method=ti"])
    assert cfg.fit.steps == 3 and line(cfg, "mini") == "mini: fit.steps 3 (published 500); defaults=published for those"
    assert line(OmegaConf.create({"tuned": {}}), "mini") == ""
    for changes, said in (
        ({"tuned": {"ti": {"fit.stepz": 3}}}, "tuned.ti: fit.stepz is no setting of method=ti"),
        ({"tuned": {}, "defaults_from": "nobody"}, "defaults_from=nobody: expected model"),
    ):
        with pytest.raises(UserError, match=said):
            apply(OmegaConf.create({**base, **changes}), [])


def test_the_line_is_printed_before_the_run(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv(door.JOB, "tests.run.bench:job")
    monkeypatch.chdir(tmp_path)
    assert bench.job
    assert door.main(["method=ti", "run_dir=run"]) == 0
    assert "hiperlab: mini: fit.steps 300 (published 5000)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["pie_bench", "editors"])
def test_an_experiment_that_compares_methods_sets_each(name, capsys) -> None:
    """Its table names methods and settings that exist; the command line wins."""
    path = MINI.parents[1] / "experiment" / f"{name}.yaml"
    table = yaml.safe_load(path.read_text())["per_method"]
    swept = yaml.safe_load(path.read_text())["hydra"]["sweeper"]["params"]["method"].split(",")
    assert set(table) <= {"default", *swept} and set(swept) <= set(METHODS)
    for method in swept:
        words = [f"experiment={name}", f"method={method}", "model=tiny", "hydra.mode=RUN"]
        words += ["data.dir=tests"] if name == "pie_bench" else []
        asked = composed(capsys, *words)
        for key, value in {**table["default"], **table.get(method, {})}.items():
            assert OmegaConf.select(OmegaConf.create(asked), key) == value
    asked = composed(capsys, *words, "sampler.guidance=1.5")
    assert asked["sampler"]["guidance"] == 1.5
    assert composed(capsys, *words, "defaults=published")["tuned"] == {}


def test_an_experiment_may_take_the_models_table(capsys) -> None:
    """base: model; another model has none, and defaults=published still holds."""
    words, table = ["experiment=ledger", "hydra.mode=RUN"], yaml.safe_load(MINI.read_text())["tuned"]
    for method in ("ti", "neti", "lora"):
        known = {**table["default"], **table.get(method, {})}
        asked = OmegaConf.create(composed(capsys, *words, f"method={method}"))
        for key, value in known.items():
            assert OmegaConf.select(asked, key) == value, (method, key)
        assert asked.tuned
    assert composed(capsys, *words, "defaults=published")["tuned"] == {}
    assert composed(capsys, *words, "model=tiny")["tuned"] == {}


def test_what_an_experiment_puts_in_is_not_refused_as_unread(capsys, tmp_path) -> None:
    """Only what the command itself gives is."""
    words = ["experiment=pie_bench", "method=proximal_guidance", "model=tiny", "hydra.mode=RUN", "logger=csv"]
    words += [f"run_dir='{tmp_path / 'run'}'", "data.dir=nowhere", "method.attention=masactrl"]
    assert composed(capsys, *words)["method"]["p2p"]["mode"] == "refine"
    assert door.main(words) == 2
    assert "data.dir=nowhere does not exist" in capsys.readouterr().err
    assert door.main([*words, "method.p2p.tau_c=0.1"]) == 2
    assert "method.p2p.tau_c=0.1 is read with method.attention=p2p only" in capsys.readouterr().err
