"""Which jobs of a sweep go into one process, where trainings and drawings share passes of the frozen network.

Jobs fold that differ only in what a training may have of its own: seed, concept, settings of the method. They must ask
for the same model, precision, device, `fit` settings and stages.
"""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hiperlab.errors import UserError
from hiperlab.sweep.job import JOB, Job

SAME = ("model", "precision", "trainer", "fit", "stages", "resume", "allowed_targets")
MOST_ROWS = 32  # images that one pass of all jobs of a process trains on: a GPU is full by then


def folded(jobs: Sequence[Job], configs: Sequence[DictConfig], devices: int) -> list[list[Job]]:
    """The jobs of each process, every job once.

    Args:
        jobs: in the order of the sweep.
        configs: composed for each.
        devices: how many processes can run at a time; all of them get work.

    Raises:
        UserError: `fold` is none of auto, off or a number.
    """
    groups: dict[str, list[int]] = {}
    for number, cfg in enumerate(configs):
        key = _key(cfg) if most_jobs(cfg) > 1 and JOB not in os.environ else None
        groups.setdefault(key or f"alone {number}", []).append(number)
    found = []
    for numbers in groups.values():
        most = most_jobs(configs[numbers[0]])
        if len(numbers) > 1 and not all(_shares(configs[number]) for number in numbers):
            most = 1
        if configs[numbers[0]].get("fold", "auto") == "auto":
            most = min(most, math.ceil(len(numbers) / devices))
        found += [[jobs[number] for number in numbers[start : start + most]] for start in range(0, len(numbers), most)]
    return found


def most_jobs(cfg: DictConfig) -> int:
    """The most jobs of one process: `fold`, or as many as fill a device.

    Raises:
        UserError: `fold` is none of auto, off or a number.
    """
    asked: Any = cfg.get("fold", "auto")
    if asked == "off" or asked is False:  # what YAML makes of an unquoted off
        return 1
    if asked == "auto":
        rows = int(OmegaConf.select(cfg, "fit.batch_size", default=1)) * _concepts(cfg)
        return max(1, MOST_ROWS // max(1, rows))
    if isinstance(asked, int) and not isinstance(asked, bool) and asked >= 1:
        return asked
    raise UserError(f"fold={asked}: expected auto, off, or the most jobs of one process (fold=8).")


def _concepts(cfg: DictConfig) -> int:
    """How many concepts a job learns, as far as its settings say: the longest list of what data can be asked for."""
    asked = [
        OmegaConf.select(cfg, f"data.{name}") for name in ("concepts", "edits", "identity_seed", "subject", "item")
    ]
    return max(len(each) if OmegaConf.is_list(each) else 1 for each in asked)


def _key(cfg: DictConfig) -> str | None:
    """Equal for jobs that can be trained and drawn together; None for one that cannot, such as on several devices."""
    plain: dict[str, Any] = {name: _plain(OmegaConf.select(cfg, name)) for name in SAME}
    several = not on_one_device(plain.get("trainer") or {}, plain.get("precision") or {})
    if not {"fit", "sample"} & set(plain.get("stages") or []) or cfg.get("artifacts") or several:
        return None
    if plain.get("resume") not in (None, "auto"):
        return None
    return json.dumps(plain, sort_keys=True, default=str)


def on_one_device(trainer: Mapping[str, Any], precision: Mapping[str, Any]) -> bool:
    """Whether a training asks for one process, and no gradient scaler, which skips everybody's step.

    `devices=auto` counts: a sweep hands out one.
    """
    one = trainer.get("devices") in (1, "1", "auto") and trainer.get("num_nodes", 1) in (1, None)
    return one and trainer.get("strategy", "auto") == "auto" and not precision.get("grad_scaler")


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def _shares(cfg: DictConfig) -> bool:
    """Whether the method's U-Net calls can be shared. Imports it, and torch with it."""
    module, _, name = str(cfg.method._target_).rpartition(".")
    try:
        method = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):  # the job itself says what is wrong
        return False
    from hiperlab.base.side_by_side import shares_passes  # only now: it imports torch

    return shares_passes(method)
