"""Settings that a model or an experiment brings for each method, in place of the published ones.

Published settings were made for Stable Diffusion; a model of another size needs other rates and steps. Its yaml holds
one table, `tuned`: method -> setting -> value, and under "default" what holds for every method that does not say
otherwise. An experiment that compares methods holds such a table of its own, `per_method`; the model's is left aside
then, or stands under it with `base: model` in it. The command line always wins. After composing, `tuned` holds only
what was put in, and what stood there before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from hiperlab.cli.overrides import parse
from hiperlab.errors import UserError

SOURCES = ("model", "published")
GROUPS = ("method", "model", "sampler")  # choosing a member of these says nothing about its settings


def apply(cfg: DictConfig, lines: Sequence[str]) -> None:
    """Put the model's or the experiment's settings for the chosen method into a composed config, in place.

    Args:
        cfg: composed; `hydra.runtime.choices` names method, model and experiment.
        lines: the overrides it was composed from; a setting named there is left as it is. With an experiment only its
            own `per_method` counts, over the model's where it says so.

    Raises:
        UserError: `defaults_from` names no source; a table is none, or names a setting that the method does not have.
    """
    if "tuned" not in cfg:
        return
    source = cfg.get("defaults_from")
    if source not in SOURCES:
        raise UserError(f"defaults_from={source}: expected model (its own table) or published.")
    chosen = cfg.hydra.runtime.choices
    name, method = "tuned", str(chosen.get("method"))
    wanted: dict[str, Any] = {}
    if str(chosen.get("experiment")) != "None":
        name, base = "per_method", OmegaConf.select(cfg, "per_method.base")
        if base == "model":
            wanted = _of(_table(cfg, "tuned"), method)
        elif base is not None:
            raise UserError(f"per_method.base={base}: expected model, whose table stands under the experiment's then.")
    wanted |= _of(_table(cfg, name), method)
    if source == "published":
        wanted = {}
    said = [override.key_or_group for override in parse(lines) if override.key_or_group not in GROUPS]
    put: dict[str, Any] = {}
    for key, value in wanted.items():
        if any(key == each or key.startswith(f"{each}.") for each in said):
            continue
        before = OmegaConf.select(cfg, key, default=_MISSING)
        if before is _MISSING:
            raise UserError(f"{name}.{chosen.get('method')}: {key} is no setting of method={chosen.get('method')}.")
        if before != value:
            put[key] = {"used": value, "published": before}
            OmegaConf.update(cfg, key, value)
    with open_dict(cfg):
        cfg.tuned = put


_MISSING = object()


def _table(cfg: DictConfig, name: str) -> dict[str, dict[str, Any]]:
    """Method -> setting -> value.

    Raises:
        UserError: it is another thing.
    """
    given = cfg.get(name, {})
    table: Any = OmegaConf.to_container(given, resolve=False) if OmegaConf.is_dict(given) else None
    if table is not None:
        table.pop("base", None)
    if table is None or not all(isinstance(each, dict) for each in table.values()):
        raise UserError(f"{name}={given}: expected a table, method -> setting -> value, as in conf/model/mini.yaml.")
    return table


def _of(table: Mapping[str, dict[str, Any]], method: str) -> dict[str, Any]:
    """What a table says of a method: its own settings before everybody's."""
    return {**table.get("default", {}), **table.get(method, {})}


def line(cfg: Mapping[str, Any], whose: str) -> str:
    """What was put in, for people: `mini: fit.steps 300 (published 5000); defaults=…`; may be "".

    Args:
        cfg: composed.
        whose: name of the model or experiment that brought it.
    """
    put = cfg.get("tuned") or {}
    if not put:
        return ""
    names = [f"{key} {each['used']} (published {each['published']})" for key, each in put.items()]
    return f"{whose}: {', '.join(names)}; defaults=published for those"
