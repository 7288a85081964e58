"""What runs are called side by side: their method, and those of their settings that tell runs of one method apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from hiperlab.cli.overrides import UNRECORDED, parse
from hiperlab.cli.run_dir import FREE
from hiperlab.errors import UserError

STEPS = "fit.steps"
PLACES = ("data.dir", "data.image")  # where pictures lie: the same names in other folders are other subjects
# What makes no other method of a run: seeds, subjects, prompts, judges, how far it went and where it ran.
UNSHOWN = (
    *FREE, *UNRECORDED, "seed", "data", "sweep", "metric", "objective", "sample.seeds", "sample.prompts",
    "sample.texts", "sample.batch_size", "fit.micro_batch_size", "fit.sample_every", "fit.sample_prompts",
    "fit.checkpoint_every", "fit.keep_checkpoints",
)  # fmt: skip
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast where libyaml is there


class Contender(NamedTuple):
    """One line of the tables: a method with its settings, and a variant of its pictures.

    Attributes:
        method: its name.
        settings: (key, value) pairs that tell it from others of the same method.
        variant: of the pictures, such as "strength=0.5"; "" for none.
    """

    method: str
    settings: tuple[tuple[str, str], ...]
    variant: str

    @property
    def name(self) -> str:
        """As tables show it."""
        return " ".join(
            [self.method, *(f"{key}={value}" for key, value in self.settings), *filter(None, [self.variant])]
        )


def overrides(folder: Path) -> dict[str, str]:
    """What a run was asked, key -> value as text; none where it kept no record.

    Raises:
        UserError: overrides.yaml is no list of overrides.
    """
    path = folder / "overrides.yaml"
    if not path.is_file():
        return {}
    try:
        lines = yaml.load(path.read_text(encoding="utf-8"), Loader=_LOADER)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path.name} cannot be read: {' '.join(str(error).split())[:120]}") from None
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise UserError(f"{path.name} is not a list of overrides")
    return dict(_assignment(line) for line in lines)


def told_apart(
    asked: Sequence[Mapping[str, str]], configs: Sequence[Mapping[str, Any]]
) -> list[tuple[tuple[str, str], ...]]:
    """For runs of one method, the settings in which they differ.

    Args:
        asked: each one's overrides.
        configs: each one's `config`: a setting that only some were asked has in the others what that says.
    """
    keys = list(dict.fromkeys(key for each in asked for key in each if shown(key)))
    differing = [key for key in keys if len({each.get(key) for each in asked}) > 1]
    if not differing:
        return [()] * len(asked)
    choosing = {key: choice for key in differing if (choice := _chosen_by(key))}
    full, idle = [], []
    for each, own in zip(asked, configs, strict=True):
        missing = [key for key in (*differing, *(key for key, _ in choosing.values())) if key not in each]
        composed = {key: text for key in missing if (text := _composed(own, key)) is not None}
        full.append({**composed, **each})
        idle.append({key for key, (by, name) in choosing.items() if full[-1].get(by, name) != name})
    runs = list(zip(full, idle, strict=True))
    # Of a setting that counts for some runs only, these alone must differ.
    differing = [key for key in differing if len({each.get(key) for each, off in runs if key not in off}) > 1]
    return [tuple((key, each[key]) for key in differing if key in each and key not in off) for each, off in runs]


def _chosen_by(key: str) -> tuple[str, str] | None:
    """Of a setting of one of several alternatives, the key that chooses among them, and this one's name.

    Configs name a table of alternatives in the plural and the choice in the singular beside it:
    `method.tuners.oft.lr` counts where `method.tuner` is oft.
    """
    parts = key.split(".")
    for place, part in enumerate(parts[1:-1], 1):
        if part.endswith("s"):
            return ".".join([*parts[:place], part[:-1]]), parts[place + 1]
    return None


def in_order(settings: tuple[tuple[str, str], ...]) -> tuple[tuple[str, bool, float, str], ...]:
    """What settings are sorted by: numbers as numbers, before texts."""
    found = []
    for key, text in settings:
        try:
            found.append((key, False, float(text), text))
        except ValueError:
            found.append((key, True, 0.0, text))
    return tuple(found)


def shown(key: str) -> bool:
    """Whether a setting may be part of a name."""
    return key != "method" and not any(key == each or key.startswith(f"{each}.") for each in UNSHOWN)


@lru_cache(maxsize=10_000)
def _assignment(line: str) -> tuple[str, str]:
    """A line of overrides as key and value; most lines of a sweep's runs are the same, and reading one is slow."""
    override = parse([line])[0]
    return override.key_or_group, "~" if override.is_delete() else as_text(override.value())


def as_text(value: Any) -> str:
    """A setting's value as names show it: 3e-3 and 0.003 are the same."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(as_text, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{as_text(each)}' for key, each in value.items())}}}"
    return str(value)


def config(folder: Path) -> dict[str, Any]:
    """The composed config; {} where there is none, or none that can be read: names are then a little longer."""
    try:
        found = yaml.load((folder / "config.yaml").read_text(encoding="utf-8"), Loader=_LOADER)
    except (yaml.YAMLError, UnicodeDecodeError, OSError):
        return {}
    return found if isinstance(found, dict) else {}


def _composed(found: Any, key: str) -> str | None:
    """A setting's value in the composed config; None where it has none (a group's member is not kept there)."""
    for part in key.split("."):
        if not isinstance(found, dict) or part not in found:
            return None
        found = found[part]
    return None if isinstance(found, dict) else as_text(found)


# ---- short names ----------------------------------------------------------------------------------------------------


def few(names: Sequence[str], most: int = 4) -> str:
    """Some names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def cut(text: str, most: int) -> str:
    """A name of at most that many letters: its end tells contenders apart, its beginning is their method."""
    return text if len(text) <= most else f"{text[: most // 3]}…{text[-(most - most // 3 - 1) :]}"


def shortened(names: Sequence[str], most: int) -> list[str]:
    """Names cut to at most `most` letters (8 or more), different ones to different texts.

    Those that would look alike keep the words that tell them apart, then their settings without the tables they are
    of; what still looks alike is numbered.
    """
    found = {name: cut(name, most) for name in names}
    for shorter in (_own_words, _last_parts):
        for alike in _alike(found):
            found.update({name: cut(text, most) for name, text in shorter(alike).items()})
    for alike in _alike(found):
        for number, name in enumerate(alike, 1):
            end = f" #{number}"
            found[name] = f"{found[name][: most - len(end)]}{end}"
    return [found[name] for name in names]


def _alike(short: Mapping[str, str]) -> list[list[str]]:
    """Groups of different names with the same short one."""
    groups: dict[str, list[str]] = {}
    for name, text in short.items():
        groups.setdefault(text, []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _own_words(names: Sequence[str]) -> dict[str, str]:
    """Each name's first word, and those that not all have."""
    shared = set.intersection(*(set(name.split()) for name in names))
    return {
        name: " ".join([name.split()[0], "…", *(word for word in name.split()[1:] if word not in shared)])
        for name in names
        if name.split()
    }


def _last_parts(names: Sequence[str]) -> dict[str, str]:
    """The words of `_own_words`, settings by the last part of their keys."""
    return {
        name: " ".join(
            f"{key.rpartition('.')[2]}={value}" if equals else word
            for word in text.split()
            for key, equals, value in [word.partition("=")]
        )
        for name, text in _own_words(names).items()
    }
