"""Pictures: which are drawn, and that they are pictures."""

import io
import sys

import matplotlib.image
import pytest
from benchmarking.records import measurement, record

from blip3o_fast.benchmarking.record_plots import draw_plots
from blip3o_fast.evaluation import require_plots
from blip3o_fast.report.style import number

PNG = b"\x89PNG\r\n\x1a\n"


def evaluations(*batches, published=True):
    rows = []
    for batch in batches:
        where = {"batch": batch, "shape": f"base-b{batch}", "peak": batch << 20}
        rows += [measurement("plan", 2e-3, **where)]
        if published:
            rows += [measurement("published", 2e-2, ours=False, **where)]
    return rows


def row_ops(*names):
    return [
        measurement("triton", 3e-3, group="ops", name=name, flops=0.0, warm=1e-3, batch=0)
        for name in names
    ]


def pixels(picture):
    assert picture.startswith(PNG)
    return matplotlib.image.imread(io.BytesIO(picture))


@pytest.mark.parametrize("batches", [(1,), (1, 8, 64)], ids=["bars", "lines"])
def test_every_picture(batches):
    run = record(*row_ops("rope", "swiglu backward"), *evaluations(*batches))
    pictures = draw_plots(run)
    assert list(pictures) == ["roofline.png", "evaluation.png", "speedup.png", "memory.png"]
    for picture in pictures.values():
        image = pixels(picture)
        assert image.shape[0] > 600 and image.shape[1] > 1000
        assert 0.5 < image[..., :3].mean() < 0.999


def test_without_data_there_is_no_picture():
    unknown = [measurement("plan", peak=None)]
    assert list(draw_plots(record(*unknown))) == ["roofline.png", "evaluation.png"]
    assert list(draw_plots(record(*row_ops("rope")))) == ["roofline.png"]
    theirs = measurement("published", ours=False, group="training")
    assert draw_plots(record(theirs)) == {}


def test_speed_ups_compare_the_same_dtype():
    ours = measurement("plan", dtype="bf16", peak=None)
    theirs = measurement("published", dtype="fp32", ours=False, peak=None)
    rates = {"bf16": 800e12, "fp32": 50e12}
    assert "speedup.png" not in draw_plots(record(ours, theirs, rates=rates))


def test_a_contender_that_was_timed_at_some_batches_only():
    rows = [*evaluations(1, 8, 64), measurement("torch.compile", batch=8, shape="base-b8")]
    assert pixels(draw_plots(record(*rows))["evaluation.png"]).ndim == 3


@pytest.mark.parametrize(
    ("value", "text"), [(12345.6, "12,346"), (100.0, "100"), (12.34, "12.3"), (0.005, "0.005")]
)
def test_numbers_have_no_exponent(value, text):
    assert number(value) == text


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"expected matplotlib.*\[plots\]"):
        require_plots()
