"""The door: reads the command line, checks it in seconds, then starts one run or a sweep. Heavy imports come last.

Exit codes: 0 done, 1 a failure (traceback) or a sweep with failed jobs, 2 a mistake in what was asked (one line),
130 Ctrl-C, 143 SIGTERM; a run that was stopped has saved.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import run_job
from hydra.types import HydraContext, RunMode

from hiperlab import __version__
from hiperlab.cli.compose import Request, check_config, compose, open_hydra
from hiperlab.cli.flags import arguments, show, shows
from hiperlab.cli.help import help_text
from hiperlab.cli.model_defaults import line
from hiperlab.cli.overrides import values
from hiperlab.cli.process import collector_paused, config_dir, guarded
from hiperlab.cli.run_dir import HANDED, choose_run_dir, with_earlier
from hiperlab.cli.targets import trusted
from hiperlab.errors import UserError
from hiperlab.sweep.job import follow_parent
from hiperlab.sweep.main import run_sweep

JOB = "HIPERLAB_JOB"  # "module:function" instead of the stages; for tests and for running something else in a sweep


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line says.

    Args:
        argv: arguments without the program; `sys.argv[1:]` by default.

    Returns:
        The exit code.
    """
    return guarded(_main, list(sys.argv[1:] if argv is None else argv))


def _main(argv: list[str]) -> int:
    if "--version" in argv:
        print(f"hiperlab {__version__}")
        return 0
    follow_parent()
    args = arguments(argv)
    conf = Path(args.config_path) if args.config_path else config_dir()
    extra = Path(args.config_dir) if args.config_dir else None
    name = (args.config_name or "config").removesuffix(".yaml")
    if args.help:
        with suppress(BrokenPipeError):  # `--help | head`
            print(help_text(conf, extra, name), flush=True)
        return 0
    allowed = values(args.overrides).get("allowed_targets") or []
    if not isinstance(allowed, list):
        raise UserError(f"allowed_targets={allowed}: expected a list of modules, allowed_targets=[mymethods].")
    spelt = [re.sub(r"^\+(experiment=)", r"\1", line) for line in args.overrides]  # with or without the +
    # Hydra keeps the name `defaults` for itself.
    lines = with_earlier([re.sub(r"^defaults=", "defaults_from=", line) for line in spelt])
    request = Request(conf, extra, name, lines, [str(module) for module in allowed])
    try:
        hydra = open_hydra(request)
        return show(hydra, request, args) if shows(args) else _start(hydra, request, args)
    finally:
        GlobalHydra.instance().clear()


def _start(hydra: Any, request: Any, args: argparse.Namespace) -> int:
    """One run or a sweep: `-m`, or an experiment that says `hydra.mode: MULTIRUN`."""
    if args.multirun:
        return run_sweep(hydra, request)
    cfg = compose(hydra, request, request.overrides)
    if cfg.hydra.mode == RunMode.MULTIRUN:
        return run_sweep(hydra, request)
    return _run(hydra, request, cfg)


def _run(hydra: Any, request: Any, cfg: Any) -> int:
    """One run: check, choose the folder, hand over to the stages (what Hydra.run does, without composing again)."""
    cfg.hydra.mode = RunMode.RUN
    check_config(cfg, request, hydra, request.overrides)
    said = line(cfg, str(cfg.hydra.runtime.choices.get("model")))
    if said and not cfg.artifacts:  # kept concepts bring the settings they were learnt with
        print(f"hiperlab: {said}", flush=True)
    folder = choose_run_dir(cfg, cfg.hydra.runtime.choices, request.overrides)
    os.environ[HANDED] = str(folder)
    cfg.run_dir = str(folder)
    failure: list[BaseException] = []

    def task(task_cfg: Any) -> Any:
        try:
            with trusted(request.allowed_targets):
                return _job()(task_cfg)
        except BaseException as error:  # raised again below: Hydra would print its own lines before ours
            failure.append(error)
            return None

    callbacks = Callbacks(cfg)
    context = HydraContext(config_loader=hydra.config_loader, callbacks=callbacks)
    callbacks.on_run_start(config=cfg, config_name=request.config_name)
    ended = run_job(task, cfg, "hydra.run.dir", None, context)
    callbacks.on_run_end(config=cfg, config_name=request.config_name, job_return=ended)
    if failure:
        raise failure[0]
    return 0


def _job() -> Callable[[Any], Any]:
    """The function that runs a composed config: hiperlab.run.stages.main, or what HIPERLAB_JOB names."""
    module, _, function = os.environ.get(JOB, "hiperlab.run.stages:main").partition(":")
    with collector_paused():
        return getattr(importlib.import_module(module), function)
