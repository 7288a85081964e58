"""Everything worth knowing about hiperlab on a GPU, from one command in eight minutes: `make gpu-check`.

First whether each method does there what it does on the CPU (`device_checks`), then how fast Stable Diffusion's shape
trains with random weights. Needs no network and no weights but the miniature's. Exit codes: 0 all is well, 1 a piece
failed, 2 there is no GPU (or a mistake in what was asked), 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import logging
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class
from omegaconf import OmegaConf

from hiperlab.bench import device_checks, pieces, real_shape
from hiperlab.bench.baseline import against_diffusers
from hiperlab.bench.pieces import Piece
from hiperlab.bench.plan import UNEVEN, Job, plan
from hiperlab.bench.report import Amounts, quiet, row
from hiperlab.bench.table import heading, lines
from hiperlab.bench.timing import ceiling
from hiperlab.bench.trainee import open_stack
from hiperlab.cli.process import config_dir, guarded
from hiperlab.cli.targets import trusted
from hiperlab.errors import UserError
from hiperlab.report.environment import environment

BUDGET = 450.0  # seconds; with the imports and the last piece's end it stays below eight minutes
GRAPHED = ("ti", "neti")  # methods whose calls are checked as CUDA graphs: keys alone, and values of their own
GRACE = 20.0  # seconds after the budget until a process that hangs is ended


@dataclass(frozen=True)
class Scale:
    """How much is done.

    Args:
        methods: what is checked.
        model: what is timed, a member of conf/model.
        random: whether that model has random weights.
        concepts: numbers of concepts that share a pass.
        amounts: of one row.
        compile_backend: of the check of torch.compile.
        resumed: precisions in which a run is stopped and resumed.
        cuda_graphs: whether they are checked and timed; they need a GPU.
        overrides: further settings of what is timed.
    """

    methods: tuple[str, ...]
    model: str
    random: bool
    concepts: tuple[int, ...]
    amounts: Amounts
    compile_backend: str
    resumed: tuple[str, ...]
    cuda_graphs: bool
    overrides: tuple[str, ...] = ("fit.batch_size=1",)

    def job(self, method: str, concepts: int = 1, *more: str) -> Job:
        """What one row of the table measures, with more settings."""
        settings = (self.model, "bf16", self.random, [*self.overrides, *more])
        return plan([method], *settings, [concepts], even_only=False)[0]


ALL = tuple(sorted(path.stem for path in (config_dir() / "method").glob("*.yaml")))
FULL = Scale(ALL, "sd15", True, (1, 4, 16, 32), Amounts(10, 3, 4, 10, 0), "inductor", ("fp32", "bf16", "fp16"), True)
TOY = Scale(
    ("lora", "null_text", "ti"), "tiny", False, (1, 4), Amounts(1, 1, 1, 1, 0), "eager", ("fp16",), False,
    ("fit.batch_size=1", "model.size=64"),
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Check and measure; returns the exit code."""
    return guarded(_main, list(sys.argv[1:] if argv is None else argv))


def _main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m hiperlab.bench.gpu_check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", default="outputs/gpu-check", help="folder of gpu_check.json and .txt [%(default)s]")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything [%(default)g]")
    parser.add_argument("--rehearse", action="store_true", help="the same at toy size, also without a GPU")
    args = parser.parse_args(argv)
    if not args.rehearse and not torch.cuda.is_available():
        raise UserError("torch sees no GPU here, so there is nothing to check: --rehearse does it small on the CPU.")
    folder = Path(args.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / "runs", ignore_errors=True)
        (folder / "tracebacks.txt").write_text("", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written ({error.strerror}): choose another folder.") from error
    with (folder / "hang.txt").open("w", encoding="utf-8") as hang:
        faulthandler.dump_traceback_later(args.budget + GRACE, exit=True, file=hang)  # a kernel that never ends
        try:
            return check(TOY if args.rehearse else FULL, args.budget, folder)
        finally:
            faulthandler.cancel_dump_traceback_later()


def check(scale: Scale, budget: float, folder: Path) -> int:
    """Do all pieces; returns the exit code.

    Args:
        scale: how much.
        budget: seconds.
        folder: where the files are written, piece by piece.
    """
    quiet()
    for name in ("hiperlab", "pytorch_lightning"):  # the same lines about the miniature and devices at every piece
        logging.getLogger(name).setLevel(logging.ERROR)
    found: dict[str, Any] = {"environment": environment(), "gpu": gpu(), "budget_s": budget, "pieces": [], "rows": []}

    def keep() -> None:
        pieces.write(folder, found, table(found))
        print(piece_line(found["pieces"][-1]), flush=True)

    with trusted(["hiperlab.bench"]):
        pieces.run([*checks(scale, folder), *speeds(scale, found)], budget, found, keep, folder / "tracebacks.txt")
    print(table(found))
    return 1 if pieces.failures(found) else 0


def gpu() -> dict[str, Any] | None:
    """What is known of the first GPU; None without one."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "count": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": _driver(),
    }


def _driver() -> str | None:
    """The driver's version; None where its own tool is missing or does not answer."""
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(words, capture_output=True, text=True, check=True, timeout=10).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return said[0] if said else None


# ---- is it right? ----------------------------------------------------------------------------------------------------


def trained(method: str) -> bool:
    """Whether the method has anything to train."""
    return bool(OmegaConf.load(config_dir() / "method" / f"{method}.yaml").fit.steps)


def checks(scale: Scale, folder: Path) -> Iterator[Piece]:
    """Losses, gradients and pictures of every method; then runs, half precision, and the switches."""
    some = [method for method in scale.methods if trained(method)]
    do = functools.partial
    for method in some:
        yield Piece(f"training fp32: {method}", 30, do(device_checks.training, method, "fp32"))
    for precision in scale.resumed:
        where = folder / "runs" / precision
        yield Piece(f"resumed run {precision}: ti", 60, do(device_checks.resumed, "ti", precision, where))
    for method in scale.methods:
        yield Piece(f"pictures fp64: {method}", 30, do(device_checks.pictures, method))
    for precision in ("bf16", "fp16"):
        for method in some:
            yield Piece(f"training {precision}: {method}", 30, do(device_checks.training, method, precision))
    for method in some:
        yield Piece(f"gradient checkpointing: {method}", 30, do(device_checks.checkpointing, method))
    for method in some:
        if shares(method):
            yield Piece(f"shared passes: {method}", 30, do(device_checks.sharing, method))
    if scale.cuda_graphs:
        for method in GRAPHED:
            yield Piece(f"CUDA graphs: {method}", 60, do(device_checks.graphing, method))


# ---- how fast is it? -------------------------------------------------------------------------------------------------


def speeds(scale: Scale, found: dict[str, Any]) -> Iterator[Piece]:
    """The model in Stable Diffusion's shape, then rows, the most telling first; compiling, slow to start, is last."""
    stack = functools.cache(lambda: open_stack(scale.job("ti").cfg))

    def rate() -> dict[str, Any]:
        found["ceiling_tflops"] = ceiling(stack().device, torch.bfloat16) / 1e12
        return {"ceiling_tflops": found["ceiling_tflops"]}

    def measure(method: str, concepts: int, **switches: bool) -> dict[str, Any]:
        draws = concepts == 1 and method not in UNEVEN  # their paths have a length of their own
        amounts = scale.amounts if draws else replace(scale.amounts, pictures=0)
        if switches:
            stack().optimise(**{"channels_last": False, "compile": False, "gradient_checkpointing": False} | switches)
        try:
            with _tower(scale.random and method == "style_diffusion") as more:
                made = row(scale.job(method, concepts, *more), stack(), amounts, found["ceiling_tflops"])
        finally:
            stack().graphs = None
            stack().unet.to(memory_format=torch.contiguous_format)
            stack()._set_predictor(stack().unet)
        if switches:
            made["model"] += "+" + "+".join(switches)
        found["rows"].append(made)
        return {"step_ms": made["step_ms"], "samples_per_s": made["samples_per_s"], "peak_mb": made["peak_mb"]}

    def beside_diffusers() -> dict[str, Any]:
        found["diffusers"] = against_diffusers(scale.job("ti").cfg, stack(), scale.amounts.warmup, scale.amounts.steps)
        return found["diffusers"]

    def speed(name: str, limit: float, work: Any) -> Piece:
        return Piece(f"speed bf16: {name}", limit, work, must_end=False)

    def graphed(concepts: int) -> Any:
        return lambda: measure("ti", concepts, cuda_graphs=True)

    yield speed(f"{scale.model} and its ceiling", 90, rate)
    first, last = scale.concepts[0], scale.concepts[-1]
    order = [(method, first) for method in ("ti", "lora")]
    order += [(method, number) for number in scale.concepts[::-1] for method in ("lora", "ti") if number != first]
    order += [(method, first) for method in ("hiper", "neti", "style_diffusion")]
    order += [(method, number) for method in ("neti", "hiper") for number in (last, *scale.concepts[1:-1])]
    order += [("style_diffusion", number) for number in scale.concepts[1:]]
    for place, (method, number) in enumerate(order):
        if place == 2:
            yield speed("ti beside diffusers", 40, beside_diffusers)
            for some in (first, scale.concepts[1]) if scale.cuda_graphs else ():
                yield speed(f"ti, {some} a pass, CUDA graphs", 40, graphed(some))
        if number == 1 or shares(method):
            yield speed(f"{method}, {number} a pass", 40, functools.partial(measure, method, number))
    middle = scale.concepts[1]
    yield speed(f"ti, {middle} a pass, channels last", 30, lambda: measure("ti", middle, channels_last=True))
    compiled = functools.partial(device_checks.compiling, "ti", scale.compile_backend)
    yield Piece(f"torch.compile ({scale.compile_backend}): ti", 120, compiled)
    if scale.compile_backend == "inductor":
        yield speed(f"ti, {middle} a pass, compiled", 120, lambda: measure("ti", middle, compile=True))


@contextmanager
def _tower(needed: bool) -> Iterator[list[str]]:
    """The setting that names a picture tower with random weights, which is there inside; none where none is needed."""
    if not needed:
        yield []
        return
    with tempfile.TemporaryDirectory() as folder:
        real_shape.vit_b16().save_pretrained(folder)
        yield [f"method.tower='{folder}'"]


def shares(method: str) -> bool:
    """Whether several of its trainings share a pass."""
    target = OmegaConf.load(config_dir() / "method" / f"{method}.yaml").method._target_
    return not get_class(target).why_alone  # type: ignore[attr-defined]


# ---- in words --------------------------------------------------------------------------------------------------------


def piece_line(piece: dict[str, Any]) -> str:
    """One line of a piece: its outcome, seconds, and figures or error."""
    said = piece.get("error") or ", ".join(
        f"{name} {value}" if isinstance(value, bool) else f"{name} {value:{'.2g' if abs(value) < 1 else '.1f'}}"
        for name, value in piece.items()
        if isinstance(value, int | float) and name != "seconds"
    )
    return f"{piece['status']:<9}  {piece['seconds']:>6.1f} s  {piece['name']:<44}  {said}"


def table(found: dict[str, Any]) -> str:
    """Everything as text: the machine, the pieces, the rows, and what failed or was left out."""
    said = lines({"environment": found["environment"]})
    if found["gpu"]:
        said.append(", ".join(f"{key} {value}" for key, value in found["gpu"].items()))
    said += ["", *map(piece_line, found["pieces"])]
    if found["rows"]:
        said += [heading(), *lines({"rows": found["rows"]})]
        said += lines({key: found[key] for key in ("ceiling_tflops", "diffusers") if key in found})
    for status in (pieces.FAILED, pieces.NO_MEMORY, pieces.CUT, pieces.SKIPPED):
        if names := [piece["name"] for piece in found["pieces"] if piece["status"] == status]:
            said.append(f"{status}: {'; '.join(names)}")
    if not pieces.failures(found):
        said.append(f"no piece of {len(found['pieces'])} failed")
    return "\n".join(said) + "\n"


if __name__ == "__main__":
    sys.exit(main())
