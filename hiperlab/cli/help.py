"""What `python -m hiperlab.run --help` prints: read from the yaml files themselves, so that it is never out of date."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

USAGE = """\
hiperlab: every personalisation method for Stable Diffusion, one command, fair scores

usage: python -m hiperlab.run [flags] [group=member] [key=value] [+new_key=value] [~key]

  python -m hiperlab.run method=neti data=cats                          the main job
  python -m hiperlab.run method=ti data=folder data.dir=photos/my_cat   your own photographs
  python -m hiperlab.run -m method=ti,xti,neti seed=0,1,2               a sweep, each job in its own process
  python -m hiperlab.run stages=[score] run_dir=outputs/…/…             one stage again on an earlier run
  python -m hiperlab.run run_dir=outputs/…/… resume=auto                go on with a stopped run
  python -m hiperlab.run -m hydra/sweeper=optuna seed=0 'fit.steps=range(100,500,100)'

flags: -m sweep | --cfg job [--resolve] [--package method] show the config | --config-dir DIR add your own groups
       --config-name NAME | --info [searchpath, defaults-tree, …] | --hydra-help | --version | -sc install=bash
"""
NO_GROUPS = ("wandb_sweep", "miniature")  # files for other programs that live under conf/


def first_comment(path: Path) -> str:
    """The first comment line of a yaml file that is no directive of Hydra's; "" when there is none."""
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if text.startswith("#") and not text.startswith("# @"):
            return text.lstrip("# ").strip()
        if text and not text.startswith("#"):
            return ""
    return ""


def groups(folders: Sequence[Path]) -> dict[str, dict[str, str]]:
    """Group -> member -> description, of hiperlab's conf and the user's folder; the first folder wins, as in Hydra."""
    found: dict[str, dict[str, str]] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*.yaml")):
            group = path.parent.relative_to(folder).as_posix()
            if group != "." and group.split("/")[0] not in NO_GROUPS:
                found.setdefault(group, {}).setdefault(path.stem, first_comment(path))
    return found


def defaults(config: Path) -> dict[str, str]:
    """Group -> member that the primary config chooses."""
    chosen: dict[str, str] = {}
    for entry in (yaml.safe_load(config.read_text(encoding="utf-8")) or {}).get("defaults", []):
        if isinstance(entry, dict):
            for key, member in entry.items():
                chosen[key.removeprefix("override ").removeprefix("optional ").strip().lstrip("/")] = str(member)
    return chosen


def top_keys(config: Path) -> Iterator[tuple[str, str]]:
    """(`key=default`, comment) of the primary config's own keys, one level below the top included."""
    parent = ""
    for line in config.read_text(encoding="utf-8").splitlines():
        match = re.match(r"(  )?(\w+):\s*([^#]*?)\s*(?:#\s*(.*))?$", line)
        if match is None:
            continue
        indent, key, value, comment = match.groups()
        if not indent:
            parent = key
        if parent in ("defaults", "hydra"):
            continue
        if value or not indent:
            name = f"{parent}.{key}" if indent else key
            yield (f"{name}={value}" if value else f"{name}.…"), comment or ""


def help_text(config_dir: Path, extra_dir: Path | None, config_name: str) -> str:
    """The whole help, about a screen and a half."""
    folders = [config_dir] + ([extra_dir] if extra_dir else [])
    config = next((f / f"{config_name}.yaml" for f in folders if (f / f"{config_name}.yaml").is_file()), None)
    chosen = defaults(config) if config else {}
    lines = [USAGE, "config groups (* = default):"]
    for group, members in sorted(groups(folders).items(), key=lambda item: (item[0].startswith("hydra"), item[0])):
        lines.append(f"  {group}")
        for member, text in members.items():
            mark = "*" if chosen.get(group) == member else " "
            lines.append(f"   {mark}{member:<18} {text}".rstrip())
    if config:
        lines.append("\nsettings of every run:")
        lines += [f"  {key:<34} {comment}".rstrip() for key, comment in top_keys(config)]
    return "\n".join(lines)
