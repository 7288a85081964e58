"""The clock of progress lines, by hand."""

from __future__ import annotations

import pytest

from hiperlab import clock
from hiperlab.clock import Clock


def test_lines_are_due_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    moment = 100.0
    monkeypatch.setattr(clock.time, "monotonic", lambda: moment)
    watch = Clock(seconds=10, done=5)
    assert watch.speed(5) is None and watch.left(5, 20) is None and not watch.due()
    moment = 109.0
    assert not watch.due() and watch.due(now=True)
    moment = 118.0
    assert not watch.due(), "nine seconds after the one that was wanted at once"
    moment = 120.0
    assert watch.due() and not watch.due()
    assert watch.elapsed == 20 and watch.speed(15) == pytest.approx(0.5) and watch.left(15, 20) == pytest.approx(10)
    watch.restart(15)
    moment = 121.0
    assert watch.speed(15) is None and watch.speed(17) == pytest.approx(2)
