"""Curves as SVG, drawn without any library so that a report needs nothing but itself."""

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 620, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 36


def line_chart(
    points: Sequence[tuple[float, float]], across: str, up: str, *, zero: bool = False, smooth: bool = False
) -> str:
    """A curve through (x, y) points with its axes named; `zero` lets the vertical axis reach 0.

    With `smooth`, a running mean over a thirtieth of the points is drawn over the pale points themselves. Points that
    are not finite are left out; an empty text where fewer than two are left.
    """
    points = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if len(points) < 2:
        return ""
    xs, ys = zip(*points, strict=True)
    low, high = (min(*ys, 0.0), max(*ys, 0.0)) if zero else (min(ys), max(ys))
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        right = LEFT + (WIDTH - LEFT - RIGHT) * (x - xs[0]) / max(xs[-1] - xs[0], 1e-12)
        return right, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - low) / max(high - low, 1e-12)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" aria-label="{escape(up)}">']
    for tick in ticks:
        _, y = place(xs[0], tick)
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in _ticks(xs[0], xs[-1]):
        x, _ = place(tick, low)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    if smooth:
        parts.append(_path([place(x, y) for x, y in points], "pale"))
        ys = _running_mean(ys, max(len(ys) // 30, 1))
    parts.append(_path([place(x, y) for x, y in zip(xs, ys, strict=True)], "curve"))
    parts.append(f'<text x="{WIDTH / 2:.0f}" y="{HEIGHT - 4}" text-anchor="middle">{escape(across)}</text></svg>')
    return "".join(parts)


def _path(places: Sequence[tuple[float, float]], kind: str) -> str:
    return f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>'


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    begins = [max(i + 1 - window, 0) for i in range(len(values))]
    return [(sums[i + 1] - sums[begin]) / (i + 1 - begin) for i, begin in enumerate(begins)]


def _ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers that lie within low and high, or near them where these are equal."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span))
    step = next(f * power for f in (0.1, 0.2, 0.5, 1, 2) if span / (f * power) <= 6)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)] or [low]
