"""What pictures were drawn and judged with, beside the method, and in which of it the compared groups are unlike.

A difference between methods means something only where everything else was equal. Protocols and judges' weights that
differ are refused (`runs.read`); the settings here are named.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors

from hiperlab.compare.labels import Contender, as_text, few, shortened

SECTIONS = ("sampler", "sample", "model", "precision")  # of a config
OF_DATA = ("resolution", "center_crop", "prompts", "held_out", "references")  # other settings of data make subjects
UNSEEN = ("sample.batch_size", "model.note", "model.optimise")  # no picture depends on them
NEGATIVE = "sample.negative"
WEIGHTS = "model weights"
Asked = tuple[str, Mapping[str, str]]  # a run's data set, and its `conditions`


def conditions(config: Mapping[str, Any], asked: Mapping[str, str], folder: Path) -> dict[str, str]:
    """A run's settings that belong to the measurement: key -> value as text.

    Args:
        config: composed; empty where the run kept none: then only what it was asked is known.
        asked: its overrides.
        folder: its run folder, whose concept files say which weights they were made for.
    """
    if config:
        found = {key: text for section in SECTIONS for key, text in _flat(section, config.get(section))}
        data = config.get("data")
        if isinstance(data, dict):
            found |= {f"data.{name}": as_text(data[name]) for name in OF_DATA if name in data}
    else:
        known = (*SECTIONS, *(f"data.{name}" for name in OF_DATA))
        found = {key: text for key, text in asked.items() if _within(key, known)}
    if found.get(NEGATIVE) == as_text(None):
        found[NEGATIVE] = as_text("")  # the default until 0.1.0; only SDXL tells them apart, whose runs are newer
    found = {key: text for key, text in found.items() if not _within(key, UNSEEN) and not key.endswith("_convert_")}
    return {**found, **_weights(folder)}


def unlike(groups: Sequence[tuple[Contender, Sequence[Asked]]]) -> str:
    """A sentence that names the settings in which groups were not measured alike, "" where there are none.

    What every group's name shows is what was compared, and is not said again.

    Args:
        groups: compared ones, each with its runs.
    """
    values: dict[tuple[str, str], dict[str, set[str]]] = {}  # setting, data set it is of -> group -> its values
    for contender, runs in groups:
        for data, mine in runs:
            for key, text in mine.items():
                place = (key, data if key.startswith("data.") else "")
                values.setdefault(place, {}).setdefault(contender.name, set()).add(text)
    mixed = {key for _, runs in groups for key in _mixed(runs)}
    several = len({data for _, runs in groups for data, _ in runs}) > 1
    said: dict[tuple[tuple[str, str], ...], list[str]] = {}  # settings with the same values in the same groups are one
    for (key, data), found in values.items():
        texts = {name: " and ".join(sorted(map(_quoted, each))) for name, each in found.items()}
        if len(set(texts.values())) < 2 and key not in mixed:
            continue
        if all(_names(contender, key) for contender, _ in groups if contender.name in texts):
            continue
        said.setdefault(tuple(texts.items()), []).append(f"{key} of {data}" if several and data else key)
    if not said:
        return ""
    parts = [f"{', '.join(keys)}: {_by_value(dict(texts))}" for texts, keys in said.items()]
    return f"Not measured alike, so that a difference may come from this: {'; '.join(parts)}."


def _by_value(texts: Mapping[str, str]) -> str:
    """Each value with the groups that have it; many are "the others" where they are the most."""
    groups: dict[str, list[str]] = {}
    for name, text in texts.items():
        groups.setdefault(text, []).append(name)
    ordered = sorted(groups.items(), key=lambda pair: len(pair[1]))
    short = shortened([text for text, _ in ordered], 80)
    parts = [f"{text} ({few(names)})" for text, (_, names) in zip(short, ordered, strict=True)]
    if len(ordered) > 1 and len(ordered[-1][1]) > 2:
        parts[-1] = f"{short[-1]} (the {len(ordered[-1][1])} others)"
    return ", ".join(parts)


def _quoted(text: str) -> str:
    """A value in a sentence: texts of several words, or of none, in quotation marks."""
    line = " ".join(text.split())
    return line if line and " " not in line else f'"{line}"'


def _mixed(runs: Sequence[Asked]) -> set[str]:
    """Settings in which one group's runs of the same data set differ; how many pictures there are may."""
    seen: dict[tuple[str, str], set[str]] = {}
    for data, mine in runs:
        for key, text in mine.items():
            seen.setdefault((data, key), set()).add(text)
    return {key for (_, key), texts in seen.items() if len(texts) > 1 and not _within(key, ("sample",))}


def _names(contender: Contender, key: str) -> bool:
    """Whether a contender's name shows a setting, or the group that it is of."""
    return any(_within(key, (shown,)) for shown, _ in contender.settings)


def _within(key: str, tables: Sequence[str]) -> bool:
    """Whether a setting is one of these, or below one."""
    return any(key == each or key.startswith(f"{each}.") for each in tables)


def _flat(key: str, found: Any) -> list[tuple[str, str]]:
    """A table's settings by their whole keys."""
    if isinstance(found, dict) and found:
        return [pair for name, each in found.items() for pair in _flat(f"{key}.{name}", each)]
    return [] if found is None and "." not in key else [(key, as_text(found))]


def _weights(folder: Path) -> dict[str, str]:
    """A short name of the base that the run's concepts live in: two weights of one model's name differ in it.

    Six hex digits of the norms of some rows of the token embedding (`hiperlab.model.stack.Base.fingerprint`). Empty
    where no concept file says it: editors keep none, W&B's copies neither.
    """
    for path in sorted((folder / "artifacts").glob("*.safetensors"))[:1]:
        try:
            with safetensors.safe_open(path, "np") as file:
                base = json.loads((file.metadata() or {}).get("base", "{}"))
            norms = [f"{float(norm):.3f}" for norm in base.get("fingerprint", ())]
        except (OSError, ValueError, TypeError, AttributeError, safetensors.SafetensorError):
            return {}  # what it was trained for is then unknown, as of a run without concept files
        if norms:
            return {WEIGHTS: hashlib.blake2b(" ".join(norms).encode(), digest_size=3).hexdigest()}
    return {}
