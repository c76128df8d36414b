"""Plots of the report as inline SVG: they follow the page's colours, dark or light, and its width.

Colours are classes of the page (`before`, `after`, `teacher`, `real`, `difference`, `line0` …).
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, LABELS, RIGHT = 330, 68, 12  # of a plot, of the column of labels, and the margin


class Dot(NamedTuple):
    """A row of a dot plot: its label, the class of its colour, a mean, an interval around it, single values."""

    label: str
    colour: str
    mean: float
    low: float
    high: float
    values: Sequence[float] = ()


class Line(NamedTuple):
    """A line over x: its label, the class of its colour, (x, mean, half the band) of its points, a level to compare."""

    label: str
    colour: str
    points: Sequence[tuple[float, float, float]]
    level: float | None = None


def dots(title: str, rows: Sequence[Dot], zero: bool = False) -> str:
    """Dots with intervals, one row below the other on a common axis; `zero` draws a line at 0, which it includes."""
    ends = [value for row in rows for value in (row.low, row.high, row.mean, *row.values)]
    scale = _Scale([*ends, 0.0] if zero or _is_near_zero(ends) else ends, LABELS, WIDTH - RIGHT)
    height = 22 * len(rows) + 22
    parts = [_axis(scale, height - 18)]
    if zero:
        parts.append(f'<line class="zero" x1="{scale(0)}" x2="{scale(0)}" y1="2" y2="{height - 18}"/>')
    for index, row in enumerate(rows):
        y = 22 * index + 12
        parts.append(f'<text x="{LABELS - 8}" y="{y + 4}" text-anchor="end">{html.escape(row.label)}</text>')
        parts.append(f'<g class="{row.colour}"><line x1="{scale(row.low)}" x2="{scale(row.high)}" y1="{y}" y2="{y}"/>')
        parts += [f'<circle class="value" cx="{scale(value)}" cy="{y}" r="2.5"/>' for value in row.values]
        parts.append(f'<circle cx="{scale(row.mean)}" cy="{y}" r="5"/></g>')
    return _svg(title, height, parts)


def lines(title: str, rows: Sequence[Line], marked: Sequence[float], xlabel: str) -> str:
    """Lines with bands over x, dotted levels, and vertical marks."""
    height, top = 190, 8
    xs = [x for row in rows for x, _, _ in row.points]
    ys = [y + side * half for row in rows for _, y, half in row.points for side in (-1, 1)]
    levels = [row.level for row in rows if row.level is not None]
    across = _Scale(xs, 44, WIDTH - RIGHT)
    up = _Scale([*ys, *levels, 0.0], height - 34, top)
    parts = [_axis(across, height - 34, xlabel)]
    for tick in up.ticks():
        parts.append(f'<text x="38" y="{up(tick) + 4}" text-anchor="end">{tick:g}</text>')
        parts.append(f'<line class="grid" x1="44" x2="{WIDTH - RIGHT}" y1="{up(tick)}" y2="{up(tick)}"/>')
    parts += [f'<line class="mark" x1="{across(x)}" x2="{across(x)}" y1="{top}" y2="{height - 34}"/>' for x in marked]
    for row in rows:
        band = [(across(x), up(y + half)) for x, y, half in row.points]
        band += [(across(x), up(y - half)) for x, y, half in reversed(row.points)]
        middle = [(across(x), up(y)) for x, y, _ in row.points]
        parts.append(f'<g class="{row.colour}"><polygon class="band" points="{_points(band)}"/>')
        parts.append(f'<polyline points="{_points(middle)}"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="3.5"/>' for x, y in middle]
        if row.level is not None:
            y = up(row.level)
            parts.append(f'<line class="level" x1="44" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append("</g>")
    return _svg(title, height, parts)


def bars(title: str, before: Sequence[float], after: Sequence[float], level: float, xlabel: str) -> str:
    """Two bars for each index, and a level."""
    height, top = 150, 8
    up = _Scale([*before, *after, level, 0.0], height - 34, top)
    step = (WIDTH - 44 - RIGHT) / max(len(before), 1)
    parts = [f'<text x="38" y="{up(tick) + 4}" text-anchor="end">{tick:g}</text>' for tick in up.ticks()]
    for index, pair in enumerate(zip(before, after, strict=True)):
        left = 44 + index * step
        for offset, colour, value in ((0.1, "before", pair[0]), (0.5, "after", pair[1])):
            box = f'x="{left + offset * step:.1f}" y="{up(value)}" width="{0.4 * step:.1f}"'
            parts.append(f'<rect class="{colour}" {box} height="{max(up(0) - up(value), 0):.1f}"/>')
        if len(before) <= 20:
            parts.append(f'<text x="{left + step / 2:.1f}" y="{height - 20}" text-anchor="middle">{index}</text>')
    parts.append(f'<line class="level" x1="44" x2="{WIDTH - RIGHT}" y1="{up(level)}" y2="{up(level)}"/>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{height - 4}" text-anchor="end">{html.escape(xlabel)}</text>')
    return _svg(title, height, parts)


class _Scale:
    """From values to pixels, rounded; the ends have some room."""

    def __init__(self, values: Sequence[float], start: float, end: float):
        finite = [value for value in values if math.isfinite(value)] or [0.0]
        self.low, self.high = min(finite), max(finite)
        room = (self.high - self.low) * 0.06 or max(abs(self.high) * 0.1, 1e-6)
        is_point = self.low == self.high
        self.low -= 0 if self.low == 0 and not is_point else room  # 0 may be the very end
        self.high += 0 if self.high == 0 and not is_point else room
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + min(max(share, 0), 1) * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """Two to five round numbers within."""
        raw = (self.high - self.low) / 4
        power = 10 ** math.floor(math.log10(raw))
        step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw)
        first = math.ceil(self.low / step)
        return [round(index * step, 12) for index in range(first, math.floor(self.high / step) + 1)]


def _is_near_zero(values: Sequence[float]) -> bool:
    """Whether an axis of such values had better begin at 0."""
    return min(values) >= 0 and min(values) < 0.5 * max(values)


def _axis(scale: _Scale, y: float, label: str = "") -> str:
    line = f'<line class="axis" x1="{scale.start}" x2="{scale.end}" y1="{y}" y2="{y}"/>'
    ticks = [f'<text x="{scale(tick)}" y="{y + 14}" text-anchor="middle">{tick:g}</text>' for tick in scale.ticks()]
    name = f'<text x="{scale.end}" y="{y + 28}" text-anchor="end">{html.escape(label)}</text>' if label else ""
    return line + "".join(ticks) + name


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x},{y}" for x, y in points)


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    name = html.escape(title)
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{name}">{"".join(parts)}</svg>'
