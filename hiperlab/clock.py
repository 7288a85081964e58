"""One clock for all loops that say how they go: when a line is due, how fast it goes, how long it will take."""

from __future__ import annotations

import time


class Clock:
    """Counts seconds beside somebody else's steps; it starts when it is made.

    Args:
        seconds: between two lines.
        done: steps that were done before.
    """

    def __init__(self, seconds: float, done: int = 0) -> None:
        self.seconds = seconds
        self._said = self._start = time.monotonic()
        self._done = done

    def restart(self, done: int) -> None:
        """Measure speed from here: the steps so far paid for compiling or warming up."""
        self._start, self._done = time.monotonic(), done

    def due(self, now: bool = False) -> bool:
        """Whether a line is due, or wanted `now`; the next one is due `seconds` after it."""
        moment = time.monotonic()
        if not now and moment - self._said < self.seconds:
            return False
        self._said = moment
        return True

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def speed(self, done: int) -> float | None:
        """Steps a second since the start, of `done` steps in all; None before the first one."""
        steps, seconds = done - self._done, self.elapsed
        return steps / seconds if steps > 0 and seconds > 0 else None

    def left(self, done: int, total: int) -> float | None:
        """Seconds that the other steps will take at this speed; None before the first one."""
        speed = self.speed(done)
        return None if speed is None else (total - done) / speed
