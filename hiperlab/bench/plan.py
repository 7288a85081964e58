"""What is measured: each method's configuration, composed as a run composes it, with the published settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from hiperlab.cli.compose import Request, check_config, compose, open_hydra
from hiperlab.cli.process import config_dir
from hiperlab.errors import UserError
from hiperlab.model.kind import config_is_sdxl

METHODS = ("ti", "xti", "neti", "hiper", "lora", "custom_diffusion", "dreambooth")
UNEVEN = ("imagic", "null_text", "style_diffusion")  # phases, or a path: their first steps say nothing about the others
RANDOM = {"sd14": "sd15", "sd15": "sd15", "sdxl": "sdxl"}  # model -> what of `hiperlab.bench.real_shape` builds it


@dataclass(frozen=True)
class Job:
    """One row of the table.

    Args:
        method: a member of conf/method.
        model: a member of conf/model.
        precision: a member of conf/precision.
        cfg: the composed configuration.
        published_steps: optimizer steps of one concept, as the method's yaml has them; a model's own budget
            (model=tiny: 60) says nothing about the method.
        concepts: how many share each pass of the frozen U-Net.
        folded: each of them has a method of its own, as jobs of a sweep.
    """

    method: str
    model: str
    precision: str
    cfg: DictConfig
    published_steps: int
    concepts: int = 1
    folded: bool = False


def plan(
    methods: Sequence[str],
    model: str,
    precision: str,
    random: bool,
    overrides: Sequence[str],
    concepts: Sequence[int] = (1,),
    even_only: bool = True,
    folded: bool = False,
) -> list[Job]:
    """A job for each method and number of concepts.

    Args:
        methods: members of conf/method.
        model: a member of conf/model.
        precision: a member of conf/precision.
        random: whether the model has random weights instead of its files.
        overrides: further settings, as the door takes them.
        concepts: numbers of concepts that share each pass.
        even_only: refuse methods whose steps are not alike.
        folded: whether each concept has a method of its own.

    Raises:
        UserError: a name or setting is unknown, a method cannot be timed, or the model's shape cannot be built.
    """
    if even_only and (uneven := [name for name in methods if name in UNEVEN]):
        raise UserError(f"method={uneven[0]}: its steps are not alike, so a few of them do not time it. Leave it out.")
    if not methods:
        raise UserError("--methods names none: give ti, or ti,lora.")
    if random and model not in RANDOM:
        raise UserError(f"--random builds {', '.join(RANDOM)}, not {model}: leave it out, or --model sd15.")
    found = composed(methods, model, precision, overrides)
    jobs = [
        Job(name, model, precision, cfg, _published_steps(name), number, folded)
        for name, cfg in zip(methods, found, strict=True)
        for number in concepts
    ]
    if random:
        for cfg in found:
            _random(cfg, RANDOM[model])
    _check_base(found)
    return jobs


def _check_base(found: Sequence[DictConfig]) -> None:
    """Refuse a method that does not run on the model, before any row is timed.

    Raises:
        UserError: naming the first.
    """
    if found and config_is_sdxl(found[0].model):
        for cfg in found:
            method: Any = get_class(cfg.method._target_)
            method.check_sdxl(str(cfg.model.name))


def composed(methods: Sequence[str], model: str, precision: str, overrides: Sequence[str]) -> list[DictConfig]:
    """Each method's configuration with its published settings, reading and keeping nothing on disk.

    Args:
        methods: members of conf/method, any of them.
        model: a member of conf/model.
        precision: a member of conf/precision.
        overrides: further settings, as the door takes them.

    Raises:
        UserError: a name or setting is unknown.
    """
    request = Request(config_dir(), None, "config", list(overrides))
    found = []
    try:
        hydra = open_hydra(request)
        for name in methods:
            groups = [f"method={name}", f"model={model}", f"precision={precision}"]
            lines = [*groups, "defaults_from=published", *overrides]
            cfg = compose(hydra, request, lines)
            check_config(cfg, request, hydra, lines)
            _in_memory(cfg)
            found.append(cfg)
    finally:
        GlobalHydra.instance().clear()
    return found


def _published_steps(method: str) -> int:
    """Optimizer steps of one concept.

    Raises:
        UserError: the method is not trained, so there is no step to time.
    """
    steps = int(OmegaConf.load(config_dir() / "method" / f"{method}.yaml").fit.steps)
    if not steps:
        raise UserError(f"method={method} trains nothing, so it has no step to time. Leave it out.")
    return steps


def _in_memory(cfg: DictConfig) -> None:
    """Nothing is read from disk or kept there: one class picture of one step, no caches.

    What a step costs does not depend on how many class pictures there are, nor on what they show.
    """
    if "prior" in cfg.method:
        cfg.method.prior.update({"count": 1, "steps": 1, "folder": None, "real": None})
    if "cache" in cfg.method:
        cfg.method.cache = None


def _random(cfg: DictConfig, shape: str) -> None:
    """Random weights in the place of files."""
    switches = {key: cfg.model[key] for key in ("name", "size", "optimise") if key in cfg.model}
    cfg.model = {"_target_": f"hiperlab.bench.real_shape.{shape}", **switches}
