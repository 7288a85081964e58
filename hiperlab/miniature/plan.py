"""The order of the stages, their budgets, and what all of them share."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from hiperlab.errors import UserError, near
from hiperlab.miniature import record
from hiperlab.miniature.module import Fit
from hiperlab.report.signals import StopSignals

# stage -> what must have been finished before
NEEDS: dict[str, tuple[str, ...]] = {
    "data": (),
    "latents": ("data",),
    "unet": ("data", "latents"),
    "decoder": ("data", "latents"),
    "recoded": ("data",),
    "identity": ("data",),
    "reader": ("data",),
    "scorer": ("data",),
    "export": (),
    "report": (),
}
ORDER = tuple(NEEDS)
PRODUCTS = ("export", "report")  # say what the others have become
ALWAYS = ("latents", *PRODUCTS)  # never skipped: they do only what is missing, or are cheap


@dataclass
class Workshop:
    """What every stage is given.

    Attributes:
        out: the folder of the whole training.
        base: an exported miniature, from which comes whatever is not trained here.
        seed: every random choice follows from it.
        size: picture side in pixels.
        reading_size: side at which judges and the picture tower read them; it divides `size`.
        device: where training happens.
        bf16: autocast to bfloat16.
        compile: compile the networks.
        cache_pictures: keep the pictures on the device (16 GB for the GPU preset).
        resume: go on with what is there; else start anew.
        say_every: seconds between progress lines.
        command: how to go on, printed when stopped.
        settings: the whole config, for the card.
        signals: the process's signal context.
    """

    out: Path
    base: Path
    seed: int
    size: int
    reading_size: int
    device: torch.device
    bf16: bool = False
    compile: bool = False
    cache_pictures: bool = False
    resume: bool = True
    say_every: float = 10.0
    command: str = "python -m hiperlab.miniature …"
    settings: Mapping[str, Any] = field(default_factory=dict)
    signals: StopSignals = field(default_factory=StopSignals)

    def folder(self, stage: str) -> Path:
        """The folder of a stage."""
        return self.out / stage

    def weights(self, stage: str) -> Path:
        """What a finished stage leaves for others."""
        return self.folder(stage) / "weights"


def check_stages(stages: Any) -> list[str]:
    """The asked stages in the order they are run.

    Raises:
        UserError: not a list, empty, or an unknown stage.
    """
    if not isinstance(stages, list) or not stages:
        raise UserError(f"stages={stages}: expected a list such as stages=[vae,unet].{near('', ORDER)}")
    for stage in stages:
        if stage not in NEEDS:
            raise UserError(f"stages=[{stage}]: no such stage.{near(str(stage), ORDER)}")
    return [stage for stage in ORDER if stage in stages]


def share_budget(settings: dict[str, dict[str, Any]], stages: list[str], total: float | None) -> dict[str, Any]:
    """Stretch or shrink the planned minutes of the asked stages so that they add up to `total`.

    Args:
        settings: per stage; `minutes` stands in the stage itself or in its `fit`.
        stages: the asked ones.
        total: minutes, or None to keep the plan.

    Returns:
        The settings with the minutes to keep to.

    Raises:
        UserError: a total that is not positive, or no stage that has planned minutes.
    """
    if total is None:
        return settings
    planned = sum(_minutes(settings[stage]) or 0.0 for stage in stages if stage in settings)
    if total <= 0 or planned <= 0:
        raise UserError(f"budget_minutes={total}: expected a positive number, and stages with planned minutes.")
    return {
        stage: _stretch(values, total / planned) if stage in stages else values for stage, values in settings.items()
    }


def _minutes(values: Mapping[str, Any]) -> float | None:
    return values.get("fit", values).get("minutes")


def _stretch(values: dict[str, Any], factor: float) -> dict[str, Any]:
    inner = dict(values.get("fit", values))
    if inner.get("minutes") is not None:
        inner["minutes"] *= factor
    return {**values, "fit": inner} if "fit" in values else inner


def run_stage(shop: Workshop, name: str, settings: dict[str, Any], work: Callable[..., dict[str, Any]]) -> bool:
    """Do a stage unless it is done.

    Args:
        shop: what all stages share.
        name: of the stage.
        settings: its own, handed to `work` by name.
        work: (shop, **settings) -> what stage.json should hold.

    Returns:
        Whether there was anything to do.

    Raises:
        UserError: an earlier stage is missing, or this one was begun with other settings.
    """
    for need in NEEDS[name]:
        if not record.done(shop.folder(need)):
            raise UserError(f"stage {name} needs stage {need}, which is not finished in {shop.out}: add it to stages.")
    _check_names(name, settings, work)
    inputs = {need: record.made(shop.folder(need)) for need in NEEDS[name]}
    _check_origins(shop, NEEDS[name])
    folder = shop.folder(name)
    known = record.read(folder)
    mine = record.digest({"seed": shop.seed, "size": shop.size, **settings})
    if known and not shop.resume:
        shutil.rmtree(folder)
        known = None
    if known and known["digest"] != mine and name not in ALWAYS:
        raise UserError(
            f"stage {name} in {shop.out} was begun with other settings. Choose another out=…, or resume=false to "
            "start this stage anew."
        )
    if known and name not in ALWAYS:
        changed = [need for need, made in known["inputs"].items() if made != inputs[need]]
        if changed:
            raise UserError(f"stage {name} was begun with another {changed[0]}: start it anew with resume=false.")
        if _is_done(known, settings):
            return False
    record.write(
        folder,
        stage=name,
        status="running",
        digest=mine,
        settings=settings,
        inputs=inputs,
        seed=shop.seed,
        size=shop.size,
        device=str(shop.device),
    )
    record.write(folder, **work(shop, **settings))
    return True


def _check_names(name: str, settings: Mapping[str, Any], work: Callable[..., Any]) -> None:
    """Refuse settings that were added with + and that nobody reads, or deleted ones that somebody needs."""
    for path, given, known in (
        (name, settings, list(inspect.signature(work).parameters)[1:]),
        (f"{name}.fit", settings.get("fit"), [each.name for each in fields(Fit)]),
    ):
        if given is not None and (wrong := sorted(set(given) ^ set(known))):
            raise UserError(f"{path}.{wrong[0]}: {path} takes exactly {', '.join(known)}.")


def _check_origins(shop: Workshop, stages: tuple[str, ...]) -> None:
    """Refuse to build on a stage whose own inputs have been made anew since."""
    for stage in stages:
        for need, made in (record.read(shop.folder(stage)) or {}).get("inputs", {}).items():
            if stage not in ALWAYS and made != record.made(shop.folder(need)):
                raise UserError(f"stage {stage} was trained on an earlier {need}: stages=[{stage}] resume=false first.")


def _is_done(known: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Finished, or out of a budget that has not been raised since."""
    inner, before = settings.get("fit", settings), known["settings"].get("fit", known["settings"])
    if known["status"] == "finished":
        return inner.get("steps") == before.get("steps")
    if known["status"] != "budget":
        return False
    now, then = inner.get("minutes"), before.get("minutes")
    return now is not None and then is not None and now <= then
