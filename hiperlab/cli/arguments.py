"""Command lines of `--options`, of the programs beside hiperlab.run: mistakes are one line."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from hiperlab.errors import UserError


class Parser(argparse.ArgumentParser):
    """Options of a program, with examples below its help.

    Args:
        prog: as it is called, "python -m hiperlab.bench".
        doc: the program's docstring, whose first line the help begins with.
        examples: as they stand.
        options: further named values of argparse's.
    """

    def __init__(self, prog: str, doc: str | None, examples: str, **options: Any) -> None:
        super().__init__(
            prog,
            description=doc.splitlines()[0] if doc else None,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **options,
        )

    def error(self, message: str) -> NoReturn:
        """One line, as hiperlab.run says it, instead of the usage and a line."""
        raise UserError(f"{message} ({self.prog} --help lists everything)")


def names(text: str) -> list[str]:
    """`ti,neti` as a list without repeats, in order."""
    return list(dict.fromkeys(name for name in text.split(",") if name))
