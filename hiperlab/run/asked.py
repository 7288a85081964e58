"""From a command line to a composed run inside Hydra; heavy imports come last."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import run_job
from hydra.types import HydraContext, RunMode

from hiperlab.cli.compose import Request, check_config, open_hydra
from hiperlab.cli.model_defaults import line
from hiperlab.cli.overrides import values
from hiperlab.cli.process import config_dir, told
from hiperlab.cli.run_dir import HANDED, choose_run_dir, remove_unused, with_earlier
from hiperlab.cli.targets import trusted
from hiperlab.errors import UserError


@contextmanager
def asked(args: argparse.Namespace) -> Iterator[tuple[Any, Request]]:
    """Hydra, ready to compose what a command line's flags and overrides ask for.

    Raises:
        UserError: they cannot be read.
    """
    allowed = values(args.overrides).get("allowed_targets") or []
    if not isinstance(allowed, list):
        raise UserError(f"allowed_targets={allowed}: expected a list of modules, allowed_targets=[mymethods].")
    spelt = [re.sub(r"^\+(experiment=)", r"\1", line) for line in args.overrides]  # with or without the +
    # Hydra keeps the name `defaults` for itself.
    lines = with_earlier([re.sub(r"^defaults=", "defaults_from=", line) for line in spelt])
    request = Request(*places(args), lines, [str(module) for module in allowed])
    try:
        yield open_hydra(request), request
    finally:
        GlobalHydra.instance().clear()


def places(args: argparse.Namespace) -> tuple[Path, Path | None, str]:
    """The conf folder, a user's own beside it, and the name of the primary config."""
    conf = Path(args.config_path) if args.config_path else config_dir()
    extra = Path(args.config_dir) if args.config_dir else None
    return conf, extra, (args.config_name or "config").removesuffix(".yaml")


def within_run(hydra: Any, request: Request, cfg: Any, task: Callable[[Any], Any]) -> Any:
    """Check the config, choose the folder and run a task there (what Hydra.run does, without composing again).

    Returns:
        What the task returned.

    Raises:
        UserError: a mistake in the config; and whatever the task raises.
    """
    cfg.hydra.mode = RunMode.RUN
    check_config(cfg, request, hydra, request.overrides)
    chosen = cfg.hydra.runtime.choices
    said = line(cfg, str(chosen.get("experiment") or chosen.get("model")))
    if said and not cfg.artifacts:  # kept concepts bring the settings they were learnt with
        print(f"hiperlab: {said}", flush=True)
    ours = cfg.run_dir is None
    folder = choose_run_dir(cfg, cfg.hydra.runtime.choices, request.overrides)
    ours = ours and not folder.exists()
    os.environ[HANDED] = str(folder)
    cfg.run_dir = str(folder)
    failure: list[BaseException] = []
    found: list[Any] = []

    def guarded(task_cfg: Any) -> None:
        try:
            with trusted(request.allowed_targets):
                found.append(task(task_cfg))
        except BaseException as error:  # raised again below: Hydra would print its own lines before ours
            failure.append(error)

    callbacks = Callbacks(cfg)
    context = HydraContext(config_loader=hydra.config_loader, callbacks=callbacks)
    callbacks.on_run_start(config=cfg, config_name=request.config_name)
    ended = run_job(guarded, cfg, "hydra.run.dir", None, context)
    callbacks.on_run_end(config=cfg, config_name=request.config_name, job_return=ended)
    if failure:
        if ours and told(failure[0])[1] == 2:
            remove_unused(folder)
        raise failure[0]
    return found[0]
