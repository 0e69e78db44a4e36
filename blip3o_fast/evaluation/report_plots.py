"""The report's pictures, drawn with matplotlib (the ``plots`` extra).

Figures are 5 inches wide with 10-point type, so that they can be read at the width of a phone.
"""

import io
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from blip3o_fast.evaluation.report import Photo, Report, Result, token_map
from blip3o_fast.report.charts import smoothed
from blip3o_fast.report.style import METADATA, Theme, new_figure, png, require_plots, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DIT, RIDGE, FITTED, REGRESSION = 0, 1, 2, 3
"""Places of the methods among the colours of a theme; the mean predictor is grey."""

COLOUR_MAP = "viridis"

_WIDTH = 5.0
_LARGEST = 256  # pixels of a picture's short side; it is shown at half of that
_TICKS = (1, 2, 5, 10, 20, 50, 100)


def draw_plots(report: Report, theme: Theme) -> dict[str, bytes]:
    """File names and PNG contents; ``loss.png`` only where there is a history."""
    require_plots()
    drawings = {
        "similarity.png": _draw_similarity,
        "histogram.png": _draw_histogram,
        "token_maps.png": _draw_maps,
    }
    if report.history:
        drawings["loss.png"] = _draw_loss
    return {name: draw(report, theme) for name, draw in drawings.items()}


def encode_image(pixels: NDArray[np.uint8]) -> bytes:
    """PNG of ``[height, width, 3]``, shrunk by a whole factor to about ``_LARGEST`` pixels."""
    from matplotlib.image import imsave

    factor = max(1, min(pixels.shape[:2]) // _LARGEST)
    if factor > 1:
        height, width = (side // factor for side in pixels.shape[:2])
        blocks = pixels[: height * factor, : width * factor].reshape(
            height, factor, width, factor, 3
        )
        pixels = np.rint(blocks.mean((1, 3))).astype(np.uint8)
    out = io.BytesIO()
    imsave(out, pixels, format="png", metadata=METADATA)
    return out.getvalue()


def encode_map(cosines: NDArray[Any], lowest: float) -> bytes:
    """PNG of a token map ``[h, w]``, one pixel per patch, coloured from ``lowest`` to 1."""
    from matplotlib.image import imsave

    out = io.BytesIO()
    imsave(out, cosines, vmin=lowest, vmax=1.0, cmap=COLOUR_MAP, format="png", metadata=METADATA)
    return out.getvalue()


def encode_ramp() -> bytes:
    """PNG of the maps' colour scale, from lowest to highest."""
    return encode_map(np.linspace(0, 1, 256)[None], 0.0)


def lowest_colour(report: Report) -> float:
    """Lower end of the colour scale shared by all maps: their minimum rounded down to a tenth."""
    maps = [photo.cosines for photo in report.photos]
    maps.append(mean_map(report))
    lowest = min(float(values.min()) for values in maps)
    return min(np.floor(lowest * 10) / 10, 0.9)


def mean_map(report: Report) -> NDArray[Any]:
    """Token cosine at each place of the grid, averaged over the samples, of the DiT at its best."""
    return token_map(np.array(report.best.metrics.position_cosine), report.grid)


def _labelled(axes: "Axes", theme: Theme, x: str, y: str) -> None:
    axes.set(xlabel=x, ylabel=y)
    style_axes(axes, theme)


def _legend(figure: "Figure", axes: "Axes", theme: Theme) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=3, frameon=False, labelcolor=theme.text
    )


def _draw_similarity(report: Report, theme: Theme) -> bytes:
    figure = new_figure(_WIDTH, 5.6, theme)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    _draw_curve(upper, report, theme, "token_cosine")
    _draw_curve(lower, report, theme, "image_cosine")
    _labelled(upper, theme, "", "token cosine")
    _labelled(lower, theme, "network evaluations per sample", "image cosine")
    _legend(figure, upper, theme)
    return png(figure)


def _draw_curve(axes: "Axes", report: Report, theme: Theme, name: str) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    counts = [_evaluations(result) for result in report.dit]
    estimates = [getattr(result.metrics, name) for result in report.dit]
    values = [estimate.value for estimate in estimates]
    colour = theme.series[DIT]
    axes.plot(counts, values, "o-", color=colour, label="DiT", linewidth=2, markersize=4.5)
    if all(estimate.low is not None for estimate in estimates):
        lows, highs = [e.low for e in estimates], [e.high for e in estimates]
        axes.fill_between(counts, lows, highs, color=colour, alpha=0.18, linewidth=0)
    if report.fitted:
        fitted = [getattr(result.metrics, name).value for result in report.fitted]
        places = [_evaluations(result) for result in report.fitted]
        axes.plot(
            places, fitted, "D", color=theme.series[FITTED], label="fitted solver", markersize=5
        )
        counts += places
    levels = [
        (report.ridge, theme.series[RIDGE], "ridge", (0, (5, 2))),
        (report.mean, theme.grey, "mean predictor", (0, (1.5, 1.5))),
    ]
    if report.regression is not None:
        colour = theme.series[REGRESSION]
        levels.insert(0, (report.regression, colour, "regression", (0, (4, 1.5, 1, 1.5))))
    for result, colour, label, dash in levels:
        value = getattr(result.metrics, name).value
        axes.axhline(value, color=colour, label=label, linewidth=1.8, linestyle=dash)
    axes.set_xscale("log")
    axes.set_xlim(min(counts) / 1.15, max(*counts, 2) * 1.15)
    axes.xaxis.set_major_locator(FixedLocator(_TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())


def _draw_histogram(report: Report, theme: Theme) -> bytes:
    figure = new_figure(_WIDTH, 3.6, theme)
    axes = figure.subplots()
    best = report.best
    shown = (
        (report.mean, theme.grey, "mean predictor", 0.25),
        (report.ridge, theme.series[RIDGE], "ridge", 0.25),
        (best, theme.series[DIT], f"DiT, best ({best.evaluations})", 0.45),
    )
    values = [result.scores.token_cosine for result, *_ in shown]
    edges = np.histogram_bin_edges(np.concatenate(values), bins=40).tolist()
    for scores, (_, colour, label, alpha) in zip(values, shown, strict=True):
        axes.hist(scores, edges, color=colour, alpha=alpha)
        axes.hist(scores, edges, color=colour, histtype="step", linewidth=1.6, label=label)
    _labelled(axes, theme, "token cosine of a sample", "samples")
    _legend(figure, axes, theme)
    return png(figure)


def _draw_loss(report: Report, theme: Theme) -> bytes:
    figure = new_figure(_WIDTH, 3.2, theme)
    axes = figure.subplots()
    colour = theme.series[DIT]
    axes.plot(*zip(*report.history, strict=True), color=colour, alpha=0.35, linewidth=0.8)
    medians = zip(*smoothed(report.history), strict=True)
    axes.plot(*medians, color=colour, linewidth=2, label="moving median")
    _labelled(axes, theme, "training step", "training loss")
    _legend(figure, axes, theme)
    return png(figure)


def _draw_maps(report: Report, theme: Theme) -> bytes:
    """The mean map, then each photo beside its map, two photos per row."""
    panels: list[tuple[str, NDArray[Any] | None, NDArray[Any]]] = [
        ("mean of all samples", None, mean_map(report))
    ]
    panels += [(_title(photo), photo.image, photo.cosines) for photo in report.photos]
    rows = (len(panels) + 1) // 2
    figure = new_figure(8.0, 2.3 * rows + 0.5, theme)
    grid = figure.subplots(rows, 4, squeeze=False)
    lowest = lowest_colour(report)
    shown = None
    for axes in grid.flat:
        axes.set_axis_off()
    for i, (title, image, values) in enumerate(panels):
        left, right = grid[i // 2, 2 * (i % 2)], grid[i // 2, 2 * (i % 2) + 1]
        if image is not None:
            left.imshow(image)
        shown = right.imshow(values, cmap=COLOUR_MAP, vmin=lowest, vmax=1.0)
        right.set_title(title, color=theme.text, fontsize=9)
    assert shown is not None
    bar = figure.colorbar(shown, ax=grid, location="bottom", shrink=0.4, aspect=40)
    bar.set_label("token cosine", color=theme.text)
    bar.ax.tick_params(colors=theme.text)
    return png(figure)


def _title(photo: Photo) -> str:
    name = photo.key if len(photo.key) <= 24 else "..." + photo.key[-21:]
    return f"{name}\n{photo.cosines.mean():.3f}"


def _evaluations(result: Result) -> int:
    assert result.evaluations is not None
    return result.evaluations
