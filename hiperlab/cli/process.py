"""What every program of hiperlab does around its own work: find the conf folder, turn what is raised into an exit code.

Exit codes: 0 done, 1 a failure (traceback), 2 a mistake in what was asked (one line), 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hiperlab.errors import StoppedError, UserError

PACKAGE = Path(__file__).resolve().parent.parent
PLUGINS = PACKAGE / "plugins"


def config_dir() -> Path:
    """The conf folder: inside the package when installed, beside it in a checkout.

    Raises:
        UserError: neither is there (a broken installation).
    """
    for folder in (PACKAGE / "conf", PACKAGE.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise UserError(f"hiperlab's conf folder is neither in {PACKAGE} nor beside it. Install hiperlab again.")


@contextmanager
def collector_paused() -> Iterator[None]:
    """For the imports of a fresh process: what they make stays, so it is never looked through for garbage.

    A sixth of the time that torch, Lightning and diffusers take to import goes into collections that find nothing.
    Where torch is there already (a notebook, a second run of one process) nothing is paused: little is left to import,
    and freezing would keep whatever rubbish waits to be collected, models too.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # libraries that count what is left at the end (nanobind) would call it leaked


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
            text, code = told(error)
            print(text, file=sys.stderr)
            return code


def told(error: BaseException) -> tuple[str, int]:
    """What to print of an error, and the exit code; a user's mistake, however deep, is a message without traceback."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return f"hiperlab: {cause}", 2
        if isinstance(cause, StoppedError):
            return f"hiperlab: {cause}", cause.code
        cause = cause.__cause__
    return "".join(traceback.format_exception(error)).rstrip(), 1


def find_plugins() -> None:
    """Put hiperlab's plugins where Hydra looks for them, before it looks: it does so once in a process."""
    if str(PLUGINS) not in sys.path:
        sys.path.append(str(PLUGINS))


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
    find_plugins()
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
