"""stage.json: what a stage was asked, how far it came and what its self-check found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hiperlab import files
from hiperlab.errors import UserError

NAME = "stage.json"
# What may change between two calls without making earlier work another recipe's.
FREE = ("budget_minutes", "minutes", "steps", "checkpoint_every", "processes", "check")


def digest(settings: Mapping[str, Any]) -> str:
    """12 hex digits of the settings that make a stage's result what it is."""
    text = json.dumps(_fixed(settings), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _fixed(node: Any) -> Any:
    """The settings without those that say only how long and with how much help."""
    if isinstance(node, Mapping):
        return {key: _fixed(value) for key, value in node.items() if key not in FREE}
    return node


def read(folder: Path) -> dict[str, Any] | None:
    """The record of a stage, or None if it never started.

    Raises:
        UserError: the file is there and is no JSON.
    """
    path = folder / NAME
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}): delete the stage's folder and train it again.") from None


def done(folder: Path) -> bool:
    """Whether a stage has left its weights: its steps or its minutes are used up."""
    return (read(folder) or {}).get("status") in ("finished", "budget")


def made(folder: Path) -> str:
    """12 hex digits naming what a stage has produced: its weights' bytes, or without weights its settings."""
    files_ = sorted(path for path in (folder / "weights").rglob("*") if path.is_file())
    if not files_:
        return str((read(folder) or {}).get("digest"))
    text = "".join(f"{path.relative_to(folder)} {files.sha256(path)}\n" for path in files_)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def write(folder: Path, **values: Any) -> None:
    """Add values to a stage's record."""
    files.write_json(folder / NAME, {**(read(folder) or {}), **values})
