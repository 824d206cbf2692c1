"""Line charts of the report as HTML: a stretched SVG for the lines, HTML text for everything else.

The SVG fills whatever width the page gives it (strokes do not scale), so labels stay readable from
a telephone to a wide screen, and colours are CSS variables, so that light and dark both work.
"""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

Point = tuple[float, float]
VIEW = 1000  # units of the stretched viewBox in both directions
MAX_BUCKETS = 350  # horizontal resolution kept of a long series
MAX_DOTS = 60


@dataclass
class Series:
    """One line of a chart; `style` is "line", "faint" or "dots" (a line with a mark per point)."""

    name: str
    points: list[Point]
    color: str
    style: str = "line"
    in_legend: bool = True


@dataclass
class Axis:
    """A range of values with the places of its labels."""

    low: float
    high: float
    ticks: list[float]
    log: bool = False

    def share(self, value: float) -> float:
        """Where `value` lies between low (0) and high (1)."""
        if self.log:
            span = math.log(self.high) - math.log(self.low)
            return (math.log(max(value, self.low)) - math.log(self.low)) / span
        return (value - self.low) / (self.high - self.low)


def escape(text: object) -> str:
    """Text that is safe inside HTML elements and attributes."""
    return html.escape(str(text), quote=True)


def number(value: float) -> str:
    """At most four significant digits, without trailing zeros; powers of ten beyond 1e-4 .. 1e6."""
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def linear_axis(low: float, high: float, count: int = 4) -> Axis:
    """An axis around [low, high] whose ticks are 1, 2 or 5 times a power of ten apart."""
    if high - low <= abs(high) * 1e-9:
        margin = abs(high) * 0.5 or 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = max(0, 1 - math.floor(math.log10(step)))
    ticks = [round(index * step, digits) for index in range(first, last + 1)]
    return Axis(ticks[0], ticks[-1], ticks)


def log_axis(low: float, high: float) -> Axis:
    """An axis over whole powers of ten; needs 0 < low <= high."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    stride = max(1, (last - first) // 5)
    ticks = [10.0**power for power in range(first, last + 1, stride)]
    return Axis(10.0**first, 10.0**last, ticks, log=True)


def step_axis(last_step: int) -> Axis:
    """The horizontal axis of all charts: steps from 0 to the last one, ticks inside it."""
    axis = linear_axis(0, max(last_step, 1), 5)
    ticks = [tick for tick in axis.ticks if tick <= last_step and tick == int(tick)]
    return Axis(0, max(last_step, 1), ticks or [0])


def doubling_axis(last_step: int) -> Axis:
    """Steps 1 to last_step + 1 on a logarithmic scale, two or three ticks per power of ten."""
    multiples = (1, 2, 5) if last_step <= 200 else (1, 3)
    ticks = [float(m * 10**power) for power in range(10) for m in multiples]
    return Axis(1, max(last_step, 1) + 1, [tick for tick in ticks if tick <= last_step], log=True)


def thin(points: Sequence[Point]) -> list[Point]:
    """The points, or per bucket of neighbours the lowest and the highest: peaks survive."""
    if len(points) <= 2 * MAX_BUCKETS:
        return list(points)
    size = math.ceil(len(points) / MAX_BUCKETS)
    kept: list[Point] = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        extremes = {min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])}
        kept.extend(sorted(extremes))
    return kept


def smooth(points: Sequence[Point]) -> list[Point]:
    """Exponential moving average over about a fiftieth of the points, without start-up bias."""
    weight = min(1.0, 50 / max(len(points), 1))
    total = norm = 0.0
    smoothed = []
    for x, y in points:
        total = (1 - weight) * total + weight * y
        norm = (1 - weight) * norm + weight
        smoothed.append((x, total / norm))
    return smoothed


def line_chart(
    title: str, series: Sequence[Series], x_axis: Axis, y_axis: Axis | None = None, note: str = ""
) -> str:
    """A figure with title, legend, axes and one line per series; y_axis is fitted if not given."""
    if y_axis is None:
        values = [y for one in series for _, y in one.points]
        y_axis = linear_axis(min(values), max(values))
    lines = "".join(_line(one, x_axis, y_axis) for one in series)
    grid = "".join(
        f'<path class="grid" d="M0 {_y(tick, y_axis)}H{VIEW}"/>' for tick in y_axis.ticks
    )
    legend = "".join(
        f'<span class="key"><i style="background:{one.color}"></i>{escape(one.name)}</span>'
        for one in series
        if one.name and one.in_legend
    )
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b>{legend}</figcaption>'
        f'<div class="frame">{_y_labels(y_axis)}'
        f'<div class="plot"><svg viewBox="0 0 {VIEW} {VIEW}" preserveAspectRatio="none" '
        f'role="img" aria-label="{escape(title)}">{grid}{lines}</svg></div>'
        f"{x_labels(x_axis)}</div>"
        + (f'<p class="note">{escape(note)}</p>' if note else "")
        + "</figure>"
    )


def x_labels(axis: Axis) -> str:
    """The row of step numbers under a chart."""
    spans = "".join(
        f'<span style="left:{100 * axis.share(tick):.2f}%">{number(tick)}</span>'
        for tick in axis.ticks
    )
    return f'<div class="x">{spans}</div>'


def _y_labels(axis: Axis) -> str:
    spans = "".join(
        f'<span style="bottom:{100 * axis.share(tick):.2f}%">{number(tick)}</span>'
        for tick in axis.ticks
    )
    return f'<div class="y">{spans}</div>'


def _y(value: float, axis: Axis) -> int:
    return round(VIEW * (1 - axis.share(value)))


def _line(series: Series, x_axis: Axis, y_axis: Axis) -> str:
    points = thin(series.points)
    places = [(round(VIEW * x_axis.share(x), 1), _y(y, y_axis)) for x, y in points]
    path = "M" + "L".join(f"{x:g} {y}" for x, y in places)
    drawn = f'<path class="line {series.style}" style="stroke:{series.color}" d="{path}"/>'
    if series.style != "dots" or len(points) > MAX_DOTS:
        return drawn
    return drawn + "".join(
        f'<path class="dot" style="stroke:{series.color}" d="M{x:g} {y}h0">'
        f"<title>{escape(series.name)}: {number(value)} at step {number(step)}</title></path>"
        for (x, y), (step, value) in zip(places, points, strict=True)
    )
