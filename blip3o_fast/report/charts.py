"""Line charts as inline SVG: no library, no pictures, readable on light and dark screens.

Colours come from the page's CSS classes ``c0`` to ``c4``, so one drawing serves both themes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from markupsafe import Markup, escape

WIDTH, HEIGHT = 560, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 10, 30
_BUCKETS = 280
"""Points of a long curve: two pixels each."""

Point = tuple[float, float]
Place = Callable[[Point], Point]


@dataclass(frozen=True)
class Curve:
    """A named line.

    Attributes:
        name: for the legend.
        points: (x, y) by increasing x; those that are not finite are left out.
        colour: 0 to 4.
        noisy: draw every value faintly, and a moving median over it.
        marks: dots rather than a line.
    """

    name: str
    points: Sequence[Point]
    colour: int = 0
    noisy: bool = False
    marks: bool = False


def line_chart(title: str, curves: Sequence[Curve], *, log: bool = False, note: str = "") -> Markup:
    """An HTML figure of the curves over training steps; empty if there is nothing to draw.

    Args:
        title: above the chart.
        curves: share one scale.
        log: logarithmic y; values of 0 or less are left out.
        note: below the chart.
    """
    kept = [(curve, _drawable(curve.points, log)) for curve in curves]
    kept = [(curve, points) for curve, points in kept if points]
    if not kept:
        return Markup()
    xs = [x for _, points in kept for x, _ in points]
    ys = [math.log10(y) if log else y for _, points in kept for _, y in points]
    x_axis, y_axis = _Axis(min(xs), max(xs)), _Axis(*_padded(min(ys), max(ys)))

    def place(point: Point) -> Point:
        y = math.log10(point[1]) if log else point[1]
        across = _LEFT + x_axis.share(point[0]) * (WIDTH - _LEFT - _RIGHT)
        return across, HEIGHT - _BOTTOM - y_axis.share(y) * (HEIGHT - _TOP - _BOTTOM)

    parts = [*_grid(x_axis, y_axis, log)]
    for curve, points in kept:
        parts += _strokes(curve, points, place)
    legend = " ".join(
        f'<span class="key c{curve.colour}">{escape(curve.name)}</span>' for curve, _ in kept
    )
    return Markup(
        f"<figure><h3>{escape(title)}</h3>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg><figcaption>{legend} {escape(note)}</figcaption></figure>"
    )


def thinned(points: Sequence[Point], buckets: int = _BUCKETS) -> list[Point]:
    """The lowest and the highest point of each of at most ``buckets`` equal parts, in order."""
    if len(points) <= 2 * buckets:
        return list(points)
    kept: list[Point] = []
    for part in _parts(points, buckets):
        low, high = min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])
        kept += sorted({low, high})
    return kept


def smoothed(points: Sequence[Point], buckets: int = _BUCKETS) -> list[Point]:
    """A moving median over a twentieth of the points, at most ``buckets`` of it."""
    reach = max(1, len(points) // 40)
    stride = max(1, len(points) // buckets)
    centres = [*range(0, len(points), stride)]
    if centres[-1] != len(points) - 1:
        centres.append(len(points) - 1)
    return [
        (points[i][0], median(y for _, y in points[max(0, i - reach) : i + reach + 1]))
        for i in centres
    ]


class _Axis:
    """A range and round numbers inside it."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high if high > low else low + 1

    def share(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)

    def ticks(self, count: int) -> list[float]:
        rough = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _parts(points: Sequence[Point], count: int) -> list[Sequence[Point]]:
    edges = [len(points) * i // count for i in range(count + 1)]
    return [points[a:b] for a, b in pairwise(edges) if b > a]


def _drawable(points: Sequence[Point], log: bool) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not log)]


def _padded(low: float, high: float) -> tuple[float, float]:
    room = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    return low - room, high + room


def _grid(x_axis: _Axis, y_axis: _Axis, log: bool) -> list[str]:
    parts: list[str] = []
    for tick in _log_ticks(y_axis) if log else y_axis.ticks(4):
        y = HEIGHT - _BOTTOM - y_axis.share(tick) * (HEIGHT - _TOP - _BOTTOM)
        label = _label(10**tick if log else tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for tick in x_axis.ticks(6):
        x = _LEFT + x_axis.share(tick) * (WIDTH - _LEFT - _RIGHT)
        anchor = "end" if x > WIDTH - 2 * _RIGHT else "middle"
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - 10}" text-anchor="{anchor}">{_label(tick)}</text>'
        )
    return parts


def _log_ticks(axis: _Axis) -> list[float]:
    """Logarithms of 1, 2, 5, 10, 20 ... inside the range, or of the powers of ten among many."""
    exponents = range(math.floor(axis.low), math.ceil(axis.high) + 1)
    every = [e + math.log10(m) for e in exponents for m in (1, 2, 5)]
    inside = [tick for tick in every if axis.low <= tick <= axis.high]
    powers = [tick for tick in inside if tick == round(tick)]
    return (powers if len(inside) > 7 else inside) or [(axis.low + axis.high) / 2]


def _strokes(curve: Curve, points: list[Point], place: Place) -> list[str]:
    if curve.marks:
        dots = (place(point) for point in thinned(points))
        return [
            f'<circle class="c{curve.colour}" cx="{x:.1f}" cy="{y:.1f}" r="2"/>' for x, y in dots
        ]
    if not curve.noisy:
        return [_path(thinned(points), f"c{curve.colour}", place)]
    faint = _path(thinned(points), f"c{curve.colour} faint", place)
    return [faint, _path(smoothed(points), f"c{curve.colour}", place)]


def _path(points: Sequence[Point], kind: str, place: Place) -> str:
    line = "L".join(f"{x:.1f} {y:.1f}" for x, y in map(place, points))
    # A lone point has no line; a stroke of no length with round ends shows as a dot.
    return f'<path class="{kind}" d="M{line}{"h0" if len(points) == 1 else ""}"/>'


def _label(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
