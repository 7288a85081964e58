"""The measurement itself, row by row; every row is printed and kept as soon as it is known."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from hydra.utils import get_class, instantiate
from transformers.utils import logging as transformers_logging

from hiperlab import files
from hiperlab.bench.baseline import against_diffusers
from hiperlab.bench.plan import Job
from hiperlab.bench.table import heading, lines
from hiperlab.bench.timing import (
    REST,
    Operations,
    Parts,
    ceiling,
    forget_peak,
    peak_megabytes,
    seconds,
    start_up,
    watched,
)  # fmt: skip
from hiperlab.bench.trainee import Trainee, open_stack
from hiperlab.cli.targets import trusted
from hiperlab.errors import UserError
from hiperlab.model.stack import FrozenStack
from hiperlab.report.environment import environment


@dataclass(frozen=True)
class Amounts:
    """How much is measured.

    Args:
        steps: timed optimizer steps.
        warmup: steps before them.
        pictures: drawn at a time; 0 for none.
        sampler_steps: denoising steps of a picture.
        startup: fresh processes that are timed; 0 for none.
    """

    steps: int
    warmup: int
    pictures: int
    sampler_steps: int
    startup: int


def measure(jobs: Sequence[Job], baseline: Job | None, amounts: Amounts, out: Path | None) -> dict[str, Any]:
    """Measure every job, print the table and keep it.

    Args:
        jobs: one row each, all of one model and precision.
        baseline: composed with `method=ti`, to be timed against diffusers; None leaves that out.
        amounts: how much.
        out: JSON file, written anew after every row; None keeps nothing.

    Returns:
        What the file holds.
    """
    quiet()
    _check(jobs)
    cfg, dtype = jobs[0].cfg, getattr(torch, jobs[0].cfg.precision.unet)
    found: dict[str, Any] = {"environment": environment(), "amounts": asdict(amounts), "rows": []}
    _keep(out, found)  # now: a folder that cannot be written is told before anything is measured
    if amounts.startup:
        found["startup_s"] = start_up(amounts.startup)
    with trusted(["hiperlab.bench"]):
        stack = open_stack(cfg)
        found["ceiling_tflops"] = ceiling(stack.device, dtype) / 1e12
        print("\n".join([*lines(found), heading()]), flush=True)
        for job in jobs:
            found["rows"].append(row(job, stack, amounts, found["ceiling_tflops"]))
            _keep(out, found)
            print(*lines({"rows": found["rows"][-1:]}), sep="\n", flush=True)
        if baseline is not None:
            found["diffusers"] = against_diffusers(baseline.cfg, stack, amounts.warmup, amounts.steps)
            print(*lines({"diffusers": found["diffusers"]}), sep="\n", flush=True)
    _keep(out, found)
    return found


def _check(jobs: Sequence[Job]) -> None:
    """Refuse several concepts of a method whose trainings cannot share a pass.

    Raises:
        UserError: naming it.
    """
    for job in jobs:
        why = get_class(job.cfg.method._target_).why_alone  # type: ignore[attr-defined]
        if job.concepts > 1 and why:
            raise UserError(f"method={job.method}: {why}. Leave it or --concepts out.")


def quiet() -> None:
    """Bars of files that load in a moment, and torch's news for Lightning, would stand between the lines."""
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", ".*LeafSpec.*")


def _keep(out: Path | None, found: dict[str, Any]) -> None:
    """Write what is known so far.

    Raises:
        UserError: the file cannot be written.
    """
    if out is None:
        return
    try:
        files.write_json(out, found)
    except OSError as error:
        raise UserError(f"--json {out} cannot be written ({error.strerror}): choose another file.") from error


def row(job: Job, stack: FrozenStack, amounts: Amounts, ceiling_tflops: float) -> dict[str, Any]:
    """All numbers of one method.

    Args:
        job: what is measured.
        stack: its frozen model, on its device.
        amounts: how much.
        ceiling_tflops: what the device can do at most, 10^12 operations a second.
    """
    forget_peak()
    trainee = Trainee(job.cfg, stack, job.concepts, job.folded)
    for _ in range(amounts.warmup):
        trainee.step()
    typical = median(seconds(trainee.step, trainee.device) for _ in range(amounts.steps))
    peak = peak_megabytes(trainee.device)
    operations = Operations()
    with watched(operations, [(stack, "predict", "unet")]):
        whole = operations.count(trainee.step)
    found: dict[str, Any] = {
        "method": job.method,
        "model": job.model,
        "size": stack.size,
        "precision": job.precision,
        "batch": trainee.rows,
        "concepts": job.concepts,
        "folded": job.folded,
        "published_steps": job.published_steps,
        "trainable_parameters": sum(
            p.numel() for method in trainee.methods for p in method.parameters() if p.requires_grad
        ),
        "step_ms": 1000 * typical,
        "samples_per_s": job.concepts * trainee.rows / typical,
        "concepts_per_hour": job.concepts * 3600 / (typical * job.published_steps),
        "peak_mb": peak,
        "parts_ms": split(trainee, max(2, amounts.steps // 2)),
        "unet_forward_gflop": operations.parts.get("unet", 0) / 1e9,
        "step_gflop": whole / 1e9,
        "share_of_ceiling": whole / typical / (ceiling_tflops * 1e12),
    }
    if amounts.pictures:
        found["sampler_steps"] = amounts.sampler_steps
        found["pictures_per_s"] = drawn_per_second(job, trainee, amounts)
    return found


def split(trainee: Trainee, steps: int) -> dict[str, float]:
    """Milliseconds of each part of a step, means over `steps`: text, unet (forward), backward, optimizer, rest.

    The rest is draws, losses, and encoding pictures where a method does that anew (Custom Diffusion's augmentation).
    """
    parts = Parts(trainee.device)
    texts = [(method, "condition", "text") for method in trainee.methods]
    with watched(parts, [*texts, (trainee.stack, "predict", "unet")]):
        for _ in range(steps):
            with parts(REST):
                trainee.step(parts)
    return {name: 1000 * total / steps for name, total in parts.seconds.items()}


def drawn_per_second(job: Job, trainee: Trainee, amounts: Amounts) -> float:
    """Pictures a second, drawn together with the run's sampler and guidance, decoded; the second call counts."""
    sampler = instantiate(job.cfg.sampler, steps=amounts.sampler_steps)

    def draw() -> None:
        trainee.draw(amounts.pictures, steps=sampler.steps, guidance=sampler.guidance, sampler=sampler)

    draw()
    return amounts.pictures / seconds(draw, trainee.device)
