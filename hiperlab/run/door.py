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
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hiperlab import __version__
from hiperlab.errors import StoppedError, UserError

PACKAGE = Path(__file__).resolve().parent.parent
PLUGINS = PACKAGE / "plugins"
JOB = "HIPERLAB_JOB"  # "module:function" instead of the stages; for tests and for running something else in a sweep


def config_dir() -> Path:
    """The conf folder: inside the package when installed, beside it in a checkout.

    Raises:
        UserError: neither is there (a broken installation).
    """
    for folder in (PACKAGE / "conf", PACKAGE.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise UserError(f"hiperlab's conf folder is neither in {PACKAGE} nor beside it. Install hiperlab again.")


def task_overrides() -> list[str]:
    """Inside a job: what was asked, resolved, as the run folder's overrides.yaml keeps it.

    Without run_dir, resume, stages and allowed_targets, which belong to a command, not to a run.
    """
    from hydra.core.hydra_config import HydraConfig

    from hiperlab.run.door_overrides import UNRECORDED, without

    return without(list(HydraConfig.get().overrides.task), UNRECORDED)


def resume_command(run_dir: str | Path) -> str:
    """Inside a job: the command that goes on with this run."""
    import shlex

    from hydra.core.hydra_config import HydraConfig

    from hiperlab.run.door_overrides import assign
    from hiperlab.run.sweep_job import config_flags

    flags = config_flags(HydraConfig.instance().cfg.hydra) if HydraConfig.initialized() else []  # type: ignore[union-attr]
    standard = {"--config-name": "config", "--config-path": str(config_dir())}
    shown = [word for pair in zip(flags[::2], flags[1::2]) if standard.get(pair[0]) != pair[1] for word in pair]
    plain = re.fullmatch(r"[\w./-]+", str(run_dir))
    where = f"run_dir={run_dir}" if plain else assign("run_dir", run_dir)
    return shlex.join(["python", "-m", "hiperlab.run", *shown, where, "resume=auto"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line says.

    Args:
        argv: arguments without the program; `sys.argv[1:]` by default.

    Returns:
        The exit code.
    """
    return guarded(_main, list(sys.argv[1:] if argv is None else argv))


def guarded(program: Callable[[list[str]], int], argv: list[str]) -> int:
    """Run a program's own `main` in the door's environment and turn whatever it raises into an exit code."""
    with _own_environment():
        try:
            return program(argv)
        except KeyboardInterrupt:
            print("hiperlab: interrupted", file=sys.stderr)
            return 130
        except SystemExit as error:
            return error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException as error:
            return _report(error)


def _report(error: BaseException) -> int:
    """Print what went wrong; a user's mistake, however deep, is one message without a traceback."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            print(f"hiperlab: {cause}", file=sys.stderr)
            return 2
        if isinstance(cause, StoppedError):
            print(f"hiperlab: {cause}", file=sys.stderr)
            return cause.code
        cause = cause.__cause__
    traceback.print_exception(error)
    return 1


@contextmanager
def _own_environment() -> Iterator[None]:
    """Put the plugins within reach, here and in workers; afterwards leave no ranks or folders behind in os.environ."""
    from_outside = (
        "LOCAL_RANK",
        "NODE_RANK",
        "WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "PYTHONPATH",
        "HIPERLAB_RUN_DIR",
        "HIPERLAB_SWEEP_INVOCATION",
    )
    before = {key: os.environ.get(key) for key in from_outside}
    if str(PLUGINS) not in sys.path:
        sys.path.append(str(PLUGINS))
    paths = [path for path in (before["PYTHONPATH"] or "").split(os.pathsep) if path and path != str(PLUGINS)]
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, str(PLUGINS)])
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def _main(argv: list[str]) -> int:
    if "--version" in argv:
        print(f"hiperlab {__version__}")
        return 0
    from hiperlab.run.door_flags import arguments, show, shows
    from hiperlab.run.sweep_job import follow_parent

    follow_parent()
    args = arguments(argv)
    conf = Path(args.config_path) if args.config_path else config_dir()
    extra = Path(args.config_dir) if args.config_dir else None
    name = (args.config_name or "config").removesuffix(".yaml")
    if args.help:
        from hiperlab.run.door_help import help_text

        with suppress(BrokenPipeError):  # `--help | head`
            print(help_text(conf, extra, name), flush=True)
        return 0
    from hydra.core.global_hydra import GlobalHydra

    from hiperlab.run.door_check import Request, open_hydra
    from hiperlab.run.door_earlier import with_earlier
    from hiperlab.run.door_overrides import values

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
    from hydra.types import RunMode

    from hiperlab.run.door_check import compose

    if args.multirun:
        from hiperlab.run.door_sweep import run_sweep

        return run_sweep(hydra, request)
    cfg = compose(hydra, request, request.overrides)
    if cfg.hydra.mode == RunMode.MULTIRUN:
        from hiperlab.run.door_sweep import run_sweep

        return run_sweep(hydra, request)
    return _run(hydra, request, cfg)


def _run(hydra: Any, request: Any, cfg: Any) -> int:
    """One run: check, choose the folder, hand over to the stages (what Hydra.run does, without composing again)."""
    from hydra._internal.callbacks import Callbacks
    from hydra.core.utils import run_job
    from hydra.types import HydraContext, RunMode

    from hiperlab.run.door_check import check_config
    from hiperlab.run.door_earlier import HANDED, choose_run_dir
    from hiperlab.run.door_tuned import line

    cfg.hydra.mode = RunMode.RUN
    check_config(cfg, request, hydra, request.overrides)
    if said := line(cfg, str(cfg.hydra.runtime.choices.get("model"))):
        print(f"hiperlab: {said}", flush=True)
    folder = choose_run_dir(cfg, cfg.hydra.runtime.choices, request.overrides)
    os.environ[HANDED] = str(folder)
    cfg.run_dir = str(folder)
    failure: list[BaseException] = []

    def task(task_cfg: Any) -> Any:
        try:
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
    return getattr(importlib.import_module(module), function)
