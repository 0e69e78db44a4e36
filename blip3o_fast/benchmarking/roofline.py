"""The roofline: row ops by their share of the copy bandwidth, everything else under the roofs.

Row ops have no matrix products, so they have no place on an axis of operations per byte. Each has
its own line instead.
"""

from typing import TYPE_CHECKING

from blip3o_fast.benchmarking.record import Measurement, Record
from blip3o_fast.report.style import LIGHT, MARKS, decimal_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_roofline(figure: "Figure", record: Record) -> bool:
    """Every measurement of ours, but those that a transfer from the host limits."""
    ours = [m for m in record.measurements if m.ours and not m.transfer]
    rows, products = [m for m in ours if not m.flops], [m for m in ours if m.flops]
    if not ours:
        return False
    figure.set_size_inches(7.0 + 5.0 * (bool(rows) and bool(products)), 4.8)
    panels = figure.subplots(1, bool(rows) + bool(products), squeeze=False)[0]
    if rows:
        _draw_row_ops(panels[0], rows)
    if products:
        _draw_products(panels[-1], products, record)
    figure.suptitle("Every kernel and the ceilings of this run", fontsize=10)
    return True


def _draw_row_ops(axes: "Axes", rows: list[Measurement]) -> None:
    names = list(dict.fromkeys(m.name for m in rows))
    kinds = list(dict.fromkeys((m.shape, m.dtype) for m in rows))
    contenders = list(dict.fromkeys(m.contender for m in rows))
    for i, (shape, dtype) in enumerate(kinds):
        for contender, mark in zip(contenders, MARKS, strict=False):
            points = [
                (100 * m.fraction, names.index(m.name))
                for m in rows
                if (m.shape, m.dtype, m.contender) == (shape, dtype, contender)
            ]
            label = f"{contender}, {shape}, {dtype}"
            colour = LIGHT.series[i % len(LIGHT.series)]
            if points:
                axes.scatter(
                    *zip(*points, strict=True), color=colour, marker=mark, s=24, label=label
                )
    axes.axvline(100, color=LIGHT.text, linewidth=1.2)
    axes.set_xscale("log")
    decimal_axis(axes.xaxis)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("% of the copy bandwidth")
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.12), ncols=2)


def _draw_products(axes: "Axes", products: list[Measurement], record: Record) -> None:
    places = [m.flops / m.bytes for m in products]
    ridge = max(rate / record.bandwidth for rate in record.rates.values())
    low, high = min(*places, ridge) / 3, max(*places, ridge) * 3
    xs = [low * (high / low) ** (i / 200) for i in range(201)]
    dtypes = [dtype for dtype in record.rates if any(m.dtype == dtype for m in products)]
    colours = dict(zip(dtypes, LIGHT.series, strict=False))
    for dtype in dtypes:
        roof = [min(record.rates[dtype], x * record.bandwidth) / 1e12 for x in xs]
        axes.plot(xs, roof, color=colours[dtype], linewidth=1.2, label=f"limit, {dtype}")
    groups = list(dict.fromkeys(m.group for m in products))
    for group, mark in zip(groups, MARKS, strict=False):
        here = [m for m in products if m.group == group]
        points = [(m.flops / m.bytes, m.flops / m.median / 1e12) for m in here]
        shades = [colours[m.dtype] for m in here]
        axes.scatter(*zip(*points, strict=True), c=shades, marker=mark, s=24)
        axes.scatter([], [], c=LIGHT.text, marker=mark, s=24, label=group)
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    decimal_axis(axes.xaxis)
    decimal_axis(axes.yaxis)
    axes.set(xlabel="flops per byte that must move", ylabel="TFLOP/s")
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.12), ncols=4)
