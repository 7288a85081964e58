"""Compose before anything heavy is imported, and turn Hydra's complaints into one line with the nearest names."""

from __future__ import annotations

import copy
import difflib
import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import __version__ as hydra_version
from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from hiperlab.cli.model_defaults import apply as apply_tuned
from hiperlab.cli.overrides import choices, parse
from hiperlab.cli.process import find_plugins
from hiperlab.cli.targets import check_targets
from hiperlab.cli.value_types import check_types, group_lines
from hiperlab.errors import UserError, near

STAGES = ("fit", "sample", "score", "summary")
EXTRAS = {  # the module that a launcher or sweeper needs -> what installs it
    "hydra_plugins.hiperlab_submitit": ("slurm", "hydra/launcher=submitit_*"),
    "hydra_plugins.hydra_submitit_launcher": ("slurm", "hydra/launcher=submitit_*"),
    "hydra_plugins.hiperlab_optuna": ("optuna", "hydra/sweeper=optuna"),
}


@dataclass(frozen=True)
class Request:
    """What the command line asked for.

    Args:
        config_dir: hiperlab's conf folder (or `--config-path`).
        extra_dir: the user's `--config-dir`, whose groups are added.
        config_name: name of the primary config.
        overrides: as given, an earlier run's put in front.
        allowed_targets: modules allowed on the command line.
    """

    config_dir: Path
    extra_dir: Path | None
    config_name: str
    overrides: list[str]
    allowed_targets: list[str] = field(default_factory=list)


def open_hydra(request: Request) -> Hydra:
    """Hydra with the search path of this request. Close it with `GlobalHydra.instance().clear()`."""
    find_plugins()
    for folder in (request.config_dir, request.extra_dir):
        if folder is not None and not folder.is_dir():
            raise UserError(f"There is no config folder {folder}. Give an existing one.")
    if tuple(int(part) for part in hydra_version.split(".")[:2]) < (1, 4):  # from then on there is one base
        version.setbase("1.3")
    GlobalHydra.instance().clear()
    search_path = create_config_search_path(str(request.config_dir.absolute()))
    if request.extra_dir is not None:
        where = f"file://{request.extra_dir.absolute()}"
        search_path.prepend(provider="command-line", path=where, anchor=SearchPathQuery(provider="schema"))
    return Hydra.create_main_hydra2(task_name="hiperlab", config_search_path=search_path)


def compose(hydra: Hydra, request: Request, overrides: Sequence[str], mode: RunMode = RunMode.RUN) -> DictConfig:
    """The composed config with its hydra node.

    Raises:
        UserError: anything Hydra refuses, in one line.
    """
    try:
        cfg = hydra.compose_config(request.config_name, list(overrides), run_mode=mode, with_log_configuration=False)
    except (HydraException, OmegaConfBaseException, ValueError, TypeError) as error:  # two for groups that are no name
        raise _explain(error, hydra, request, overrides) from None
    try:
        apply_tuned(cfg, overrides)
    except OmegaConfBaseException as error:
        raise UserError(f"The config does not resolve: {_flat(error)}") from None
    return cfg


def check_config(cfg: DictConfig, request: Request, hydra: Hydra, lines: Sequence[str]) -> None:
    """Refuse what would fail only after the model has loaded.

    Args:
        cfg: composed from `lines`.
        request: the command line.
        hydra: for the defaults that the values are compared with.
        lines: overrides of this job.

    Raises:
        UserError: missing mandatory values, unresolvable references, unknown stages, wrong resume, foreign targets.
    """
    HydraConfig.instance().set_config(cfg)
    task = copy.deepcopy(cfg)
    with open_dict(task):
        del task["hydra"]  # what the job will see
    try:
        missing = sorted(OmegaConf.missing_keys(task))
        plain: Any = OmegaConf.to_container(task, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(_unresolved(error, task)) from None
    if missing:
        how = " ".join(f"{key}=…" for key in missing)
        raise UserError(f"Missing: {', '.join(missing)}. Give {how} on the command line.")
    _check_values(plain)
    groups = set(hydra.list_all_config_groups())
    base = hydra.compose_config(
        request.config_name,
        group_lines(lines, groups, hydra.config_loader),
        run_mode=RunMode.RUN,
        with_log_configuration=False,
    )
    check_types(base, task)
    _check_optional(task, parse(lines, hydra.config_loader))
    check_targets(plain, request.allowed_targets)


def _check_optional(cfg: DictConfig, given: Sequence[Override]) -> None:
    """Refuse settings that the command gives and nobody would read. A model or an experiment may bring them along.

    Raises:
        UserError: naming the first.
    """
    for key, choice, table in OPTIONAL:
        # A method without the key has no such choice.
        chosen = OmegaConf.select(cfg, key) if _has(cfg, key) else choice
        unread = chosen is None if choice is None else chosen != choice
        said = [each.input_line for each in given if f"{each.key_or_group}.".startswith(f"{table}.")]
        if unread and said:
            raise UserError(f"{said[0]} is read with {key}={choice or '…'} only: give both, or neither.")


def check_plugins(cfg: DictConfig) -> None:
    """Refuse a sweep whose launcher or sweeper is an extra that is not installed, naming what installs it."""
    for node in (cfg.hydra.launcher, cfg.hydra.sweeper):
        package = str(node.get("_target_", "")).rsplit(".", 2 if "hydra_plugins.hydra_" in str(node) else 1)[0]
        if package not in EXTRAS:
            continue
        extra, choice = EXTRAS[package]
        needed = "optuna" if extra == "optuna" else "hydra_plugins.hydra_submitit_launcher"
        if importlib.util.find_spec(needed) is None:
            raise UserError(f"{choice} needs an extra that is not installed: pip install 'hiperlab[{extra}]'.")


def variants(hydra: Hydra, lines: Sequence[str]) -> Iterator[list[str]]:
    """Single-job overrides that show each choice of a sweep once: the sum of the choices, not their product."""
    parsed = {o.get_key_element(): o for o in parse(lines, hydra.config_loader)}
    groups = set(hydra.list_all_config_groups())
    every = {key: _worth_trying(o, groups) for key, o in parsed.items() if not o.is_delete()}
    fixed = [o.input_line or "" for o in parsed.values() if o.is_delete()]
    first = {key: f"{key}={options[0]}" for key, options in every.items()}
    yield fixed + list(first.values())
    for key, options in every.items():
        for option in options[1:]:
            yield fixed + list({**first, key: f"{key}={option}"}.values())


def _worth_trying(override: Override, groups: set[str]) -> list[str]:
    """All members of a group, but of a long row of numbers only the ends: they compose alike."""
    options = choices(override)
    return options if override.key_or_group in groups or len(options) <= 8 else [options[0], options[-1]]


OPTIONAL = (  # key, its choice (None: any but null) with which the settings of a table are read
    ("fit.stop", "dvar", "fit.dvar"),
    ("monitor", None, "fit.monitor"),
    ("method.loss", "dco", "method.dco"),
    ("method.attention", "masactrl", "method.mutual"),
    ("method.attention", "p2p", "method.p2p"),
)
SET_BY_US = {  # arguments of Lightning's Trainer -> what to set instead
    "max_steps": "use fit.steps",
    "min_steps": "use fit.steps",
    "max_epochs": "use fit.steps",
    "min_epochs": "use fit.steps",
    "max_time": "use fit.steps, and stop with Ctrl-C or SIGTERM: a run saves and resumes",
    "gradient_clip_val": "use fit.gradient_clip",
    "gradient_clip_algorithm": "use fit.gradient_clip, which clips each concept by its own norm",
    "accumulate_grad_batches": "use fit.batch_size with a smaller fit.micro_batch_size",
    "precision": "use the group precision",
    "callbacks": "they follow from fit and sample",
    "logger": "use the group logger",
    "plugins": "they follow from the group precision",
    "log_every_n_steps": "every step is logged",
    "default_root_dir": "use run_dir",
    "enable_model_summary": "it is off",
    "num_sanity_val_steps": "there is no validation",
    "use_distributed_sampler": "every rank draws its own share",
}


def _check_values(plain: dict[str, Any]) -> None:
    """The door's own keys."""
    stages = plain.get("stages", list(STAGES))
    if not isinstance(stages, list) or not stages:
        raise UserError(f"stages={stages}: expected a list such as stages=[sample,score].{near('', STAGES)}")
    for stage in stages:
        if stage not in STAGES:
            raise UserError(f"stages=[{stage}]: no such stage.{near(str(stage), STAGES)}")
    resume = plain.get("resume")
    if resume not in (None, "auto") and not Path(str(resume)).exists():
        raise UserError(f"resume={resume}: expected null, auto or the path of a checkpoint; there is no such file.")
    for key, instead in SET_BY_US.items():
        if key in (plain.get("trainer") or {}):
            raise UserError(f"trainer.{key} is set by hiperlab itself: {instead}.")
    seed = plain.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise UserError(f"seed={seed}: expected a whole number, 0 or more.")


def _explain(error: Exception, hydra: Hydra, request: Request, overrides: Sequence[str]) -> UserError:
    """One line for a refused composition. Looks at the overrides themselves; Hydra's text is the last resort."""
    loader = hydra.config_loader
    groups = set(hydra.list_all_config_groups())
    parsed = parse(overrides, loader)
    group_lines = []
    for override in parsed:
        key, line = override.key_or_group, override.input_line or ""
        if key in groups and not (override.is_delete() or override.is_sweep_override()) and override.value() is None:
            return UserError(f"{key}=null: leave it out for the default.")
        if key in groups:
            options = loader.get_group_options(key)
            wrong = [name for name in _members(override) if name.removesuffix(".yaml") not in options]
            if wrong:
                return UserError(f"{key}={wrong[0]}: no such {key}.{near(wrong[0], options)}")
            if override.is_add() and "Multiple values" in str(error):
                return UserError(f"{line}: a {key} is always chosen; write it without the +: {line.lstrip('+')}")
            group_lines.append(line)
        elif key.startswith("hydra"):
            group_lines.append(line)
    if "Ambiguous value" in str(error) or "requires --multirun" in str(error):
        wrong_line = next(o.input_line for o in parsed if o.is_sweep_override())
        return UserError(f"'{wrong_line}' has several values: add -m for a sweep, or write a list as key=[a,b].")
    names = [option for option in loader.get_group_options("") if not option.startswith("_")]
    if request.config_name not in names:
        return UserError(f"--config-name {request.config_name}: no such config.{near(request.config_name, names)}")
    try:
        base = hydra.compose_config(request.config_name, group_lines, RunMode.MULTIRUN, with_log_configuration=False)
    except (HydraException, OmegaConfBaseException):
        return UserError(f"The config does not compose: {_flat(error)}")
    for override in parsed:
        key = override.key_or_group
        adds = override.is_add() or override.is_force_add()
        if key not in groups and not adds and not _has(base, key):
            return UserError(_unknown_key(key, base, groups))
    return UserError(f"The config does not compose: {_flat(error)}")


def _members(override: Override) -> list[str]:
    """The group members an override names; a null choice names none."""
    if override.is_delete():
        return []
    value = override.value() if not override.is_sweep_override() else list(override.sweep_iterator())
    items = value if isinstance(value, list) else [value]
    texts = [getattr(item, "text", item) for item in items if item is not None]
    return [str(text) for text in texts]


def _has(cfg: DictConfig, key: str) -> bool:
    """Whether a dotted key exists, whatever its value."""
    parent, _, last = key.rpartition(".")
    try:
        node = OmegaConf.select(cfg, parent) if parent else cfg
        return node is not None and (last in node if isinstance(node, DictConfig) else bool(node[int(last)]))
    except (OmegaConfBaseException, ValueError, IndexError, TypeError, AttributeError):
        return False


def _flat_keys(node: Any, path: str = "") -> Iterator[str]:
    """All dotted keys of a plain dict, inner ones too."""
    for key, value in node.items():
        here = f"{path}.{key}" if path else str(key)
        if key != "_target_":
            yield here
        if isinstance(value, dict):
            yield from _flat_keys(value, here)


def _unknown_key(key: str, base: DictConfig, groups: set[str]) -> str:
    """`method.lrr: no such setting. Did you mean method.lr? method has: …`."""
    plain: Any = OmegaConf.to_container(base, resolve=False)
    plain.pop("hydra", None)
    keys = list(dict.fromkeys([*_flat_keys(plain), *sorted(g for g in groups if not g.startswith("hydra"))]))
    parent, _, last = key.rpartition(".")
    while parent and parent not in keys:
        parent = parent.rpartition(".")[0]
    close = [k for k in difflib.get_close_matches(key, keys, n=4, cutoff=0.6) if k != parent][:3]
    close += [k for k in keys if k.rpartition(".")[2] == last and k not in close][: 3 - len(close)]
    depth = parent.count(".") + 1 if parent else 0
    inside = [k for k in keys if k.count(".") == depth and (not parent or k.startswith(f"{parent}."))]
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    listed = f"{parent or 'The top level'} has: {', '.join(inside)}." if inside else f"{parent} is a single value."
    return f"{key}: no such setting.{hint} {listed} (+{key}=… adds one.)"


def _unresolved(error: OmegaConfBaseException, cfg: DictConfig) -> str:
    """A reference that leads nowhere: where its path ends, and what there is instead."""
    wanted = re.search(r"Interpolation key '([\w.]+)' not found", str(error))
    asked = wanted[1] if wanted else ""
    path: list[str] = []
    node: Any = cfg
    for part in asked.split("."):
        if path and isinstance(node, DictConfig) and part not in node:
            names = [str(name) for name in node]
            return f"{error.full_key} asks for {asked}: {'.'.join(path)} has no {part}.{near(part, names)}"
        if not isinstance(node, DictConfig) or part not in node:
            break
        path.append(part)
        node = node[part]
    return f"The config does not resolve: {_flat(error)}"


def _flat(error: BaseException) -> str:
    """An exception and its cause in one line."""
    texts = [str(error)] + ([str(error.__cause__)] if error.__cause__ is not None else [])
    return " ".join(" ".join(texts).split())[:600]
