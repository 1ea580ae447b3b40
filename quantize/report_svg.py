"""Pictures of a report: line charts, small multiples, maps and stacked bars as inline SVG.

Colours are classes of the page's style sheet, except in maps, where a value chooses one of a few steps. What is not
finite, and on a logarithmic axis what is not positive, leaves a gap. All text is escaped here.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

LEFT, RIGHT, TOP, BOTTOM = 58, 12, 8, 30
MAP_LEFT, CELL_HEIGHT = 150, 16
MAP_WIDTH = 760
# Steps of a map's colours, from little to much: even in lightness, and the same for most kinds of colour blindness.
RAMP = ("#f1eef6", "#d4d5e8", "#aec3dc", "#7fb0cf", "#4a97bf", "#1f7aa8", "#0b5b86", "#063a5c")


@dataclass(frozen=True)
class Series:
    """A line: points (x, y) in order of x; `style` is a class of the style sheet, s0 to s4.

    joined  a line through the points, not the points alone
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: str
    joined: bool = True


def escape(text: object) -> str:
    return html.escape(str(text), quote=True)


def number(value: float) -> str:
    """Three digits, short."""
    if not math.isfinite(value):
        return "–"
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    log: bool = False,
    log_x: bool = False,
    width: int = 640,
    height: int = 220,
    dots: bool = False,
) -> str:
    """Lines over one pair of axes, with a legend where there are several. "" when there is nothing to draw.

    log, log_x  logarithmic axes; every x must be positive on one
    """
    shown = [(one, [(x, y) for x, y in one.points if _drawable(y, log=log)]) for one in series]
    values = [y for _, points in shown for _, y in points]
    places = [x for _, points in shown for x, _ in points]
    if not values:
        return ""
    across = _limits(places, log=True) if log_x else _padded(min(places), max(places))
    axes = _Axes(across, _limits(values, log=log), width, height, log=log, log_x=log_x)
    body = [axes.frame(x_label, y_label)]
    for one, points in shown:
        for run in _runs(one.points, log=log) if one.joined else []:
            path = "M" + "L".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in run)
            body.append(f'<path class="{one.style}" d="{path}"/>')
        if (dots and "dashed" not in one.style) or len(points) == 1 or not one.joined:
            body += [
                f'<circle class="{one.style}" cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="2.5">'
                f"<title>{escape(one.name)} at {number(x)}: {number(y)}</title></circle>"
                for x, y in points
            ]
    picture = _svg(width, height, body, y_label)
    return picture if len(series) == 1 else picture + legend([(one.name, one.style) for one in series])


def value_map(
    rows: Sequence[str],
    columns: int,
    cell: Callable[[int, int], tuple[str, str] | None],
    *,
    label: str,
) -> str:
    """Named rows over numbered columns; `cell(row, column)` is (colour, what the pointer shows), None for a hole."""
    if not rows or not columns:
        return ""
    size = max(5.0, min(22.0, (MAP_WIDTH - MAP_LEFT) / columns))
    width, height = math.ceil(MAP_LEFT + size * columns + RIGHT), CELL_HEIGHT * len(rows) + 34
    body = []
    for r, name in enumerate(rows):
        y = r * CELL_HEIGHT
        body.append(f'<text class="right" x="{MAP_LEFT - 6}" y="{y + 12}">{escape(name)}</text>')
        for c in range(columns):
            found = cell(r, c)
            if found is not None:
                body.append(
                    f'<rect x="{MAP_LEFT + c * size:.1f}" y="{y}" width="{size - 1:.1f}" height="{CELL_HEIGHT - 1}" '
                    f'fill="{found[0]}"><title>{escape(found[1])}</title></rect>'
                )
    every = max(1, math.ceil(columns / 16))
    for c in range(0, columns, every):
        x = MAP_LEFT + (c + 0.5) * size
        body.append(f'<text class="middle" x="{x:.1f}" y="{CELL_HEIGHT * len(rows) + 13}">{c}</text>')
    middle = MAP_LEFT + columns * size / 2
    body.append(f'<text class="middle" x="{middle:.1f}" y="{height - 4}">block</text>')
    return _svg(width, height, body, label)


def ramp(value: float, low: float, high: float) -> str:
    """The colour of `value` between `low` and `high`, by its logarithm where all are positive."""
    if not math.isfinite(value):
        return "#c2410c"
    if low > 0 and value > 0:
        value, low, high = math.log(value), math.log(low), math.log(high)
    share = 0.5 if high <= low else (value - low) / (high - low)
    return RAMP[max(0, min(len(RAMP) - 1, int(share * len(RAMP))))]


def ramp_legend(low: float, high: float) -> str:
    """What the colours of a map mean."""
    steps = "".join(f'<i style="background:{colour}"></i>' for colour in RAMP)
    return f'<p class="legend">{number(low)} <span class="ramp">{steps}</span> {number(high)}, by factor</p>'


def stacked_bars(
    parts: Sequence[tuple[str, str, Sequence[float]]], *, x_label: str, y_label: str, first: int = 0, height: int = 180
) -> str:
    """Bars of (name, style, a value for each bar); bars are numbered from `first`."""
    count = max((len(values) for _, _, values in parts), default=0)
    if not count:
        return ""
    totals = [math.fsum(values[i] for _, _, values in parts) for i in range(count)]
    width = 640
    axes = _Axes((first - 0.5, first + count - 0.5), (0.0, max(max(totals), 1e-9)), width, height, log=False)
    bar = (width - LEFT - RIGHT) / count
    body = [axes.frame(x_label, y_label)]
    for i in range(count):
        base = 0.0
        for name, style, values in parts:
            low, high = axes.y(base), axes.y(base + values[i])
            base += values[i]
            body.append(
                f'<rect class="{style}" x="{LEFT + i * bar + 0.5:.1f}" y="{high:.1f}" width="{max(bar - 1, 0.5):.1f}" '
                f'height="{low - high:.1f}"><title>{escape(name)}, {first + i}: {number(values[i])}</title></rect>'
            )
    return _svg(width, height, body, y_label) + legend([(name, style) for name, style, _ in parts])


def legend(entries: Sequence[tuple[str, str]]) -> str:
    marks = " ".join(f'<span><i class="{style}"></i>{escape(name)}</span>' for name, style in entries)
    return f'<p class="legend">{marks}</p>'


class _Axes:
    """Where values are drawn."""

    def __init__(
        self,
        x: tuple[float, float],
        y: tuple[float, float],
        width: int,
        height: int,
        *,
        log: bool,
        log_x: bool = False,
    ) -> None:
        self._x, self._y, self._log, self._log_x = x, y, log, log_x
        self._width, self._height = width, height

    def x(self, value: float) -> float:
        return LEFT + _share(value, *self._x, log=self._log_x) * (self._width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return self._height - BOTTOM - _share(value, *self._y, log=self._log) * (self._height - TOP - BOTTOM)

    def frame(self, x_label: str, y_label: str) -> str:
        right, bottom = self._width - RIGHT, self._height - BOTTOM
        body = []
        for tick in _ticks(*self._y, log=self._log, count=max(2, self._height // 50)):
            y = self.y(tick)
            body.append(f'<path class="grid" d="M{LEFT},{y:.1f}H{right}"/>')
            body.append(f'<text class="right" x="{LEFT - 5}" y="{y + 3.5:.1f}">{number(tick)}</text>')
        body += [
            f'<text class="middle" x="{self.x(tick):.1f}" y="{bottom + 13}">{number(tick)}</text>'
            for tick in _ticks(*self._x, log=self._log_x, count=max(2, self._width // 70))
        ]
        body.append(f'<path class="axis" d="M{LEFT},{TOP}V{bottom}H{right}"/>')
        body.append(
            f'<text class="middle" x="{(LEFT + right) / 2:.0f}" y="{self._height - 3}">{escape(x_label)}</text>'
        )
        middle = (TOP + bottom) / 2
        body.append(f'<text class="middle" transform="translate(11,{middle:.0f}) rotate(-90)">{escape(y_label)}</text>')
        return "".join(body)


def _share(value: float, low: float, high: float, *, log: bool) -> float:
    """Where `value` lies between 0 (low) and 1 (high)."""
    return math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)


def _svg(width: int, height: int, body: Sequence[str], label: str) -> str:
    return (
        f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}">{"".join(body)}</svg>'
    )


def _drawable(value: float, *, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log)


def _runs(points: Sequence[tuple[float, float]], *, log: bool) -> list[list[tuple[float, float]]]:
    """Pieces of a line without gaps."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if _drawable(y, log=log):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if len(run) > 1]


def _padded(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _limits(values: Sequence[float], *, log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return (low / 1.15, high * 1.15)
    low = min(low, 0.0)
    return (low, high + 0.05 * (high - low) if high > low else low + 1.0)


def _ticks(low: float, high: float, *, log: bool, count: int) -> list[float]:
    """At most about `count` round values inside."""
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        mantissas = (1,) if last - first > 3 else (1, 2, 5)
        step = max(1, math.ceil((last - first) / count))
        round_ones = [m * 10.0**e for e in range(first, last + 1, step) for m in mantissas]
        inside = [tick for tick in round_ones if low <= tick <= high]
        if len(inside) > 1:
            return inside
    size = _round_step((high - low) / count)
    ticks = [i * size for i in range(math.ceil(low / size), math.floor(high / size) + 1)]
    # A single one says nothing of the scale.
    return ticks if len(ticks) > 1 else _ticks(low, high, log=False, count=2 * count)


def _round_step(least: float) -> float:
    unit: float = 10.0 ** math.floor(math.log10(least))
    return next(m * unit for m in (1, 2, 5, 10) if m * unit >= least * 0.999)
