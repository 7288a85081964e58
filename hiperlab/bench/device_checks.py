"""What a method does on a device against what it does on the CPU, on the miniature: losses, gradients, pictures, runs.

The CPU's numbers are those that the tests and the authors' recordings check, so a device that agrees with them agrees
with the authors. Draws are the same everywhere: they are made on the CPU and moved (`hiperlab.draws`). The miniature
and not the random twin: a trained model is smooth enough for half precision to mean something.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch._dynamo.utils import counters

from hiperlab.bench.plan import composed
from hiperlab.bench.trainee import Trainee, open_stack, picture, prompt
from hiperlab.model.cuda_graphs import SEEN
from hiperlab.model.stack import FrozenStack
from hiperlab.run.main import main as run

# Largest relative differences from float32 on a CPU: three to forty times what was seen on a CPU, of all methods
# (gradients: 1.2e-5 to float64, 3.1e-2 in bfloat16, 3.5e-3 in float16).
GRADIENT = {"fp32": 5e-4, "bf16": 0.1, "fp16": 0.02}
LOSS = {"fp32": 2e-5, "bf16": 0.02, "fp16": 5e-3}
REPEATED = 1e-4  # the same work again on one device: kernels that add in another order
PICTURE = 1e-6  # in float64; schedulers hold their levels in float32
MODEL = "mini"
SHORT = ("fit.steps=2", "fit.batch_size=2", "sampler.steps=2")


class CheckError(Exception):
    """A number is not what it has to be; the message says which and by how much."""


@dataclass(frozen=True)
class Work:
    """What is checked.

    Args:
        method: a member of conf/method.
        precision: a member of conf/precision.
        trainer: "cpu" or "auto", which takes a GPU where there is one.
    """

    method: str
    precision: str
    trainer: str

    @property
    def cfg(self) -> DictConfig:
        """Its configuration."""
        return _configuration(self.method, self.precision, self.trainer)


@functools.cache
def _configuration(method: str, precision: str, trainer: str) -> DictConfig:
    return composed([method], MODEL, precision, [*SHORT, f"trainer={trainer}"])[0]


@functools.cache
def _reference(method: str) -> tuple[float, Tensor]:
    """Loss and gradient in float32 on the CPU, which every device and precision is compared with."""
    return gradient(Work(method, "fp32", "cpu"))


def trainee(work: Work, stack: FrozenStack, concepts: int = 1) -> Trainee:
    """Methods ready to train, their numbers moved away from what they start from: offsets that are zero hide much.

    Args:
        work: what is checked.
        stack: the frozen model.
        concepts: how many, each with a method of its own.
    """
    made = Trainee(work.cfg, stack, concepts, folded=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (each for method in made.methods for each in method.parameters()):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.05)
    return made


def gradient(work: Work, stack: FrozenStack | None = None) -> tuple[float, Tensor]:
    """Loss and gradient (P,) of one training step, P trained numbers; both on the CPU, the gradient float64.

    float16's loss is scaled and its gradient divided again, as a run does it: small ones would be lost.
    """
    made = trainee(work, stack or open_stack(work.cfg))
    return _gradient(work, made)


def _gradient(work: Work, made: Trainee, shared: bool = True) -> tuple[float, Tensor]:
    loss = made.loss(shared)
    scaler = torch.amp.GradScaler(made.device.type, init_scale=2.0**12, enabled=bool(work.cfg.precision.grad_scaler))
    scaler.scale(loss).backward()
    for optimizer in made.optimizers:
        scaler.unscale_(optimizer)
    every = (each for method in made.methods for each in method.parameters())
    found = [p.grad for p in every if p.requires_grad and p.grad is not None]
    return float(loss.detach()), torch.cat([each.double().cpu().flatten() for each in found])


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Length of the difference over the length of `theirs`; both of one shape.

    Raises:
        CheckError: the shapes differ, or a number is not finite.
    """
    if ours.shape != theirs.shape:
        raise CheckError(f"shape {tuple(ours.shape)}, expected {tuple(theirs.shape)}")
    if not torch.isfinite(ours).all():
        raise CheckError("a number is not finite")
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30))


def within(found: dict[str, float], limits: dict[str, float]) -> dict[str, float]:
    """`found` as it is.

    Raises:
        CheckError: a number is above its limit, or is none.
    """
    wrong = [f"{name} {value:.1e} exceeds {limits[name]:.0e}" for name, value in found.items()
             if not value <= limits[name]]  # fmt: skip
    if wrong:
        raise CheckError(", ".join(wrong))
    return found


def compared(mine: tuple[float, Tensor], other: tuple[float, Tensor]) -> dict[str, float]:
    """Relative differences of two losses and two gradients."""
    return {"loss": abs(mine[0] - other[0]) / abs(other[0]), "gradient": apart(mine[1], other[1])}


def training(method: str, precision: str) -> dict[str, Any]:
    """A step on the device against float32 on the CPU."""
    found = compared(gradient(Work(method, precision, "auto")), _reference(method))
    return within(found, {"loss": LOSS[precision], "gradient": GRADIENT[precision]})


def checkpointing(method: str) -> dict[str, Any]:
    """A step with gradient checkpointing against one without, both on the device."""
    work = Work(method, "fp32", "auto")
    stack = open_stack(work.cfg).optimise(channels_last=False, compile=False, gradient_checkpointing=True)
    return within(compared(gradient(work, stack), gradient(work)), {"loss": REPEATED, "gradient": REPEATED})


def compiling(method: str, backend: str) -> dict[str, Any]:
    """A step through torch.compile against one without, both on the device.

    Args:
        method: a member of conf/method.
        backend: of torch.compile, "inductor" as in a run, or "eager", which only traces.
    """
    work = Work(method, "fp32", "auto")
    stack = open_stack(work.cfg)
    stack.optimise(channels_last=False, compile=backend == "inductor", gradient_checkpointing=False)
    if backend != "inductor":
        stack._set_predictor(torch.compile(stack.unet, backend=backend))
    counters.clear()
    found = compared(gradient(work, stack), gradient(work))
    if not counters["stats"]["unique_graphs"]:
        raise CheckError("nothing was compiled")
    return within(found, {"loss": LOSS["fp32"], "gradient": GRADIENT["fp32"]})


def graphing(method: str) -> dict[str, Any]:
    """A step whose U-Net calls are replayed CUDA graphs against one without."""
    work = Work(method, "fp32", "auto")
    stack = open_stack(work.cfg)
    stack.optimise(channels_last=False, compile=False, gradient_checkpointing=False, cuda_graphs=True)
    for _ in range(SEEN):
        gradient(work, stack)
    found = compared(gradient(work, stack), gradient(work))
    if stack.graphs is None or not any(stack.graphs.graphs.values()):
        raise CheckError("nothing was recorded")
    return within(found, {"loss": LOSS["fp32"], "gradient": GRADIENT["fp32"]})


def sharing(method: str) -> dict[str, Any]:
    """A step of two trainings that share their passes against one in which each has its own, both on the device."""
    work = Work(method, "fp32", "auto")
    stack = open_stack(work.cfg)
    shared, own = (_gradient(work, trainee(work, stack, 2), shared) for shared in (True, False))
    return within(compared(shared, own), {"loss": LOSS["fp32"], "gradient": GRADIENT["fp32"]})


def pictures(method: str) -> dict[str, Any]:
    """Two pictures of two steps on the device against the CPU's, in float64, where rounding hides nothing."""
    here, there = (_drawn(Work(method, "fp32", trainer)) for trainer in ("auto", "cpu"))
    return within({"picture": float((here - there).abs().max())}, {"picture": PICTURE})


def _drawn(work: Work) -> Tensor:
    """Pictures (2, 3, H, W) in [0, 1], float64, on the CPU."""
    stack = open_stack(work.cfg).double()
    method = trainee(work, stack).methods[0].double()
    return method.sample([prompt(0), "a dog"], [1, 2], steps=2, guidance=4.0).double()


def resumed(method: str, precision: str, folder: Path, steps: int = 10) -> dict[str, Any]:
    """A run that stops half-way and goes on, against one that does not: the whole path, Lightning and checkpoints too.

    Args:
        method: a member of conf/method.
        precision: a member of conf/precision.
        folder: an empty one; pictures, both runs and what they said stay in it.
        steps: optimizer steps, an even number.
    """
    views = folder / "pictures"
    views.mkdir(parents=True)
    levels = ((picture(128) + 1) * 127.5).permute(1, 2, 0).to(torch.uint8)
    Image.fromarray(levels.numpy()).save(views / "noise.png")
    words = [f"method={method}", f"model={MODEL}", f"precision={precision}", "data=folder", f"data.dir={views}"]
    words += ["data.word=cat", "metric=twin", "logger=csv", "fit.sample_every=0", f"fit.checkpoint_every={steps // 2}"]
    whole, parted = folder / "whole", folder / "parted"
    with (folder / "said.txt").open("w", encoding="utf-8") as said:
        _run([*words, f"run_dir={whole}", f"fit.steps={steps}"], said)
        _run([*words, f"run_dir={parted}", f"fit.steps={steps // 2}"], said)
        _run([f"run_dir={parted}", f"fit.steps={steps}", "resume=auto"], said)
    kept = [load_file(next((each / "artifacts").glob("*.safetensors"))) for each in (parted, whole)]
    if kept[0].keys() != kept[1].keys():
        raise CheckError(f"tensors {sorted(kept[0])}, expected {sorted(kept[1])}")
    ours, theirs = (torch.cat([each[name].double().flatten() for name in sorted(each)]) for each in kept)
    limits = {"artifact": REPEATED}
    return within({"artifact": apart(ours, theirs)}, limits) | {"identical": bool(torch.equal(ours, theirs))}


def _run(words: Sequence[str], said: Any) -> None:
    """The fit stage of one run in this process, which leaves the process's loggers as they were.

    Raises:
        CheckError: it did not end well; `said` has its lines.
    """
    root, own = logging.getLogger(), logging.getLogger("hiperlab")
    handlers, levels = list(root.handlers), (root.level, own.level)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = run([*words, "stages=[fit]"])
    finally:
        root.handlers = handlers
        root.setLevel(levels[0])
        own.setLevel(levels[1])
        logging.captureWarnings(False)
    if code:
        raise CheckError(f"hiperlab.run ended with exit code {code}, see {Path(said.name).name}: {' '.join(words)}")
