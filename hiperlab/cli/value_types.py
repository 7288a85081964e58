"""Values of the wrong kind, named before anything heavy is imported: `fit.steps=abc` is no number.

The kinds are those of the yaml defaults: nothing has to be declared twice, and a user's own groups are checked too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from hydra.core.config_loader import ConfigLoader
from omegaconf import DictConfig, OmegaConf

from hiperlab.cli.overrides import parse
from hiperlab.errors import UserError


class Range(NamedTuple):
    """Which values a setting may have; the one place that says so for what every run has.

    Attributes:
        what: for messages, "a number above 0".
        holds: whether a value is one.
        null: whether null is one.
    """

    what: str
    holds: Callable[[Any], bool]
    null: bool = False


def _whole(least: int, null: bool = False, most: int = 2**63 - 1) -> Range:
    return Range(f"a whole number, {least} or more", lambda v: _fits(v, "a whole number") and least <= v <= most, null)


def _number(what: str, holds: Callable[[float], bool], null: bool = False) -> Range:
    return Range(what, lambda value: _fits(value, "a number") and holds(value), null)


def _are_betas(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_fits(v, "a number") and 0 <= v < 1 for v in value)


def _are_seeds(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_whole(0).holds(each) for each in value)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _one_of(*names: str, null: bool = False) -> Range:
    known = [*names, "null"] if null else names
    return Range(f"one of {', '.join(known)}", lambda value: value in names, null)


TYPE = _one_of("float32", "bfloat16", "float16", "float64")
RANGES = {  # a method's own numbers are checked by its constructor
    "seed": _whole(0),
    "outputs_dir": Range("a folder's path", lambda value: isinstance(value, str) and bool(value)),
    "run_dir": Range("a folder's path, or null", lambda value: isinstance(value, str) and bool(value), null=True),
    "fold": Range(
        "auto, off, or the most jobs of one process, e.g. fold=8",
        lambda value: value in ("auto", "off") or value is False or _whole(1).holds(value),
    ),
    "fit.steps": _whole(0),
    "fit.batch_size": _whole(1),
    "fit.micro_batch_size": _whole(1, null=True),
    "fit.gradient_clip": _number("a number above 0, or null for none", lambda value: value > 0, null=True),
    "fit.stop": _one_of("dvar", null=True),
    "fit.dvar.window": _whole(2),
    "fit.dvar.threshold": _number("a number above 0", lambda value: value > 0),
    "fit.dvar.every": _whole(1),
    "fit.dvar.rows": _whole(1),
    "fit.dvar.parts": _whole(1),
    "monitor": Range("a score of the metric, e.g. monitor=identity, or null", _is_name, null=True),
    "fit.monitor.every": _whole(1),
    "fit.monitor.seeds": Range("a list of whole numbers, each 0 or more, e.g. fit.monitor.seeds=[1000]", _are_seeds),
    "fit.monitor.sampler_steps": _whole(1, null=True, most=1000),
    "fit.monitor.patience": _whole(0, null=True),
    "fit.monitor.min_delta": _number("a number, 0 or more", lambda value: value >= 0),
    "fit.monitor.keep": _one_of("best", "last"),
    "fit.checkpoint_every": _whole(0),
    "fit.sample_every": _whole(0),
    "fit.sample_prompts": _whole(0),
    "sample.prompts": _whole(1, null=True),
    "sample.unrelated": _whole(0),
    "sample.batch_size": _whole(1),
    "sample.seeds": Range("a list, e.g. sample.seeds=[0,1], of whole numbers, each 0 or more", _are_seeds),
    "sample.negative": Range(
        'a text, "" for an empty one, null for none', lambda value: isinstance(value, str), null=True
    ),
    "data.held_out": _whole(0),
    "sampler.steps": _whole(1),
    "sampler.guidance": _number("a number, 0 or more", lambda value: value >= 0),
    "model.size": _whole(8),
    "model.pooled_at": _one_of("end", "argmax"),
    "model.prediction_type": _one_of("epsilon", "v_prediction", null=True),
    "precision.unet": TYPE,
    "precision.vae": TYPE,
    "precision.text": TYPE,
    "trainer.num_nodes": _whole(1),
    "method.consistency": _number("a number, 0 or more, or null for none", lambda value: value >= 0, null=True),
    "method.optimizer.lr": _number("a number above 0", lambda value: value > 0),
    "method.optimizer.weight_decay": _number("a number, 0 or more", lambda value: value >= 0),
    "method.optimizer.eps": _number("a number above 0", lambda value: value > 0),
    "method.optimizer.betas": Range("two numbers from 0 to below 1", _are_betas),
}
ANYWHERE = {"seed": _whole(0), "width": _whole(1)}  # by the last part of a key
HYDRAS_OWN = ("._convert_", "._partial_", "._recursive_")
# Lightning takes devices=2, devices=[0,3] and devices=auto alike; one held-out subject or several; fold=auto or fold=8;
# a list's name or the prompts themselves.
FREE = ("trainer.", "data.identity_seed", "fold", "fit.monitor.prompts")


def group_lines(lines: Sequence[str], groups: set[str], loader: ConfigLoader) -> list[str]:
    """The overrides that choose groups or steer Hydra; composing them alone gives every other key's default."""
    kept = [o for o in parse(lines, loader) if o.key_or_group in groups or o.key_or_group.startswith("hydra")]
    return [o.input_line or "" for o in kept]


def check_types(base: DictConfig, cfg: DictConfig) -> None:
    """Refuse values of another kind than their default's, and numbers that are too small.

    Args:
        base: composed without value overrides.
        cfg: composed with them.

    Raises:
        UserError: naming the key, the value and an example.
    """
    for group in map(str, base):
        chosen = isinstance(base.get(group), DictConfig) and group != "hydra"
        if chosen and not isinstance(cfg.get(group), DictConfig):
            raise UserError(f"{group} is always chosen: leave that out for the default.")
    defaults = dict(_leaves(OmegaConf.to_container(base, resolve=False)))
    resolved = dict(_leaves(OmegaConf.to_container(cfg, resolve=True)))
    _check_tables(defaults, resolved)
    for key, value in resolved.items():
        if (odd := _not_finite(value)) is not None:
            raise UserError(f"{key}={odd}: expected a finite number of at most 64 bits.")
        if key.endswith(HYDRAS_OWN) and key in defaults and value != defaults[key]:
            raise UserError(f"{key}={value}: it says how Hydra builds that part and stays {defaults[key]}.")
        wanted = RANGES.get(key) or ANYWHERE.get(key.rpartition(".")[2])
        if wanted and not (wanted.null if value is None else wanted.holds(value)):
            raise UserError(f"{key}={_shown(value)}: expected {wanted.what}.")
    for key, value in _leaves(OmegaConf.to_container(cfg, resolve=False)):
        default = defaults.get(key)
        if (
            value is None
            or key.startswith(FREE)
            or _text(value).startswith("${")
            or _text(default).startswith("${")
            or value == default
        ):
            continue
        kind = _kind(default)
        several = isinstance(value, list) and not key.startswith("data.")  # data: one for each of several concepts
        if kind == "a text" and (several or not _fits(value, kind)):
            raise UserError(f"{key}={value}: expected a text. If it is one, quote it twice: '{key}=\"{value}\"'.")
        if kind and not _fits(value, kind):
            raise UserError(f"{key}={value}: expected {kind}, e.g. {key}={str(default).replace(' ', '')}.")


def _check_tables(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse a table where there is one value, and one value where there is a table.

    Raises:
        UserError: naming the key.
    """
    for key in given.keys() - defaults.keys():
        parents = [key.rsplit(".", cut)[0] for cut in range(1, key.count(".") + 1)]
        for parent in parents:
            if defaults.get(parent) not in (None, {}):
                raise UserError(f"{parent} is a single value, e.g. {parent}={defaults[parent]}: no table fits there.")
        inside = next((name for name in defaults if name.startswith(f"{key}.")), None)
        if inside and given[key] not in (None, {}):
            raise UserError(f"{key}={_shown(given[key])}: expected a table, e.g. {inside}={defaults[inside]}.")


def _not_finite(value: Any) -> float | None:
    """A number in a value, or in a list of it, that is NaN, infinite or larger than any library takes."""
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, list) and (inner := _not_finite(each)) is not None:
            return inner
        if isinstance(each, float) and not math.isfinite(each):
            return each
        if isinstance(each, int) and abs(each) >= 2**63:
            return each
    return None


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).replace(" ", "") if isinstance(value, list) else str(value)


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        here = f"{path}.{key}" if path else str(key)
        if here == "hydra":
            continue
        if isinstance(value, dict) and value:
            yield from _leaves(value, here)
        else:
            yield here, value


def _kind(default: Any) -> str:
    """What a default asks for; "" for null, which takes anything."""
    if isinstance(default, bool):
        return "true or false"
    if isinstance(default, int):
        return "a whole number"
    if isinstance(default, float):
        return "a number"
    if isinstance(default, str):
        return "a text"
    return "a list" if isinstance(default, list) and default else ""


def _fits(value: Any, kind: str) -> bool:
    if kind == "true or false":
        return isinstance(value, bool)
    if kind == "a list":
        return isinstance(value, list)
    if kind == "a text":
        return isinstance(value, str | list)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, int) or kind == "a number"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
