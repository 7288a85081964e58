"""The errors a person can mend: one line that names the value, the expectation and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user asked for. The door prints its message without a traceback and exits with code 2."""


class StoppedError(RuntimeError):
    """The run was told to stop (signal) or had to (NaN); everything worth keeping is saved.

    Args:
        message: what happened and how to go on, printed as it is.
        code: exit code of the process (143 SIGTERM, 130 Ctrl-C, 1 otherwise).
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class DiskFullError(StoppedError):
    """A file could not be written because its disk or quota is full; what was there before stays.

    Args:
        path: the file.
        needed: bytes that it needs, or had got when the disk was full.
        free: bytes that are free on its disk once the torn file is gone.
    """

    def __init__(self, path: object, needed: int, free: int) -> None:
        super().__init__(
            f"the disk is full: {path} needs more than {human_bytes(needed)}, {human_bytes(free)} are free. "
            "Make room, then the same command with resume=auto goes on.", 1,
        )  # fmt: skip


def human_bytes(count: float) -> str:
    """A number of bytes as people read it: "1.2 GB", three digits at most."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.3g} {unit}" if count < 1000 else f"{count:,.0f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def near(name: str, choices: Iterable[str], most: int = 3, listed: int | None = None) -> str:
    """A phrase naming the choices closest to `name`, or all of them if few: " Did you mean ti? Choices: neti, ti.".

    Args:
        name: what was given.
        choices: what there is.
        most: closest ones that are asked for.
        listed: so many choices are listed, the closest; None lists them by name.
    """
    names = sorted(choices)
    if listed is not None:
        names = difflib.get_close_matches(name, names, n=listed, cutoff=0.0)
    close = difflib.get_close_matches(name, names, n=most, cutoff=0.5)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    shown = ", ".join(names[:30]) + (", …" if len(names) > 30 else "")
    return f"{hint} Choices: {shown}." if names else hint
