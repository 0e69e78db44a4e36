"""The report as one HTML page: no script, no request to anywhere, pictures inside.

The reader's screen decides between light and dark, and between one column and two.
"""

import base64
from collections.abc import Mapping
from html import escape
from typing import Any

from numpy.typing import NDArray

from blip3o_fast.evaluation.glossary import METRICS, constant_sentence, sampling_paragraphs
from blip3o_fast.evaluation.page_tables import comparison_section, details_section, facts_section
from blip3o_fast.evaluation.plots import (
    encode_image,
    encode_map,
    encode_ramp,
    lowest_colour,
    mean_map,
)
from blip3o_fast.evaluation.report import Photo, Report, Result
from blip3o_fast.evaluation.stylesheet import STYLESHEET

_PLOTS = (
    (
        "similarity.png",
        "Similarity against evaluations",
        "Token and image cosine against the number of network evaluations, logarithmic axis. The "
        "band is the bootstrap interval; the lines are the baselines.",
    ),
    (
        "histogram.png",
        "Spread over samples",
        "How many samples have which token cosine, for the DiT at its best number of evaluations "
        "and for both baselines.",
    ),
    (
        "loss.png",
        "Training loss",
        "Loss at each logged step, with its moving median. Its floor is not zero: noise and image "
        "cannot both be known.",
    ),
)


def render_page(report: Report, light: Mapping[str, bytes], dark: Mapping[str, bytes]) -> str:
    """The page's HTML.

    Args:
        report: what to show.
        light, dark: PNG contents by file name, as ``draw_plots`` gives them; empty for no pictures.
    """
    body = "\n".join(
        (
            _header(report),
            _tiles(report),
            comparison_section(report),
            _plot_section(light, dark),
            _photo_section(report) if light else "",
            _reading_section(report),
            details_section(report),
            facts_section(report),
        )
    )
    title = escape(report.title)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{title}</title>\n'
        f"<style>{STYLESHEET}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _header(report: Report) -> str:
    verdict = report.verdict
    kind = "wins" if verdict.beats_ridge and verdict.clear else "loses"
    if verdict.beats_ridge and not verdict.clear:
        kind = "close"
    return (
        f"<h1>{escape(report.title)}</h1>\n"
        f'<p class="verdict {kind}">{escape(verdict.sentence)}</p>\n'
        f"<p>{constant_sentence(report)}</p>"
    )


def _tiles(report: Report) -> str:
    best = report.best
    tiles = (
        (
            "DiT, best",
            f"{best.evaluations} eval{'' if best.evaluations == 1 else 's'}",
            "dit",
            best,
        ),
        ("Ridge", "linear map", "ridge", report.ridge),
        ("Mean", "ignores the image", "mean", report.mean),
    )
    return '<div class="tiles">' + "".join(_tile(*tile) for tile in tiles) + "</div>"


def _tile(name: str, note: str, kind: str, result: Result) -> str:
    estimate = result.metrics.token_cosine
    interval = "" if estimate.low is None else f"{estimate.low:.3f} to {estimate.high:.3f}"
    return (
        f'<div class="tile {kind}"><div class="name">{name}</div>'
        f'<div class="value">{estimate.value:.3f}</div>'
        f'<div class="note">token cosine<br>{interval}<br>{note}</div></div>'
    )


def _plot_section(light: Mapping[str, bytes], dark: Mapping[str, bytes]) -> str:
    if not light:
        return "<h2>Plots</h2>\n<p>This report was written without plots.</p>"
    figures = [
        f"<figure><h3>{heading}</h3>{_picture(light[name], dark[name], heading)}"
        f"<figcaption>{caption}</figcaption></figure>"
        for name, heading, caption in _PLOTS
        if name in light
    ]
    return f'<h2>Plots</h2>\n<div class="plots">{"".join(figures)}</div>'


def _picture(light: bytes, dark: bytes, alt: str) -> str:
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{_data(dark)}">'
        f'<img src="{_data(light)}" alt="{escape(alt)}"></picture>'
    )


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _photo_section(report: Report) -> str:
    lowest = lowest_colour(report)
    figures = "".join(_photo(photo, report, lowest) for photo in report.photos)
    ramp = (
        f'<div class="ramp"><span>{lowest:.1f}</span>'
        f'<img src="{_data(encode_ramp())}" alt="colour scale of the maps"><span>1.0</span></div>'
    )
    return (
        "<h2>Where on the image</h2>\n<p>Token cosine of the DiT, at its best number of "
        "evaluations, at each place of the patch grid. Bright is good; all maps share one "
        "scale.</p>"
        f'\n{ramp}\n<div class="photos">{_average(report, lowest)}{figures}</div>'
    )


def _average(report: Report, lowest: float) -> str:
    samples = report.best.metrics.samples
    note = f"<div>Average over all {samples} samples: places easy or hard everywhere.</div>"
    return f"<figure>{_pair(_map(mean_map(report), lowest), note, report)}</figure>"


def _photo(photo: Photo, report: Report, lowest: float) -> str:
    scores = report.best.scores
    i = scores.keys.index(photo.key)
    rank = int((scores.token_cosine > scores.token_cosine[i]).sum()) + 1
    ridge = report.ridge.scores.token_cosine[i]
    caption = (
        f"{_breakable(photo.key)}<br><b>{scores.token_cosine[i]:.3f}</b> (ridge {ridge:.3f}), "
        f"rank {rank} of {len(scores.keys)}"
    )
    image = "<div>no picture</div>"
    if photo.image is not None:
        image = f'<img src="{_data(encode_image(photo.image))}" alt="{escape(photo.key)}">'
    pair = _pair(image, _map(photo.cosines, lowest), report)
    return f"<figure>{pair}<figcaption>{caption}</figcaption></figure>"


def _pair(left: str, right: str, report: Report) -> str:
    _, height, width = report.grid
    return f'<div class="pair" style="--shape: {width} / {height}">{left}{right}</div>'


def _map(values: NDArray[Any], lowest: float) -> str:
    pixels = _data(encode_map(values, lowest))
    return f'<img class="map" src="{pixels}" alt="token cosine on the patch grid">'


def _breakable(key: str) -> str:
    """A key that may wrap after its separators on a narrow screen."""
    return escape(key).replace("/", "/<wbr>").replace("_", "_<wbr>")


def _reading_section(report: Report) -> str:
    terms = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in METRICS)
    why, measured = sampling_paragraphs(report)
    return (
        "<h2>Few evaluations or many?</h2>\n"
        f"<p>{why}</p>\n<p>{measured}</p>\n"
        f"<h2>How to read the numbers</h2>\n<dl>{terms}</dl>"
    )
