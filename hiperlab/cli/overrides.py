"""Overrides as Hydra writes them (`method=ti`, `+a.b=1`, `~c`): read, written, merged. No torch here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from hiperlab.errors import UserError

# What overrides.yaml never holds: where and how far it ran, and what may be imported (asked anew each time).
UNRECORDED = ("run_dir", "resume", "resume_data", "stages", "fold", "allowed_targets")


def parse(lines: Sequence[str], loader: ConfigLoader | None = None) -> list[Override]:
    """Read overrides; with a loader also `glob(*)` sweeps over config groups can be expanded.

    Raises:
        UserError: a line that Hydra's grammar cannot read.
    """
    parser = OverridesParser.create(config_loader=loader)
    parsed = []
    for line in lines:
        try:
            parsed.append(parser.parse_override(line))
            parsed[-1].config_loader = loader
        except HydraException:
            raise UserError(
                f"Cannot read '{line}': expected key=value (a list: key=[a,b]; text with spaces or commas: "
                "\"key='a, b'\"; see python -m hiperlab.run --help)."
            ) from None
    return parsed


def values(lines: Sequence[str]) -> dict[str, Any]:
    """The plain values by key, the last one winning; sweeps and deletions are left out."""
    return {o.key_or_group: o.value() for o in parse(lines) if not o.is_sweep_override() and not o.is_delete()}


def plain(lines: Sequence[str], loader: ConfigLoader | None = None) -> list[str]:
    """The overrides that are of one value each: those of sweeps are left out."""
    return [line for override, line in zip(parse(lines, loader), lines) if not override.is_sweep_override()]


def assign(key: str, value: object) -> str:
    """`key='value'`, quoted so that Hydra reads any path or text back as it was."""
    return f"{key}={QuotedString(str(value), Quote.single).with_quotes()}"


def merge(recorded: Sequence[str], new: Sequence[str]) -> list[str]:
    """Recorded overrides followed by the new ones; a new one replaces the recorded one of the same key.

    A plain new override takes over the `+` of the one it replaces: without it the key would not exist.
    """
    earlier = {o.key_or_group: o for o in parse(recorded)}
    lines, replaced = [], set()
    for override, line in zip(parse(new), new):
        old = earlier.get(override.key_or_group)
        if old is not None:
            replaced.add(override.key_or_group)
            prefix = re.match(r"\+*", old.input_line or "")
            if prefix and override.type.name == "CHANGE":
                line = prefix.group() + line
        lines.append(line)
    return [o.input_line or "" for key, o in earlier.items() if key not in replaced] + lines


def without(lines: Sequence[str], keys: Sequence[str]) -> list[str]:
    """The overrides whose key is none of `keys` nor below one of them (`logger` also drops `logger.mode`)."""
    return [
        line
        for override, line in zip(parse(lines), lines)
        if not any(override.key_or_group == key or override.key_or_group.startswith(f"{key}.") for key in keys)
    ]


def choices(override: Override) -> list[str]:
    """Every value of a sweep as written after `=`; an interval gives its two ends, a plain override its only value.

    Raises:
        UserError: a sweep over nothing.
    """
    if override.is_interval_sweep():
        interval: Any = override.value()
        return [str(interval.start), str(interval.end)]
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    try:
        found = list(override.sweep_string_iterator())
    except HydraException as error:
        raise UserError(f"'{override.input_line}' cannot be swept: {' '.join(str(error).split())}") from None
    if not found:
        raise UserError(f"'{override.input_line}' sweeps over nothing: no value matches.")
    return found
