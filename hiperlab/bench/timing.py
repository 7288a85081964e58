"""Seconds, memory and operations of a piece of work. Nothing here knows what is measured."""

from __future__ import annotations

import functools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from hiperlab.report.environment import peak_memory

REST = "rest"
Watch = Callable[[str], AbstractContextManager[Any]]  # what surrounds a named part of a step


def now(device: torch.device) -> float:
    """Seconds on a clock that only its differences give a meaning, once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """How long `work` takes."""
    start = now(device)
    work()
    return now(device) - start


def unwatched(part: str) -> AbstractContextManager[None]:
    """The watch of a step that is timed as a whole: it does nothing."""
    return nullcontext()


class Parts:
    """Where the time of a step goes; a part inside another counts for itself alone.

    Every change of part waits for the device, which a step by itself does not: the sum is larger than an unwatched
    step's time.

    Args:
        device: to wait for.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """What happens inside belongs to `part`."""
        self._turn()
        self._open.append(part)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def _turn(self) -> None:
        """Give the time since the last turn to the innermost open part."""
        moment = now(self.device)
        if self._open:
            part = self._open[-1]
            self.seconds[part] = self.seconds.get(part, 0.0) + moment - self._since
        self._since = moment


@contextmanager
def watched(watch: Watch, calls: Sequence[tuple[Any, str, str]]) -> Iterator[None]:
    """While inside, methods of objects are parts of what is watched.

    Args:
        watch: what surrounds each call.
        calls: (object, name of its method, name of the part).
    """
    with ExitStack() as stack:
        for owner, name, part in calls:
            stack.enter_context(_wrapped(owner, name, functools.partial(watch, part)))
        yield


@contextmanager
def _wrapped(owner: Any, name: str, around: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    original, had_own = getattr(owner, name), name in vars(owner)

    def call(*args: Any, **kwargs: Any) -> Any:
        with around():
            return original(*args, **kwargs)

    setattr(owner, name, call)  # on the object: its class, and every other object, stay as they are
    try:
        yield
    finally:
        if had_own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)


class Operations:
    """Floating point operations of a piece of work, all of it and named parts, as torch counts them.

    A multiplication and an addition are two; matrix products, convolutions and attention count, the rest does not.
    """

    def __init__(self) -> None:
        self.parts: dict[str, int] = {}
        self._mode = FlopCounterMode(display=False)

    def count(self, work: Callable[[], Any]) -> int:
        """The whole of `work`."""
        with self._mode:
            work()
        return int(self._mode.get_total_flops())

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """What happens inside belongs to `part`."""
        before = int(self._mode.get_total_flops())
        yield
        self.parts[part] = self.parts.get(part, 0) + int(self._mode.get_total_flops()) - before


def forget_peak() -> None:
    """Start the peak of memory anew; where the process's cannot be (not on Linux), it stays the most so far."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # see Linux's proc(5)


def peak_megabytes(device: torch.device) -> float | None:
    """Most memory since `forget_peak`, 10^6 bytes: allocated by torch on CUDA, resident else; None on Windows."""
    peak = peak_memory().get("cuda" if device.type == "cuda" else "process")
    return None if peak is None else peak / 1e6


def ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of one large matrix product, the best of several: what the device can do at most here.

    Args:
        device: where.
        dtype: of both factors; the switches for TF32 count as they are.
    """
    side = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times = [seconds(lambda: left @ right, device) for _ in range(6)]
    return 2 * side**3 / min(times[1:])


def start_up(repeats: int) -> dict[str, float]:
    """Seconds of fresh processes, medians: the door alone, and all that the first stage of a run imports."""
    stages = (
        "from hiperlab.cli.process import collector_paused\nwith collector_paused():\n    import hiperlab.run.stages"
    )
    commands = {"door": ["-m", "hiperlab.run", "--version"], "stages": ["-c", stages]}
    found = {}
    for name, words in commands.items():
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
            times.append(time.perf_counter() - start)
        found[name] = median(times)
    return found
