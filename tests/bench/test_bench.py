"""The bench: every number follows from what was measured, and the baseline does the same work as ours."""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import AdamW

from hiperlab import draws
from hiperlab.bench import report, timing
from hiperlab.bench.baseline import DiffusersTextualInversion, stock_attention
from hiperlab.bench.main import main
from hiperlab.bench.plan import plan
from hiperlab.bench.real_shape import parts, sdxl_parts
from hiperlab.bench.report import Amounts, row, split
from hiperlab.bench.timing import Operations, Parts
from hiperlab.bench.trainee import Trainee
from hiperlab.errors import UserError
from hiperlab.model.load import pretrained
from hiperlab.model.tiny import tiny
from tests.composed import SUBJECTS, batch, build

CPU = torch.device("cpu")
CAT = SUBJECTS[0]
QUICK = ["--steps", "2", "--warmup", "1", "--pictures", "1", "--sampler-steps", "1", "--startup", "0"]  # model tiny
FEW = Amounts(steps=2, warmup=1, pictures=0, sampler_steps=1, startup=0)


@pytest.fixture(scope="module")
def small() -> Any:
    return tiny(seed=0, size=64)


def job(method: str, *overrides: str) -> Any:
    return plan([method], "tiny", "fp32", False, ["model.size=64", *overrides])[0]


@pytest.fixture(scope="module")
def file(tmp_path_factory: Any) -> Path:
    """What a run of two methods and the baseline left."""
    out = tmp_path_factory.mktemp("bench") / "out.json"
    words = ["--methods", "ti,lora", "--baseline", "diffusers", "--json", str(out), "model.size=64"]
    assert main([*QUICK, *words]) == 0
    return out


def numbers(node: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a JSON value with its place."""
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from numbers(value, f"{path}.{key}")
    elif isinstance(node, int | float) and not isinstance(node, bool):
        yield path, node


# ---- what comes out --------------------------------------------------------------------------------------------------


def test_file_is_complete(file: Path) -> None:
    found = json.loads(file.read_text())
    assert [each["method"] for each in found["rows"]] == ["ti", "lora"]
    assert set(found["diffusers"]) == {"batch", "ours_ms", "theirs_ms", "ratio"}
    asked_for_none = (".amounts.startup", ".environment.git.dirty")
    every = [(path, value) for path, value in numbers(found) if path not in asked_for_none]
    assert not [path for path, value in every if not (math.isfinite(value) and value > 0)]
    for each in found["rows"]:
        assert set(each["parts_ms"]) == {"text", "unet", "backward", "optimizer", "rest"}
        assert {"step_ms", "samples_per_s", "concepts_per_hour", "peak_mb", "pictures_per_s"} <= set(each)


def test_several_concepts_share_a_pass(tmp_path: Path, capsys: Any) -> None:
    """Three times the rows in a step; a method that cannot is refused before anything is measured."""
    out = tmp_path / "out.json"
    assert main([*QUICK, "--methods", "lora", "--concepts", "1,3", "--json", str(out), "model.size=64"]) == 0
    alone, three = json.loads(out.read_text())["rows"]
    assert (alone["concepts"], three["concepts"]) == (1, 3)
    assert three["trainable_parameters"] == 3 * alone["trainable_parameters"]
    assert three["unet_forward_gflop"] > 2.5 * alone["unet_forward_gflop"]
    assert three["samples_per_s"] == pytest.approx(3 * 1000 / three["step_ms"])
    trainee = Trainee(job("lora", "fit.batch_size=2").cfg, tiny(seed=0, size=64), 2)
    (rows,) = next(trainee.batches)
    assert rows.concept.tolist() == [0, 0, 1, 1] and rows.sample.tolist() == [0, 1, 0, 1]
    assert next(trainee.batches)[0].sample.tolist() == [2, 3, 2, 3]
    capsys.readouterr()
    assert main([*QUICK, "--methods", "lora,dreambooth", "--concepts", "2", "model.size=64"]) == 2
    said = capsys.readouterr()
    assert "method=dreambooth: all weights of its U-Net change" in said.err and "samples/s" not in said.out


def test_numbers_fit_together(file: Path) -> None:
    found = json.loads(file.read_text())
    for each, steps, rows in zip(found["rows"], (5000, 500), (2, 1), strict=True):  # conf/method/ti.yaml, lora.yaml
        assert (each["published_steps"], each["batch"]) == (steps, rows)
        seconds = each["step_ms"] / 1000
        assert each["samples_per_s"] == pytest.approx(rows / seconds)
        assert each["concepts_per_hour"] == pytest.approx(3600 / (steps * seconds))
        assert each["share_of_ceiling"] == pytest.approx(each["step_gflop"] / seconds / found["ceiling_tflops"] / 1000)
        assert each["unet_forward_gflop"] < each["step_gflop"]


def test_table_has_every_row(capsys: Any) -> None:
    assert main([*QUICK, "--methods", "ti,hiper", "model.size=64"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[-3:]] == ["method", "ti", "hiper"]
    assert len({len(line.split()) for line in printed[-3:]}) == 1


def test_a_run_that_is_cut_off_keeps_its_rows(tmp_path: Path, monkeypatch: Any) -> None:
    def one_row(job: Any, *rest: Any) -> dict[str, Any]:
        if job.method == "lora":
            raise KeyboardInterrupt
        return row(job, *rest)

    monkeypatch.setattr(report, "row", one_row)
    out = tmp_path / "out.json"
    assert main([*QUICK, "--methods", "ti,lora", "--json", str(out), "model.size=64"]) == 130
    assert [each["method"] for each in json.loads(out.read_text())["rows"]] == ["ti"]


# ---- numbers are measured --------------------------------------------------------------------------------------------


def test_a_slower_model_is_seen(small: Any, monkeypatch: Any) -> None:
    predict = small.predict

    def slow(*args: Any) -> Any:
        time.sleep(0.3)
        return predict(*args)

    before = row(job("ti"), small, FEW, 1.0)
    monkeypatch.setattr(small, "predict", slow)
    now = row(job("ti"), small, FEW, 1.0)
    assert now["step_ms"] > 300 and now["step_ms"] > before["step_ms"]
    assert now["parts_ms"]["unet"] > 300
    assert now["parts_ms"]["text"] < 300 and now["parts_ms"]["backward"] < 300
    assert now["step_gflop"] == before["step_gflop"]
    assert now["share_of_ceiling"] == pytest.approx(now["step_gflop"] * 1e9 / (now["step_ms"] / 1000) / 1e12)


def test_operations_grow_with_the_batch(small: Any) -> None:
    one, two = (row(job("ti", f"fit.batch_size={size}"), small, FEW, 1.0) for size in (1, 2))
    assert two["unet_forward_gflop"] == pytest.approx(2 * one["unet_forward_gflop"], rel=1e-6)
    # All gradients flow to what the U-Net reads, none to its weights: a backward pass costs about one forward pass.
    assert 1.5 < two["step_gflop"] / two["unet_forward_gflop"] < 3.5


def test_operations_by_hand() -> None:
    left, right = torch.ones(3, 5), torch.ones(5, 7)
    operations = Operations()

    def work() -> None:
        left @ right
        with operations("inner"):
            left @ right

    assert operations.count(work) == 2 * 2 * 3 * 5 * 7
    assert operations.parts == {"inner": 2 * 3 * 5 * 7}


def test_parts_inside_parts_count_once() -> None:
    timed = Parts(CPU)
    with timed("outer"):
        time.sleep(0.02)
        with timed("inner"):
            time.sleep(0.2)
    assert timed.seconds["inner"] >= 0.2
    assert 0.02 <= timed.seconds["outer"] < 0.2


def test_watching_changes_nothing(small: Any) -> None:
    plain, watched = Trainee(job("ti").cfg, small), Trainee(job("ti").cfg, small)
    for _ in range(2):
        plain.step()
    split(watched, 2)
    torch.testing.assert_close(plain.step(), watched.step(), rtol=0, atol=0)
    assert "condition" not in vars(watched.methods[0]) and "predict" not in vars(small)


def test_every_step_has_draws_of_its_own(small: Any) -> None:
    trainee = Trainee(job("ti", "fit.batch_size=3").cfg, small)
    assert [next(trainee.batches)[0].sample.tolist() for _ in range(2)] == [[0, 1, 2], [3, 4, 5]]
    assert len({float(trainee.step()) for _ in range(3)}) == 3


def test_ceiling_by_hand(monkeypatch: Any) -> None:
    times = iter([9.0, 0.5, 0.25, 0.5, 0.5, 0.5])  # the first call is a warm-up
    monkeypatch.setattr(timing, "seconds", lambda work, device: next(times))
    assert timing.ceiling(CPU, torch.float32) == 2 * 2048**3 / 0.25


def test_start_up_is_timed(monkeypatch: Any) -> None:
    asked = []

    def start(words: list[str], **_: Any) -> None:
        asked.append(words[1:])
        time.sleep(0.2 if "--version" in words else 0.02)

    monkeypatch.setattr(timing.subprocess, "run", start)
    found = timing.start_up(2)
    assert len(asked) == 4 and "import hiperlab.run.stages" in asked[-1][-1]
    assert found["door"] >= 0.2 > found["stages"] >= 0.02


@pytest.mark.slow
def test_start_up_of_fresh_processes() -> None:
    found = timing.start_up(1)
    assert 0 < found["door"] < found["stages"]  # the door imports no torch


# ---- the baseline ----------------------------------------------------------------------------------------------------


def both(stack: Any, rows: int) -> tuple[Any, DiffusersTextualInversion, Any]:
    """Ours, theirs with the same optimizer, and a batch."""
    ours = build("ti", stack, [CAT]).train()
    theirs = DiffusersTextualInversion(stack, CAT, lambda own: AdamW(own, lr=1e-2))
    return ours, theirs, batch([CAT], list(range(rows)), stack.size)


def loss_of_theirs(ours: Any, theirs: DiffusersTextualInversion, drawn: Any) -> Any:
    """Their loss on what ours draws for a batch."""
    latents = ours.clean_latents(drawn)
    noise = draws.normal(ours.seed, "noise", drawn.sample, latents.shape[1:])
    timesteps = draws.integers(ours.seed, "timestep", drawn.sample, 1000)
    with stock_attention(ours.model.unet):
        return theirs.loss(drawn.prompts, latents, noise, timesteps)


def mini() -> Any:
    """The miniature: its text encoder is trained, so its loss depends on the words more than the twin's."""
    return pretrained(name="mini", path="hiperlab:weights/mini", size=128)


@pytest.mark.parametrize("make", [functools.partial(tiny, seed=1, size=128), mini], ids=["noise", "velocity"])
def test_baseline_has_the_same_loss(make: Callable[[], Any]) -> None:
    stack = make()
    ours, theirs, drawn = both(stack, 3)
    mine = ours.training_step(drawn, 0)
    torch.testing.assert_close(mine, loss_of_theirs(ours, theirs, drawn), rtol=1e-5, atol=1e-6)
    with torch.no_grad():  # another word changes the loss by far more than that
        theirs.table[theirs.token] = torch.randn(stack.width, generator=torch.Generator().manual_seed(0))
        assert abs(mine.detach() - loss_of_theirs(ours, theirs, drawn)) > 1e-4


def test_baseline_has_the_same_gradient(stack: Any) -> None:
    ours, theirs, drawn = both(stack, 2)
    ours.training_step(drawn, 0).backward()
    loss_of_theirs(ours, theirs, drawn).backward()
    mine, other = ours.vectors.grad[0, 0], theirs.table.grad[theirs.token]
    assert (mine - other).norm() < 1e-3 * mine.norm()


def test_baseline_takes_the_same_steps(stack: Any) -> None:
    ours, theirs, drawn = both(stack, 2)
    optimizer = AdamW([ours.vectors], lr=1e-2)
    before = theirs.table.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        ours.training_step(drawn, 0).backward()
        optimizer.step()
        loss_of_theirs(ours, theirs, drawn).backward()
        theirs.update()
    moved = (theirs.table.detach() - before).abs().amax(1) > 0
    assert moved.nonzero().flatten().tolist() == [theirs.token]
    mine, other = ours.vectors[0, 0].detach(), theirs.table[theirs.token].detach()
    assert (mine - before[theirs.token]).abs().max() > 1e-2
    torch.testing.assert_close(mine, other, rtol=0, atol=1e-3)


def test_baseline_trains_by_its_own_step(small: Any) -> None:
    _, theirs, drawn = both(small, 2)
    start = theirs.table[theirs.token].detach().clone()
    with stock_attention(small.unet):
        theirs.step(drawn.prompts, theirs.encode(drawn.pixels))
    assert not torch.equal(theirs.table[theirs.token], start)


def test_baseline_leaves_the_stack_alone(small: Any) -> None:
    processors, words = dict(small.unet.attn_processors), len(small.tokenizer)
    weights = [value.clone() for value in small.text.state_dict().values()]
    _, theirs, drawn = both(small, 1)
    with stock_attention(small.unet):
        assert not any(type(each).__module__.startswith("hiperlab") for each in small.unet.attn_processors.values())
        theirs.step(drawn.prompts, theirs.encode(drawn.pixels))
    assert small.unet.attn_processors == processors and len(small.tokenizer) == words
    assert all(torch.equal(old, new) for old, new in zip(weights, small.text.state_dict().values(), strict=True))
    assert not any(parameter.requires_grad for parameter in small.parameters())


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--methods", "ti,foo"], "method=foo: no such method."),
        (["--methods", "ddim_inversion"], "trains nothing"),
        (["--methods", "null_text"], "not alike"),
        (["--methods", ","], "--methods names none"),
        (["--model", "nosuch"], "model=nosuch: no such model."),
        (["--model", "tiny", "--random"], "--random builds sd14, sd15, sdxl, not tiny"),
        (["--steps", "0"], "expected a whole number from 1"),
        (["--precision", "fp8"], "invalid choice"),
        (["--frobnicate"], "--frobnicate"),
        (["method.lrr=1"], "method.lrr: no such setting."),
        (["--compare", "nosuch.json", "nosuch.json"], "cannot be read"),
    ],
)
def test_mistakes_are_one_line(words: list[str], said: str, capsys: Any) -> None:
    assert main(words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0]


def test_a_file_that_cannot_be_written_is_told_first(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(report, "open_stack", lambda cfg: pytest.fail("nothing is to be measured"))
    assert main([*QUICK, "--methods", "ti", "--json", str(tmp_path / "file" / "out.json")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_compare(file: Path, tmp_path: Path, capsys: Any) -> None:
    """Every figure of every row, at any depth, and those of no row."""
    found = json.loads(file.read_text())
    for each, factor in zip(found["rows"], (0.5, 3.0), strict=True):
        each["step_ms"] *= factor
    found["rows"][0]["parts_ms"]["unet"] *= 2
    found["diffusers"]["ratio"] *= 1.25
    found["rows"][1]["trainable_parameters"] = None  # not measured there
    now = tmp_path / "now.json"
    now.write_text(json.dumps(found))
    assert main(["--compare", str(file), str(now)]) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    ratios = {(line[0], line[-4]): line[-1] for line in printed}
    assert (ratios["ti", "step_ms"], ratios["lora", "step_ms"]) == ("0.500", "3.000")
    assert ratios["ti", "parts_ms.unet"] == "2.000" and ratios["lora", "parts_ms.unet"] == "1.000"
    assert ratios["ti", "pictures_per_s"] == "1.000" and ratios["ti", "trainable_parameters"] == "1.000"
    assert ("lora", "trainable_parameters") not in ratios
    assert ratios["diffusers.ratio", "diffusers.ratio"] == "1.250"
    assert ratios["ceiling_tflops", "ceiling_tflops"] == "1.000"


@pytest.mark.parametrize("content", ["", "[]", '{"rows": [{"method": "ti"}]}', '{"rows": 3}'])
def test_compare_refuses_other_files(content: str, file: Path, tmp_path: Path, capsys: Any) -> None:
    other = tmp_path / "other.json"
    other.write_text(content)
    assert main(["--compare", str(file), str(other)]) == 2
    assert "is no file of the bench" in capsys.readouterr().err


def test_compare_needs_a_common_row(file: Path, tmp_path: Path, capsys: Any) -> None:
    found = json.loads(file.read_text())
    for each in found["rows"]:
        each["batch"] += 1
    other = tmp_path / "other.json"
    other.write_text(json.dumps(found))
    assert main(["--compare", str(file), str(other)]) == 2
    assert "no row in common" in capsys.readouterr().err


# ---- what is built ---------------------------------------------------------------------------------------------------


def test_random_weights_have_the_real_shape() -> None:
    """Parameters of the released text encoder, autoencoder and U-Net."""
    with torch.device("meta"):
        counts = [sum(value.numel() for value in part.parameters()) for part in parts()]
    assert counts == [123_060_480, 83_653_863, 859_520_964]


def test_random_weights_have_sdxls_shape() -> None:
    with torch.device("meta"):
        first, second, vae, unet = sdxl_parts()
    counts = [sum(value.numel() for value in part.parameters()) for part in (first, second, vae, unet)]
    assert counts == [123_060_480, 694_659_840, 83_653_863, 2_567_463_684]
    (found,) = plan(["ti"], "sdxl", "bf16", True, ["model.size=512"])
    assert found.cfg.model._target_ == "hiperlab.bench.real_shape.sdxl" and found.cfg.model.size == 512


def test_a_method_that_does_not_run_there_is_refused_before_any_row() -> None:
    for model, random in (("tiny_sdxl", False), ("sdxl", True)):
        with pytest.raises(UserError, match="NeTI does not run on SDXL"):
            plan(["ti", "neti"], model, "fp32", random, [])


def test_random_weights_take_the_place_of_files() -> None:
    (found,) = plan(["dreambooth"], "sd15", "bf16", True, [])
    assert found.cfg.model._target_ == "hiperlab.bench.real_shape.sd15" and found.cfg.model.size == 512
    assert found.cfg.method.prior.folder is None and found.cfg.method.prior.count == 1


def test_published_steps_are_the_methods_own() -> None:
    """model=tiny has a budget of its own, model=mini settings of its own; neither counts."""
    assert [plan(["neti"], model, "fp32", False, [])[0].published_steps for model in ("tiny", "mini")] == [1000, 1000]
    assert plan(["neti"], "mini", "fp32", False, [])[0].cfg.fit.batch_size == 8
