"""Work in pieces under one deadline: each has a limit of its own, none stops the others, and all is kept at once."""

from __future__ import annotations

import gc
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hiperlab import files
from hiperlab.bench.device_checks import CheckError

OK, FAILED, SKIPPED, NO_MEMORY, CUT = "ok", "failed", "skipped", "no memory", "cut"
LEAST = 5.0  # seconds: with fewer left nothing is begun


class TimeLimitError(Exception):
    """A piece took longer than it may."""


@dataclass(frozen=True)
class Piece:
    """One piece of work.

    Args:
        name: what it is, one line.
        limit: seconds it may take.
        work: what it does; what it returns are its figures.
        must_end: whether it has failed when its time is over (a check); a measurement is only cut.
    """

    name: str
    limit: float
    work: Callable[[], dict[str, Any]]
    must_end: bool = True


def run(pieces: Sequence[Piece], budget: float, found: dict[str, Any], keep: Callable[[], None], log: Path) -> None:
    """Do the pieces in their order and note each in `found["pieces"]`.

    Args:
        pieces: the most informative first.
        budget: seconds for all.
        found: what is kept.
        keep: called after each piece.
        log: file that tracebacks are appended to.
    """
    deadline = time.monotonic() + budget
    for piece in pieces:
        left = deadline - time.monotonic()
        record: dict[str, Any] = {"name": piece.name, "status": SKIPPED, "seconds": 0.0}
        if left < LEAST:
            record["error"] = f"no time left of {budget:g} s"
        else:
            record |= _outcome(piece, min(piece.limit, left), log)
        found["pieces"].append(record)
        keep()


def failures(found: dict[str, Any]) -> list[str]:
    """Names of the pieces that failed."""
    return [piece["name"] for piece in found["pieces"] if piece["status"] == FAILED]


def _outcome(piece: Piece, limit: float, log: Path) -> dict[str, Any]:
    """Status, seconds and figures or the error of one piece; whatever it raises is an outcome, Ctrl-C apart."""
    start = time.monotonic()
    try:
        with _within(limit):
            outcome = {"status": OK, **piece.work()}
    except TimeLimitError:
        outcome = {"status": FAILED if piece.must_end else CUT, "error": f"took longer than {limit:.0f} s"}
    except torch.OutOfMemoryError as error:
        outcome = {"status": FAILED if piece.must_end else NO_MEMORY, "error": _line(error)}
    except CheckError as error:
        outcome = {"status": FAILED, "error": _line(error)}
    except Exception as error:  # the first run on a new machine: one surprise must not hide the others
        outcome = {"status": FAILED, "error": f"{type(error).__name__}: {_line(error)}"}
        with log.open("a", encoding="utf-8") as file:
            file.write(f"---- {piece.name}\n{traceback.format_exc()}\n")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # out here: the exception, and with it the piece's tensors, is gone
    return outcome | {"seconds": round(time.monotonic() - start, 2)}


def _line(error: Exception) -> str:
    """What an error says, as one line."""
    return " ".join(str(error).split())[:300]


@contextmanager
def _within(limit: float) -> Iterator[None]:
    """Interrupt what happens inside after `limit` seconds; where there is no alarm (Windows) it takes what it takes."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def over(*_: Any) -> None:
        raise TimeLimitError

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def write(folder: Path, found: dict[str, Any], table: str) -> None:
    """`gpu_check.json` and `gpu_check.txt`, whole or as they were."""
    files.write_json(folder / "gpu_check.json", found)
    files.atomic_write(folder / "gpu_check.txt", table)
