"""Values of the wrong kind, named before anything heavy is imported: `fit.steps=abc` is no number.

The kinds are those of the yaml defaults: nothing has to be declared twice, and a user's own groups are checked too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hydra.core.config_loader import ConfigLoader
from omegaconf import DictConfig, OmegaConf

from hiperlab.cli.overrides import parse
from hiperlab.errors import UserError

LEAST = {  # the door's own numbers with a smallest value
    "fit.steps": 0, "fit.batch_size": 1, "fit.micro_batch_size": 1, "fit.checkpoint_every": 0,
    "fit.sample_every": 0, "fit.sample_prompts": 0, "sample.prompts": 1, "sample.batch_size": 1, "sampler.steps": 1,
    "model.size": 8,
}  # fmt: skip
# Lightning takes devices=2, devices=[0,3] and devices=auto alike; one held-out subject or several.
FREE = ("trainer.", "data.identity_seed")


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
    defaults = dict(_leaves(OmegaConf.to_container(base, resolve=False)))
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
        if kind and not _fits(value, kind):
            raise UserError(f"{key}={value}: expected {kind}, e.g. {key}={str(default).replace(' ', '')}.")
        if key in LEAST and (not _fits(value, "a whole number") or value < LEAST[key]):
            raise UserError(f"{key}={value}: expected a whole number, {LEAST[key]} or more.")


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
    """What a default asks for; "" for texts and nulls, which take anything."""
    if isinstance(default, bool):
        return "true or false"
    if isinstance(default, int):
        return "a whole number"
    if isinstance(default, float):
        return "a number"
    return "a list" if isinstance(default, list) and default else ""


def _fits(value: Any, kind: str) -> bool:
    if kind == "true or false":
        return isinstance(value, bool)
    if kind == "a list":
        return isinstance(value, list)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, int) or kind == "a number"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
