import dataclasses
import io
import sys

import numpy as np
import pytest
from PIL import Image

from blip3o_fast.evaluation import Photo, require_plots
from blip3o_fast.evaluation.report_plots import (
    draw_plots,
    encode_image,
    encode_map,
    encode_ramp,
    lowest_colour,
    mean_map,
)
from blip3o_fast.report.style import DARK, LIGHT


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def rgb(colour):
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_every_plot_is_drawn_in_the_theme(drawn, theme):
    plots = drawn[theme]
    assert {"similarity.png", "histogram.png", "token_maps.png", "loss.png"} <= set(plots)
    for name, png in plots.items():
        image = pixels(png)
        assert tuple(image[0, 0]) == rgb(theme.page)
        assert image.shape[1] == (1600 if name == "token_maps.png" else 1000)
    for colour in (*theme.series[:2], theme.grey):
        for name in ("similarity.png", "histogram.png"):
            assert (pixels(plots[name]) == rgb(colour)).all(-1).sum() > 100, (name, colour)


def test_no_history_no_loss_plot(make_report, drawn):
    plots = draw_plots(make_report(history=(), photos=()), LIGHT)
    assert set(drawn[LIGHT]) - set(plots) == {"loss.png"}


@pytest.mark.parametrize("count", [1, 2])
def test_few_evaluation_counts_can_be_drawn(report, count):
    few = dataclasses.replace(report, dit=report.dit[:count], photos=(), history=())
    image = pixels(draw_plots(few, LIGHT)["similarity.png"])
    assert (image == rgb(LIGHT.series[0])).all(-1).sum() > 100


def test_images_are_kept_exactly(report):
    image = report.photos[0].image
    np.testing.assert_array_equal(pixels(encode_image(image)), image)


@pytest.mark.parametrize(("side", "expected"), [(511, 511), (512, 256), (900, 300)])
def test_large_images_are_shrunk(side, expected):
    ramp = np.linspace(0, 255, side).astype(np.uint8)
    image = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], np.uint8(7)), -1)
    small = pixels(encode_image(image)).astype(int)
    assert small.shape == (expected, expected, 3)
    wanted = np.linspace(0, 255, expected)
    assert np.abs(small[..., 0] - wanted[:, None]).max() <= 1.5
    assert np.abs(small[..., 1] - wanted[None]).max() <= 1.5 and (small[..., 2] == 7).all()


def test_maps_run_from_dark_to_bright():
    image = pixels(encode_map(np.array([[0.5, 0.75, 1.0], [0.4, 1.1, 0.5]]), 0.5)).astype(int)
    assert image.shape == (2, 3, 3)
    brightness = image.sum(-1)
    assert brightness[0, 0] < brightness[0, 1] < brightness[0, 2]
    np.testing.assert_array_equal(image[0, 0], image[1, 0])  # clipped below
    np.testing.assert_array_equal(image[0, 2], image[1, 1])  # clipped above
    ramp = pixels(encode_ramp()).astype(int)
    np.testing.assert_array_equal(ramp[0, 0], image[0, 0])
    np.testing.assert_array_equal(ramp[0, -1], image[0, 2])


def test_maps_share_one_scale(report, make_report):
    np.testing.assert_allclose(mean_map(report).ravel(), report.best.metrics.position_cosine)
    lowest = min(photo.cosines.min() for photo in report.photos)
    assert lowest - 0.1 < lowest_colour(report) <= lowest
    key = report.photos[0].key
    negative = make_report(photos=(Photo(key, np.full((4, 4), -0.25)),))
    assert lowest_colour(negative) == pytest.approx(-0.3)


def test_a_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install .*\[plots\]"):
        require_plots()
