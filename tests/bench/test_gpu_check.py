"""The check of a GPU: rehearsed on the CPU, its checks able to fail, its pieces independent of one another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hiperlab.bench import device_checks, gpu_check, pieces
from hiperlab.bench.device_checks import CheckError, apart, within
from hiperlab.bench.gpu_check import ALL, FULL, GRAPHED, TOY, checks, main, speeds, table, trained
from hiperlab.bench.pieces import Piece
from hiperlab.cli.targets import trusted
from tests.bench.test_bench import numbers

ROOT = Path(__file__).parents[2]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: make gpu-check")


@pytest.fixture
def found() -> dict[str, Any]:
    return {"environment": gpu_check.environment(), "gpu": None, "pieces": [], "rows": []}


# ---- the whole -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_rehearsal(tmp_path: Path) -> None:
    """Everything at toy size, as a person starts it; every figure is there and finite."""
    command = [sys.executable, "-m", "hiperlab.bench.gpu_check", "--rehearse", "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    wanted = [piece.name for piece in [*checks(TOY, tmp_path), *speeds(TOY, {})]]
    assert [piece["name"] for piece in found["pieces"]] == wanted
    assert {piece["status"] for piece in found["pieces"]} == {"ok"}
    assert all(value == value for _, value in numbers(found))
    by_name = {piece["name"]: piece for piece in found["pieces"]}
    assert by_name["resumed run fp16: ti"]["identical"]
    assert 0 < by_name["training bf16: lora"]["gradient"] < 0.1
    assert {row["concepts"] for row in found["rows"]} == {1, 4} and found["diffusers"]["ratio"] > 0
    assert "style_diffusion" in {row["method"] for row in found["rows"]}
    written = (tmp_path / "gpu_check.txt").read_text()
    assert f"no piece of {len(wanted)} failed" in written and all(name in written for name in wanted)
    assert not (tmp_path / "tracebacks.txt").read_text()


def test_without_a_gpu_it_is_one_line(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "torch sees no GPU here" in said.err and not said.out
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").write_text("")
    assert main(["--rehearse", "--out", str(tmp_path / "file" / "out")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_every_method_is_checked_first(tmp_path: Path) -> None:
    """On a GPU: what could be wrong comes before what could be slow, compiling at the end."""
    names = [piece.name for piece in [*checks(FULL, tmp_path), *speeds(FULL, {})]]
    some = [name for name in ALL if trained(name)]
    assert names[: len(some)] == [f"training fp32: {name}" for name in some]
    assert {f"pictures fp64: {name}" for name in ALL} <= set(names)
    assert {f"training fp16: {name}" for name in some} <= set(names)
    assert {"shared passes: null_text", "CUDA graphs: ti", "speed bf16: ti, 4 a pass, CUDA graphs"} <= set(names)
    assert not {"shared passes: dreambooth", "shared passes: e4t"} & set(names)
    for method in ("ti", "lora", "neti", "hiper"):
        assert {f"speed bf16: {method}, {number} a pass" for number in (1, 4, 16, 32)} <= set(names)
    assert names[-2:] == ["torch.compile (inductor): ti", "speed bf16: ti, 4 a pass, compiled"]
    assert len(set(names)) == len(names)


# ---- pieces ----------------------------------------------------------------------------------------------------------


def do(
    work: Any, found: dict[str, Any], folder: Path, budget: float = 60, limit: float = 30, check: bool = True
) -> Any:
    """The last record of one piece."""
    pieces.run([Piece("it", limit, work, check)], budget, found, lambda: None, folder / "log")
    return found["pieces"][-1]


def fail(error: Exception) -> Any:
    def work() -> dict[str, Any]:
        raise error

    return work


def test_a_piece_that_fails_stops_no_other(found: dict[str, Any], tmp_path: Path) -> None:
    surprise = do(fail(RuntimeError("CUDA error:\nillegal access")), found, tmp_path)
    assert (surprise["status"], surprise["error"]) == ("failed", "RuntimeError: CUDA error: illegal access")
    assert "Traceback" in (tmp_path / "log").read_text() and "---- it" in (tmp_path / "log").read_text()
    assert do(fail(CheckError("loss 1e-1")), found, tmp_path)["error"] == "loss 1e-1"
    assert do(lambda: {"loss": 0.5}, found, tmp_path)["loss"] == 0.5
    assert pieces.failures(found) == ["it", "it"]
    said = table(found)
    assert "failed: it; it" in said and "illegal access" in said and "loss 0.5" in said
    with pytest.raises(KeyboardInterrupt):
        do(fail(KeyboardInterrupt()), found, tmp_path)  # type: ignore[arg-type]


def test_memory_fails_a_check_and_ends_a_measurement(found: dict[str, Any], tmp_path: Path) -> None:
    too_much = fail(torch.OutOfMemoryError("CUDA out of memory"))
    assert do(too_much, found, tmp_path, check=False)["status"] == "no memory"
    assert pieces.failures(found) == []
    assert do(too_much, found, tmp_path)["status"] == "failed"
    assert "no memory: it" in table(found)


@pytest.mark.skipif(not hasattr(pieces.signal, "setitimer"), reason="no alarm on Windows")
def test_time_is_kept(found: dict[str, Any], tmp_path: Path) -> None:
    def slow() -> dict[str, Any]:
        time.sleep(20)
        return {}

    start = time.monotonic()
    assert do(slow, found, tmp_path, limit=0.2, check=False)["status"] == "cut"
    assert do(slow, found, tmp_path, limit=0.2)["status"] == "failed"
    assert time.monotonic() - start < 10
    late = do(slow, found, tmp_path, budget=pieces.LEAST - 1)
    assert late["status"] == "skipped" and "no time left" in late["error"]
    assert "skipped: it" in table(found) and pieces.failures(found) == ["it"]


def test_what_is_known_is_kept_at_once(found: dict[str, Any], tmp_path: Path) -> None:
    def keep() -> None:
        pieces.write(tmp_path, found, table(found))

    works = [lambda: {"loss": 1.0}, fail(KeyboardInterrupt())]  # type: ignore[arg-type, list-item]
    with pytest.raises(KeyboardInterrupt):
        pieces.run([Piece("a", 9, works[0]), Piece("b", 9, works[1])], 60, found, keep, tmp_path / "log")
    assert [piece["name"] for piece in json.loads((tmp_path / "gpu_check.json").read_text())["pieces"]] == ["a"]


# ---- checks can fail -------------------------------------------------------------------------------------------------


def test_distances_by_hand() -> None:
    assert apart(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    with pytest.raises(CheckError, match="not finite"):
        apart(torch.tensor([float("nan")]), torch.tensor([1.0]))
    with pytest.raises(CheckError, match="shape"):
        apart(torch.ones(2), torch.ones(3))
    assert within({"loss": 0.1}, {"loss": 0.1}) == {"loss": 0.1}
    for value in (0.11, float("nan")):
        with pytest.raises(CheckError, match="loss"):
            within({"loss": value}, {"loss": 0.1})


@pytest.mark.parametrize("change", [1.001, -1.0])
def test_another_gradient_is_seen(change: float, monkeypatch: Any) -> None:
    """A device whose gradient is a thousandth too long, or points the other way."""
    with trusted(["hiperlab.bench"]):
        loss, gradient = device_checks._reference("hiper")
        monkeypatch.setattr(device_checks, "gradient", lambda work: (loss, change * gradient))
        with pytest.raises(CheckError, match="gradient"):
            device_checks.training("hiper", "fp32")
        monkeypatch.setattr(device_checks, "gradient", lambda work: (1.001 * loss, gradient))
        with pytest.raises(CheckError, match="loss"):
            device_checks.training("hiper", "fp32")


def test_other_pictures_are_seen(monkeypatch: Any) -> None:
    monkeypatch.setattr(device_checks, "_drawn", lambda work: torch.zeros(2).double() + 2e-6 * (work.trainer == "auto"))
    with pytest.raises(CheckError, match="picture"):
        device_checks.pictures("ti")


def test_a_run_that_goes_on_otherwise_is_seen(tmp_path: Path, monkeypatch: Any) -> None:
    """The resumed run's artifact is another, or a run does not end well."""
    from safetensors.torch import save_file

    def run(words: list[str]) -> int:
        folder = Path(next(word for word in words if word.startswith("run_dir=")).removeprefix("run_dir="))
        (folder / "artifacts").mkdir(parents=True, exist_ok=True)
        value = 1.001 if "resume=auto" in words else 1.0
        save_file({"vectors": torch.full((2,), value)}, folder / "artifacts" / "it.safetensors")
        return 0

    monkeypatch.setattr(device_checks, "run", run)
    with pytest.raises(CheckError, match="artifact"):
        device_checks.resumed("ti", "fp32", tmp_path / "a")
    monkeypatch.setattr(device_checks, "run", lambda words: 1)
    with pytest.raises(CheckError, match="exit code 1"):
        device_checks.resumed("ti", "fp32", tmp_path / "b")


def test_what_is_not_compiled_is_seen(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch, "compile", lambda module, backend: module)
    with trusted(["hiperlab.bench"]), pytest.raises(CheckError, match="nothing was compiled"):
        device_checks.compiling("hiper", "eager")


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("method", [name for name in ALL if trained(name)])
def test_training_on_a_gpu(method: str) -> None:
    with trusted(["hiperlab.bench"]):
        device_checks.training(method, "fp32")
        device_checks.checkpointing(method)
        device_checks.sharing(method)


@needs_gpu
@pytest.mark.parametrize("method", GRAPHED)
def test_cuda_graphs_on_a_gpu(method: str) -> None:
    with trusted(["hiperlab.bench"]):
        device_checks.graphing(method)


@pytest.mark.parametrize("method", ["ti", "lora"])
def test_shared_passes(method: str) -> None:
    with trusted(["hiperlab.bench"]):
        assert device_checks.sharing(method)["gradient"] < device_checks.GRADIENT["fp32"]


@needs_gpu
@pytest.mark.parametrize("method", ALL)
def test_pictures_on_a_gpu(method: str) -> None:
    with trusted(["hiperlab.bench"]):
        device_checks.pictures(method)
