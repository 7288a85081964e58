"""The door: reads the command line, checks it in seconds, then starts one run or a sweep. Heavy imports come last.

Exit codes: 0 done, 1 a failure (traceback) or a sweep with failed jobs, 2 a mistake in what was asked (one line),
130 Ctrl-C, 143 SIGTERM; a run that was stopped has saved.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.types import RunMode

from hiperlab import __version__
from hiperlab.cli.compose import Request, compose
from hiperlab.cli.flags import arguments, show, shows
from hiperlab.cli.help import help_text
from hiperlab.cli.overrides import plain
from hiperlab.cli.process import collector_paused, guarded
from hiperlab.run.asked import asked, places, within_run
from hiperlab.sweep.job import FOLDED, JOB, follow_parent
from hiperlab.sweep.main import run_sweep


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
    if argv[:1] == [FOLDED]:
        with collector_paused():
            from hiperlab.run.folded import run_folded
        return run_folded(Path(argv[1]))
    args = arguments(argv)
    if args.help:
        with suppress(BrokenPipeError):  # `--help | head`
            print(help_text(*places(args)), flush=True)
        return 0
    with asked(args) as (hydra, request):
        return show(hydra, request, args) if shows(args) else _start(hydra, request, args)


def _start(hydra: Any, request: Request, args: argparse.Namespace) -> int:
    """One run or a sweep: `-m`, or an experiment that says `hydra.mode: MULTIRUN`."""
    if args.multirun:
        return run_sweep(hydra, request)
    single = plain(request.overrides, hydra.config_loader)
    cfg = compose(hydra, request, single)
    if cfg.hydra.mode == RunMode.MULTIRUN:
        return run_sweep(hydra, request)
    if len(single) < len(request.overrides):
        cfg = compose(hydra, request, request.overrides)  # several values in a single run: it says what to do
    return _run(hydra, request, cfg)


def _run(hydra: Any, request: Request, cfg: Any) -> int:
    """One run."""
    within_run(hydra, request, cfg, lambda task_cfg: _job()(task_cfg))
    return 0


def _job() -> Callable[[Any], Any]:
    """The function that runs a composed config: hiperlab.run.stages.main, or what HIPERLAB_JOB names."""
    module, _, function = os.environ.get(JOB, "hiperlab.run.stages:main").partition(":")
    with collector_paused():
        return getattr(importlib.import_module(module), function)
