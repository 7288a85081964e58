"""What is read of run folders: names, columns, what is left out and what is refused."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hiperlab.compare.labels import shortened
from hiperlab.compare.runs import Subject, find, read
from hiperlab.compare.statistics import mean, paired
from hiperlab.errors import UserError
from tests.compare.folders import PROMPTS, STAMP, change, run, write_lines


def test_folders_are_found_at_any_depth_and_once(tmp_path) -> None:
    run(tmp_path / "sweeps" / "one" / "a", "ti", {"clip": 0.1})
    run(tmp_path / "sweeps" / "two" / "b", "ti", {"clip": 0.1})
    (tmp_path / "sweeps" / ".jobs" / "x").mkdir(parents=True)
    (tmp_path / "sweeps" / ".jobs" / "x" / "results.json").write_text("{}")
    names = [path.name for path in find([tmp_path / "sweeps", tmp_path / "sweeps" / "one" / "a", tmp_path])]
    assert names == ["a", "b"]
    with pytest.raises(UserError, match="Did you mean sweeps"):
        find([tmp_path / "sweps"])


def test_names_are_methods_and_the_settings_that_differ(tmp_path) -> None:
    folders = [
        run(tmp_path / "a", "peft", {"clip": 0.1}, asked=["method.tuner=oft", "seed=1", "fit.sample_every=0"]),
        run(tmp_path / "b", "peft", {"clip": 0.1}, asked=["method.tuner=lora", "seed=0", "sample.seeds=[0,1]"]),
        run(tmp_path / "c", "ti", {"clip": 0.1}, asked=["method.optimizer.lr=3e-3", "logger=csv"]),
        run(tmp_path / "d", "ti", {"clip": 0.1}, asked=["method.optimizer.lr=0.003"], data="dogs", training_seed=1),
        run(tmp_path / "e", "neti", {"clip": 0.1}, variant="truncation=16"),
    ]
    (folders[2] / "overrides.yaml").write_text("- method=ti\n- data=cats\n")  # not asked, so that the default counts
    (folders[2] / "config.yaml").write_text("method: {optimizer: {lr: 3.0e-3}}\n")
    found = read(folders)
    assert found.names == ["peft method.tuner=lora", "peft method.tuner=oft", "ti", "neti truncation=16"]
    assert found.subjects == [Subject("cats", "cats"), Subject("dogs", "cats")]
    assert not found.notes


def test_settings_that_are_numbers_are_in_their_order(tmp_path) -> None:
    rates = ("1e-2", "9e-5", "3e-3", "null")
    folders = [run(tmp_path / r, "ti", {"clip": 0.1}, asked=[f"method.optimizer.lr={r}"]) for r in rates]
    assert [name.rpartition("=")[2] for name in read(folders).names] == ["9e-05", "0.003", "0.01", "null"]


def test_columns_hold_every_number_and_its_keys(tmp_path) -> None:
    scores = {"clip": 0.1, "truth_distance": 0.5}
    a = run(tmp_path / "a", "ti", scores, concepts=("x", "y"), seeds=(0, 7), training_seed=4)
    lines = [json.loads(line) for line in (a / "scores.jsonl").read_text().splitlines()]
    lines[0]["value"] = None
    more = {"concept": "x", "prompt": "", "seed": None, "picture": "", "metric": "clip", "variant": "", **STAMP}
    lines.append({**more, "kind": "ceiling", "value": 0.9})
    lines.append({**more, "kind": "copy", "value": 0.8})
    lines.append({**more, "kind": "picture", "role": "source", "value": 5.0})
    write_lines(a / "scores.jsonl", lines)
    found = read([a])
    assert [(each.name, each.lower_is_better) for each in found.metrics] == [("clip", False), ("truth_distance", True)]
    values = found.values(0, 0)
    assert len(values.value) == 2 * len(PROMPTS) * 2 and math.isnan(values.value[0])
    assert set(values.training) == {4} and set(values.seed) == {0, 7}
    assert values.value[1] == pytest.approx(0.11) and found.prompts[values.prompt[1]] == PROMPTS[0]
    assert found.ceilings == {(0, 0): 0.9}
    assert len(found.pictures) == 12 and found.pictures[1].seed == 7
    cost = found.runs[0].cost
    assert cost["train_seconds"] == 12.5 and cost["trained_parameters"] == 768 and cost["peak_memory"] == 1e9


def test_pairs_over_runs_share_training_seeds(tmp_path) -> None:
    folders = [
        run(tmp_path / f"{method}{seed}", method, {"clip": value + seed}, training_seed=seed, spread=0.0)
        for method, value, seeds in (("ti", 0.5, (0, 1)), ("neti", 0.25, (1, 2)))
        for seed in seeds
    ]
    found = read(folders)
    difference = paired(found.values(0, 0), found.values(1, 0))
    assert difference and difference.difference == pytest.approx(0.25) and difference.num_pairs == len(PROMPTS)
    whole = mean(found.values(0, 0))
    assert whole and whole.mean == pytest.approx(1.0)


def test_damaged_and_unfinished_folders_are_named_and_left_out(tmp_path) -> None:
    good = run(tmp_path / "good", "ti", {"clip": 0.1})
    broken = {
        "torn": ("results.json", '{"status": "fin', "results.json is damaged"),
        "list": ("results.json", "[]", "no table of values"),
        "going": ("results.json", '{"status": "running"}', "status: running"),
        "unscored": ("scores.jsonl", "", "nothing was scored"),
        "cut": ("scores.jsonl", '{"concept": "x", "met', "scores.jsonl is damaged"),
        "text": ("scores.jsonl", '{"concept": "x", "metric": "m", "value": "high"}\n', "is no number"),
        "binary": ("scores.jsonl", "\0\0\0", "scores.jsonl is damaged"),
        "asked": ("overrides.yaml", "a: b", "not a list of overrides"),
    }
    for name, (file, text, _) in broken.items():
        run(tmp_path / name, "neti", {"clip": 0.1})
        (tmp_path / name / file).write_text(text)
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "overrides.yaml").write_text("- method=ti\n")
    found = read(find([tmp_path]))
    assert [each.folder for each in found.runs] == [good.resolve()] and found.names == ["ti"]
    lines = {Path(line.partition(":")[0]).name: line for line in found.left_out}
    assert lines.keys() == {*broken, "killed"}
    for name, (_, _, why) in broken.items():
        assert why in lines[name] and "\n" not in lines[name]
    with pytest.raises(UserError, match=r"no finished run with scores among 1 run folders.*running"):
        read([tmp_path / "going"])


def test_jobs_that_left_a_log_or_nothing_are_left_out_by_name(tmp_path) -> None:
    """A sweep's record lists them; a folder may hold only a log, or not be there; a name in it chooses no path."""
    sweep = tmp_path / "sweeps" / "s"
    run(sweep / "good", "ti", {"clip": 0.1})
    run(sweep / "before", "ti", {"clip": 0.1})  # of an earlier command: not in the record
    for name in ("logged", "unlisted"):
        (sweep / name).mkdir()
        (sweep / name / "job.log").write_text("hiperlab: no GPU")
    jobs = [
        {"job": "good", "status": "finished", "error": ""},
        {"job": "logged", "status": "failed", "error": "hiperlab: no\nGPU"},
        {"job": "never", "status": "not started", "error": ""},
        {"job": "../outside", "status": "failed", "error": ""},
        {"job": ".jobs", "status": "failed", "error": ""},
    ]
    (sweep / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    for root in (sweep, tmp_path):
        found = read(find([root]))
        assert sorted(each.folder.name for each in found.runs) == ["before", "good"]
        left = {Path(line.partition(":")[0]).name: line.partition(": ")[2] for line in found.left_out}
        assert left == {
            "logged": "has no results.json (its sweep says failed: hiperlab: no GPU)",
            "never": "there is no such folder (its sweep says not started)",
            "unlisted": "has no results.json (it was stopped early)",
        }
    for torn in ("{", "[]", '{"jobs": 3}', '{"jobs": [3]}', '{"jobs": [{"job": "x"}]}'):
        (sweep / "sweep.json").write_text(torn)
        assert len(read(find([sweep])).left_out) == 2
    for name in ("good", "before"):
        (sweep / name / "results.json").write_text("{}")
    with pytest.raises(UserError, match="no finished run with scores among 4 run folders"):
        read(find([sweep]))


def test_settings_of_alternatives_that_were_not_chosen_are_in_no_name(tmp_path) -> None:
    def named(*runs: tuple[str, dict | None]) -> list[str]:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        for number, (asked, config) in enumerate(runs):
            folder = run(root / str(number), "peft", {"clip": 0.1}, asked=asked.split(), config=config, pictures=False)
            if config is None:
                (folder / "config.yaml").unlink()
        return sorted(read(find([root])).names)

    dora, oft = "method.tuner=dora method.tuners.dora.lr=3e-3", "method.tuner=oft method.tuners.oft.lr=1e-3"
    tables = {"dora": {"lr": 1e-4}, "oft": {"lr": 1e-4}}
    config = [{"method": {"tuner": tuner, "tuners": tables}} for tuner in ("dora", "oft")]
    assert named((dora, config[0]), (oft, config[1])) == ["peft method.tuner=dora", "peft method.tuner=oft"]
    assert named((dora, None), (oft, None)) == ["peft method.tuner=dora", "peft method.tuner=oft"]
    # Of one alternative two rates are two methods; the default counts, too, and so does what cannot be known.
    rates = named((dora, config[0]), ("method.tuner=dora", config[0]), (oft, config[1]))
    assert rates == [
        "peft method.tuner=dora method.tuners.dora.lr=0.0001", "peft method.tuner=dora method.tuners.dora.lr=0.003",
        "peft method.tuner=oft",
    ]  # fmt: skip
    assert named((dora, None), ("method.tuner=dora", None)) == ["peft", "peft method.tuners.dora.lr=0.003"]
    assert len(named(("method.tuners.oft.lr=1", None), ("method.tuners.oft.lr=2", None))) == 2


def test_short_names_of_different_ones_differ() -> None:
    long = "peft method.optimizer.weight_decay=0.01 method.tuners.oft.lr={} method.very.long.setting.of.it.all=17"
    for names in (
        [long.format(rate) for rate in (0.1, 0.2)],
        ["x" * 30 + middle + "y" * 60 for middle in "abc"],
        ["method." + "k" * 40 + f"={value} " + "z" * 50 for value in (1, 2)],
        [f"{'a' * 40} {word} {'b' * 40}" for word in ("one", "two")],
    ):
        for most in (14, 24, 42):
            short = shortened(names, most)
            assert len(set(short)) == len(names) and max(map(len, short)) <= most, short
    assert "lr=0.1" in shortened([long.format(rate) for rate in (0.1, 0.2)], 24)[0]
    assert shortened(["ti", "ti", "neti"], 24) == ["ti", "ti", "neti"]


def test_damaged_or_foreign_pictures_cost_the_pictures_only(tmp_path) -> None:
    a, b = run(tmp_path / "a", "ti", {"clip": 0.1}), run(tmp_path / "b", "neti", {"clip": 0.1})
    (a / "samples" / "samples.jsonl").write_text("{")
    change(b / "samples" / "samples.jsonl", path="../../secret.png")
    found = read([a, b])
    assert found.names == ["ti", "neti"] and not found.pictures
    assert any("its pictures are not shown" in note for note in found.notes)
    assert any("outside the run folder" in note for note in found.notes)


def test_other_protocols_and_judges_are_refused_with_examples(tmp_path) -> None:
    a = run(tmp_path / "a", "ti", {"clip": 0.1, "dino": 0.2})
    b = run(tmp_path / "b", "neti", {"clip": 0.1}, protocol_hash="other")
    with pytest.raises(UserError, match=r"several protocols.*For example.*abc in .*a, .*other in .*b"):
        read([a, b])
    c = run(tmp_path / "c", "neti", {"clip": 0.1}, weights="newer")
    with pytest.raises(UserError, match=r"clip come from different weights.*clip w in .*a, clip newer in .*c$"):
        read([a, c])


def test_equal_runs_are_averaged_and_named(tmp_path) -> None:
    a, b = (run(tmp_path / name, "ti", {"clip": value}, spread=0) for name, value in (("a", 0.2), ("b", 0.4)))
    found = read([a, b])
    whole = mean(found.values(0, 0))
    assert whole and whole.mean == pytest.approx(0.3)
    assert any("differ in nothing that is compared" in note for note in found.notes)


def test_the_same_name_in_other_folders_is_another_subject(tmp_path) -> None:
    a, b = (
        run(tmp_path / name, "ti", {"clip": 0.1}, data="folder", asked=[f"data.dir=photos/{name}"]) for name in "ab"
    )
    assert len(read([a, b]).subjects) == 2


def test_many_runs_are_read_quickly_and_in_little_memory(tmp_path) -> None:
    """60 of a thousand runs' size: 600 scores each. A thousand may take 30 s and 2 GB."""
    resource = pytest.importorskip("resource")
    rng = np.random.default_rng(0)
    for number in range(60):
        scores = {f"score{k}": float(rng.random()) for k in range(10)}
        run(
            tmp_path / f"{number}", f"method{number % 10}", scores, concepts=[f"c{k}" for k in range(5)],
            seeds=(0, 1, 2, 3), training_seed=number // 10, pictures=False,
        )  # fmt: skip
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    found = read(find([tmp_path]))
    seconds = time.process_time() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)
    assert len(found.scores.value) == 60 * 600 and len(found.runs) == 60
    assert seconds < 60 / 1000 * 30 * 3, seconds  # three times as slow a machine may still pass
    assert grown < 300e6
