"""Colours, and what all pictures drawn with matplotlib (the ``plots`` extra) have in common.

A page cannot recolour a picture when the reader's screen is dark, so there are two themes.
"""

import io
from typing import TYPE_CHECKING, NamedTuple

from blip3o_fast.installation import install

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure


class Theme(NamedTuple):
    """Colours of one rendering.

    Attributes:
        page, card: backgrounds.
        line: rules and grids.
        text, quiet: letters.
        good, bad: verdicts.
        grey: what is compared with.
        series: curves, in this order.
    """

    page: str
    card: str
    line: str
    text: str
    quiet: str
    good: str
    bad: str
    grey: str
    series: tuple[str, ...]


LIGHT = Theme(
    *("#ffffff", "#f5f6f9", "#d9dde5", "#1f2430", "#5a6272", "#17753a", "#b3261e", "#6b7280"),
    series=(
        *("#1d5fd1", "#c2570c", "#2b8a3e", "#862e9c", "#6b7280"),
        *("#c92a2a", "#087f5b", "#5f3dc4", "#e67700", "#0b7285"),
    ),
)
DARK = Theme(
    *("#1a1e26", "#232833", "#39404d", "#dfe3ea", "#a2abba", "#6fd08c", "#ff8a80", "#a2abba"),
    series=("#7db0ff", "#ff9f5a", "#5bd39b", "#c79bf2", "#a2abba"),
)
MARKS = "osD^vPX*<>"

METADATA = {"Software": "blip3o-fast"}  # without a version, so that equal reports are equal bytes


def require_plots() -> None:
    """Raise ``ImportError`` if matplotlib is missing; for before long work that ends in plots."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"plots: expected matplotlib, which is not installed: {install('plots')}; or turn "
            "plots off (--no_plots)"
        ) from error


def new_figure(width: float, height: float, theme: Theme = LIGHT, *, dpi: int = 200) -> "Figure":
    """A figure of so many inches on a canvas of its own."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, facecolor=theme.page, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def style_axes(axes: "Axes", theme: Theme = LIGHT) -> None:
    """Two spines, a grid behind the curves, and the theme's colours."""
    axes.set_facecolor(theme.page)
    axes.xaxis.label.set_color(theme.text)
    axes.yaxis.label.set_color(theme.text)
    axes.tick_params(colors=theme.text, which="both", length=3)
    axes.grid(True, color=theme.line, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.line)


def png(figure: "Figure") -> bytes:
    """The finished picture."""
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata=METADATA)
    return out.getvalue()


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
