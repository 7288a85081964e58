"""The loss curve as inline SVG: it takes the page's colours, light or dark, and needs no picture file."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hiperlab.report.page import render

_W, _H, _LEFT, _BOTTOM, _TOP, _RIGHT = 720, 240, 58, 34, 10, 10
_MOST = 1200  # points drawn: more than the pixels there are


def curve(steps: Sequence[float], values: Sequence[float | None], label: str, smoothed: bool = True) -> str:
    """Single values (pale) and their running mean (strong) over optimizer steps.

    Args:
        steps: ascending.
        values: one per step; None or infinite ones are left out.
        label: names the vertical axis.
        smoothed: whether there is a running mean; without one the single values are strong.

    Returns:
        An <svg> element, or "" if fewer than two values are left.
    """
    points = [(s, v) for s, v in zip(steps, values, strict=True) if v is not None and math.isfinite(v)]
    if len(points) < 2:
        return ""
    every = -(-len(points) // _MOST)
    xs = [s for s, _ in points]
    shown = [v for _, v in points]
    low, high = min(shown), max(shown)
    y_ticks, x_ticks = _ticks(low, high), _ticks(xs[0], xs[-1])
    low, high = min(low, y_ticks[0]), max(high, y_ticks[-1])

    def x(step: float) -> float:
        return _LEFT + (step - xs[0]) / (xs[-1] - xs[0] or 1) * (_W - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _TOP + (high - value) / (high - low or 1) * (_H - _TOP - _BOTTOM)

    def line(numbers: Sequence[float]) -> list[tuple[float, float]]:
        return [(x(step), y(value)) for step, value in list(zip(xs, numbers, strict=True))[::every]]

    return render(
        "curve.svg",
        label=label,
        width=_W,
        height=_H,
        left=_LEFT,
        right=_W - _RIGHT,
        bottom=_H - _BOTTOM,
        middle=(_LEFT + _W) / 2,
        across=[(y(tick), f"{tick:g}") for tick in y_ticks],
        below=[(x(tick), f"{tick:g}") for tick in x_ticks if xs[0] <= tick <= xs[-1]],
        lines=[("raw", line(shown)), ("mean", line(_running_mean(shown)))] if smoothed else [("mean", line(shown))],
    )


def _running_mean(values: Sequence[float]) -> list[float]:
    """Mean over a centred window of a twentieth of the curve; shorter at both ends."""
    half = max(1, len(values) // 40)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    ends = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in ends]


def _ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) that span low to high."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    unit = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= about)
    first, last = math.floor(low / unit), math.ceil(high / unit)
    return [round(unit * number, 12) for number in range(first, last + 1)]
