"""What the pictures have in common."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axis import Axis

MARKS = "osD^vPX*<>"
COLOURS = (
    *("#1d5fd1", "#c2570c", "#2b8a3e", "#862e9c", "#c92a2a"),
    *("#087f5b", "#5f3dc4", "#6b7280", "#e67700", "#0b7285"),
)
INK, GREY, GRID = "#1f2430", "#6b7280", "#d9dde5"


def decimal_axis(axis: "Axis") -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5 times powers of ten, written as numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axis.set_minor_locator(NullLocator())


def number(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
