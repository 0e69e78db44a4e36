"""The pictures of a record, drawn with matplotlib (the ``plots`` extra)."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from blip3o_fast.benchmarking.record import Measurement, Record
from blip3o_fast.benchmarking.roofline import draw_roofline
from blip3o_fast.report.style import (
    LIGHT,
    MARKS,
    decimal_axis,
    new_figure,
    number,
    png,
    require_plots,
    style_axes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT, DPI = 8.0, 4.6, 150
PUBLISHED = "published"


class Point(NamedTuple):
    """A value of a contender at a batch, and its limit if it has one."""

    m: Measurement
    value: float
    limit: float | None = None

    @property
    def line(self) -> str:
        """The name of the point's line."""
        return f"{self.m.contender}, {self.m.dtype}"


def draw_plots(record: Record) -> dict[str, bytes]:
    """File names and PNG contents; a picture without data is not drawn."""
    require_plots()
    drawings = {
        "roofline.png": draw_roofline,
        "evaluation.png": _draw_evaluation,
        "speedup.png": _draw_speedup,
        "memory.png": _draw_memory,
    }
    pictures = {name: _draw(record, draw) for name, draw in drawings.items()}
    return {name: data for name, data in pictures.items() if data is not None}


def _draw(record: Record, draw: "Callable[[Figure, Record], bool]") -> bytes | None:
    figure = new_figure(WIDTH, HEIGHT, dpi=DPI)
    if not draw(figure, record):
        return None
    for axes in figure.axes:
        style_axes(axes)
    device = record.environment["device"]
    figure.axes[0].set_title(device, fontsize=7, color=LIGHT.grey, loc="left")
    return png(figure)


def _draw_evaluation(figure: "Figure", record: Record) -> bool:
    points = [
        Point(m, m.median / m.batch * 1e3, m.limit / m.batch * 1e3) for m in _evaluations(record)
    ]
    title = "Time of one evaluation of the velocity, by sample"
    return _draw_contenders(figure, points, "ms per evaluation and sample", title)


def _draw_speedup(figure: "Figure", record: Record) -> bool:
    rows = _evaluations(record)
    theirs = {(m.batch, m.dtype): m.median for m in rows if m.contender == PUBLISHED}
    points = [
        Point(m, theirs[m.batch, m.dtype] / m.median)
        for m in rows
        if m.contender != PUBLISHED and (m.batch, m.dtype) in theirs
    ]
    title = "One evaluation: times as fast as the published implementation in the same dtype"
    return _draw_contenders(figure, points, "published / contender", title)


def _draw_memory(figure: "Figure", record: Record) -> bool:
    points = [Point(m, m.peak / 2**20) for m in _evaluations(record) if m.peak is not None]
    return _draw_contenders(figure, points, "MiB", "Memory that one evaluation allocates")


def _draw_contenders(figure: "Figure", points: list[Point], label: str, title: str) -> bool:
    if not points:
        return False
    axes = figure.subplots()
    batches = sorted({point.m.batch for point in points})
    if len(batches) == 1:
        _draw_bars(axes, points, label)
        title += f", batch {batches[0]}"
    else:
        _draw_lines(axes, points, batches, label)
    figure.suptitle(title, fontsize=10)
    return True


def _draw_bars(axes: "Axes", points: list[Point], label: str) -> None:
    heights = [point.value for point in points]
    colours = [LIGHT.series[0] if point.m.ours else LIGHT.grey for point in points]
    bars = axes.barh([point.line for point in points], heights, color=colours, height=0.6)
    axes.bar_label(bars, [number(height) for height in heights], fontsize=8, padding=3)
    limits = [(i, point.limit) for i, point in enumerate(points) if point.limit is not None]
    for i, limit in limits:
        axes.plot([limit, limit], [i - 0.38, i + 0.38], color=LIGHT.text, linewidth=1.6)
    if limits:
        axes.plot([], [], color=LIGHT.text, linewidth=1.6, label="limit")
        axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.invert_yaxis()
    axes.set_xlabel(label)


def _draw_lines(axes: "Axes", points: list[Point], batches: list[int], label: str) -> None:
    """Lines over batches. A contender without a value at every batch has marks only."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for point in points:
        lines.setdefault(point.line, []).append((point.m.batch, point.value))
    for i, (name, values) in enumerate(lines.items()):
        style = "-" if len(values) == len(batches) else "none"
        colour, mark = LIGHT.series[i % len(LIGHT.series)], MARKS[i % len(MARKS)]
        xs, ys = zip(*sorted(values), strict=True)
        marks = {"color": colour, "marker": mark, "markersize": 5}
        axes.plot(xs, ys, linestyle=style, label=name, **marks)
    limits = {(point.m.dtype, point.m.batch, point.limit) for point in points if point.limit}
    for dtype in sorted({dtype for dtype, _, _ in limits}):
        xs, ys = zip(*sorted((b, limit) for kind, b, limit in limits if kind == dtype), strict=True)
        axes.plot(xs, ys, "--", color=LIGHT.text, label=f"limit, {dtype}")
    axes.set(xscale="log", yscale="log", xlabel="batch", ylabel=label)
    decimal_axis(axes.yaxis)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _evaluations(record: Record) -> list[Measurement]:
    """Evaluations with the published 256 tokens: of base if it was measured, else of all."""
    rows = [m for m in record.measurements if m.group == "evaluation"]
    plain = [m for m in rows if re.fullmatch(r"[a-z]+-b\d+", m.shape)]
    base = [m for m in plain if m.shape.startswith("base-")]
    return base or plain
