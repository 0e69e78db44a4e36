"""The record's pictures, drawn with matplotlib (the ``plots`` extra) on its own canvases."""

import io
import re
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING

from blip3o_fast.benchmarking.record import Measurement, Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROW_INTENSITY = 0.5
"""Where a row op stands: its flops are not counted, so its place is a convention."""

WIDTH, HEIGHT, DPI = 7.0, 4.6, 150
MARKS = "osD^vPX*<>"
COLOURS = (
    *("#1d5fd1", "#c2570c", "#2b8a3e", "#862e9c", "#c92a2a"),
    *("#087f5b", "#5f3dc4", "#6b7280", "#e67700", "#0b7285"),
)


def require_plots() -> None:
    """Raise ``ImportError`` if matplotlib is missing; for before long work that ends in plots."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "plots: expected matplotlib, which is not installed; pip install blip3o-fast[plots], "
            "or turn plots off"
        ) from error


def draw_plots(record: Record) -> dict[str, bytes]:
    """File names and PNG contents; a picture without data is not drawn."""
    require_plots()
    drawings = {
        "roofline.png": _draw_roofline,
        "evaluation.png": _draw_evaluation,
        "speedup.png": _draw_speedup,
        "memory.png": _draw_memory,
    }
    pictures = {name: _draw(record, draw) for name, draw in drawings.items()}
    return {name: data for name, data in pictures.items() if data is not None}


def _draw(record: Record, draw: "Callable[[Axes, Record], bool]") -> bytes | None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#d9dde5", linewidth=0.6)
    axes.set_axisbelow(True)
    if not draw(axes, record):
        return None
    figure.text(0.995, 0.005, record.environment["device"], ha="right", fontsize=7, color="#6b7280")
    out = io.BytesIO()
    figure.savefig(out, dpi=DPI, format="png", metadata={"Software": "blip3o-fast"})
    return out.getvalue()


def _draw_roofline(axes: "Axes", record: Record) -> bool:
    """Every measurement of ours: rate against intensity, under the measured ceilings.

    Row ops have no flops to count and sit on the left edge, at the rate of bytes that they reach.
    """
    groups: defaultdict[str, list[Measurement]] = defaultdict(list)
    for m in record.measurements:
        if m.ours and m.group != "loader":
            groups[m.group].append(m)
    if not groups:
        return False
    low, high = ROW_INTENSITY / 2, 4e4
    colours = dict(zip(record.rates, COLOURS, strict=False))
    xs = [low * (high / low) ** (i / 200) for i in range(201)]
    for dtype, rate in record.rates.items():
        roof = [min(rate, x * record.bandwidth) / 1e9 for x in xs]
        axes.plot(xs, roof, color=colours[dtype], linewidth=1.2, label=f"limit, {dtype}")
    for (group, rows), mark in zip(groups.items(), MARKS, strict=False):
        points = [_point(m) for m in rows]
        shades = [colours[m.dtype] for m in rows]
        axes.scatter(*zip(*points, strict=True), c=shades, marker=mark, s=22)
        axes.scatter([], [], c="#1f2430", marker=mark, s=22, label=group)
    worst = sorted((m for rows in groups.values() for m in rows), key=lambda m: m.fraction)[:4]
    for m in worst:
        text = f"{m.name} {m.fraction:.0%}"
        axes.annotate(text, _point(m), (5, -7), textcoords="offset points", fontsize=6)
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    axes.set(xlabel="operations per byte that must move (row ops: left edge)", ylabel="Gop/s")
    axes.set_title("Every kernel under the ceilings of this run", fontsize=10)
    axes.legend(fontsize=7, frameon=False, ncols=2, loc="lower right")
    return True


def _point(m: Measurement) -> tuple[float, float]:
    """Intensity and rate."""
    operations = m.flops or m.bytes * ROW_INTENSITY
    return operations / m.bytes, operations / m.median / 1e9


def _draw_evaluation(axes: "Axes", record: Record) -> bool:
    rows = [m for m in record.measurements if m.group == "evaluation"]
    if not rows:
        return False
    return _draw_lines(
        axes,
        {f"{m.contender}, {m.dtype}": [] for m in rows},
        [(f"{m.contender}, {m.dtype}", m, m.median / m.batch * 1e3) for m in _one_model(rows)],
        "ms per evaluation and sample",
        "One evaluation of the velocity",
        limits=[(m.batch, m.limit / m.batch * 1e3) for m in _one_model(rows)],
    )


def _draw_speedup(axes: "Axes", record: Record) -> bool:
    rows = _one_model([m for m in record.measurements if m.group == "evaluation"])
    theirs = {m.batch: m.median for m in rows if m.contender == "published"}
    if not theirs:
        return False
    ours = [m for m in rows if m.contender != "published" and m.batch in theirs]
    values = [(f"{m.contender}, {m.dtype}", m, theirs[m.batch] / m.median) for m in ours]
    title = "Times as fast as the published implementation"
    return _draw_lines(axes, {}, values, "published / contender", title)


def _draw_memory(axes: "Axes", record: Record) -> bool:
    rows = [m for m in record.measurements if m.group == "evaluation" and m.peak is not None]
    if not rows:
        return False
    values = [(m.contender, m, (m.peak or 0) / 2**20) for m in _one_model(rows)]
    return _draw_lines(axes, {}, values, "MiB", "Memory that one evaluation allocates")


def _draw_lines(
    axes: "Axes",
    order: dict[str, list[tuple[int, float]]],
    values: list[tuple[str, Measurement, float]],
    label: str,
    title: str,
    limits: list[tuple[int, float]] | None = None,
) -> bool:
    lines = dict(order)
    for name, m, value in values:
        lines.setdefault(name, []).append((m.batch, value))
    batches = sorted({m.batch for _, m, _ in values})
    if len(batches) == 1:
        names = [name for name, points in lines.items() if points]
        heights = [lines[name][0][1] for name in names]
        bars = axes.barh(names, heights, color=COLOURS[0], height=0.6)
        axes.bar_label(bars, fmt="%.3g", fontsize=8, padding=3)
        axes.invert_yaxis()
        axes.set_xlabel(label)
        title += f", batch {batches[0]}"
    else:
        for (name, points), colour, mark in zip(lines.items(), COLOURS, MARKS, strict=False):
            axes.plot(*zip(*sorted(points), strict=True), color=colour, marker=mark, label=name)
        if limits:
            axes.plot(*zip(*sorted(set(limits)), strict=True), "--", color="#1f2430", label="limit")
        axes.set(xscale="log", yscale="log", xlabel="batch", ylabel=label)
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.minorticks_off()
        axes.legend(fontsize=7, frameon=False)
    axes.set_title(title, fontsize=10)
    return True


def _one_model(rows: list[Measurement]) -> list[Measurement]:
    """Rows of the published 256 tokens, of base where it was measured."""
    plain = [m for m in rows if re.fullmatch(r"[a-z]+-b\d+", m.shape)]
    base = [m for m in plain if m.shape.startswith("base-")]
    return base or plain
