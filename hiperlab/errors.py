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


def near(name: str, choices: Iterable[str], most: int = 3) -> str:
    """A phrase naming the choices closest to `name`, or all of them if few: " Did you mean ti? Choices: neti, ti."."""
    names = sorted(choices)
    close = difflib.get_close_matches(name, names, n=most, cutoff=0.5)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    listed = ", ".join(names[:30]) + (", …" if len(names) > 30 else "")
    return f"{hint} Choices: {listed}." if names else hint
