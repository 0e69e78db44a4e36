"""The run's page: self-contained, complete, and right about its numbers."""

import json
import math
import re
from html.parser import HTMLParser

import pytest

from blip3o_fast.report.charts import Curve, line_chart, smoothed, thinned
from blip3o_fast.training import train
from blip3o_fast.training.run_page import render_page
from blip3o_fast.training.summary import summarise
from blip3o_fast.training.tracking import read_metrics


def record(step, **changes):
    terms = ("velocity_loss", "semantic_loss", "cosine_loss", "consistency_loss")
    values = {
        "kind": "step",
        "step": step,
        "loss": 1.0 / step,
        **dict.fromkeys(terms, 0.5),
        "grad_norm": 0.8,
        "clip_bound": 1.0,
        "skipped": False,
        "learning_rate": 1e-3,
        "loss_scale": 1.0,
        "seconds": 0.5,
        "data_wait": 0.1,
    }
    return {**values, **changes}


def test_summary_counts_and_shares():
    records = [record(i) for i in range(1, 9)]
    records += [record(9, grad_norm=3.0, clip_bound=0.5), record(10, grad_norm=None, skipped=True)]
    records.append({"kind": "validation", "step": 10, "seconds": 2.5})
    summary = summarise(records, total_steps=20, batch_size=4, seconds=9.0)
    expected = {
        "steps": 10,
        "total_steps": 20,
        "seconds": 9.0,
        "step_seconds": 0.5,
        "samples_per_second": 8.0,
        "clipped_steps": 1,
        "tightened_steps": 1,
        "skipped_steps": 1,
        "loss": 0.1,
        "validation_seconds": 2.5,
    }
    assert {name: summary[name] for name in expected} == expected
    assert summary["data_wait_seconds"] == pytest.approx(1.0)
    assert summary["data_wait_share"] == pytest.approx(0.2)
    assert summary["peak_memory_bytes"] > 2**20


def test_summary_of_nothing():
    summary = summarise([], total_steps=20, batch_size=4, seconds=0.0)
    assert (summary["steps"], summary["samples_per_second"], summary["loss"]) == (0, 0.0, None)
    plan = {"model": {"hidden_size": 16}}
    assert "not validated yet" in render_page("run", [], {**summary, "best": None}, {}, plan)


class Checker(HTMLParser):
    """Every opened element is closed, and nothing is fetched from anywhere."""

    def __init__(self):
        super().__init__()
        self.open, self.text = [], []

    def handle_starttag(self, tag, attrs):
        assert not {"src", "href", "srcset"} & dict(attrs).keys()
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_a_finished_run_has_a_page_and_a_summary(options):
    result = train(options(max_steps=12))
    page = (result.folder / "report.html").read_text()
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    text = " ".join(checker.text)
    for words in (
        "12 of 12 steps",
        "waiting for data",
        "clipped steps",
        "peak memory",
        "samples/s",
    ):
        assert words in text
    for title in ("Loss", "Similarity", "Gradient norm", "Seconds per step", "Learning rate"):
        assert any(title in piece for piece in checker.text)
    assert page.count("<svg") == 6 and "http" not in page
    assert f"{result.best.token_cosine:.4f}" in text
    summary = json.loads((result.folder / "summary.json").read_text())
    assert summary["best"] == result.best.to_dict()
    assert summary["clipped_steps"] == sum(
        r["grad_norm"] > r["clip_bound"] for r in read_metrics(result.folder) if r["kind"] == "step"
    )


def test_the_page_can_be_turned_off(options):
    assert not (train(options(report=False)).folder / "report.html").exists()


def test_names_are_escaped():
    summary = summarise([], total_steps=1, batch_size=1, seconds=0.0) | {"best": None}
    page = render_page("<b>", [], summary, {"output_dir": "<script>"}, {"model": {}})
    assert "<b>" not in page and "<script>" not in page


def test_skipped_steps_are_listed_and_long_tables_cut():
    bad = {"grad_norm": None, "skipped": True}
    records = [record(i, **(bad if i % 2 else {})) for i in range(1, 61)]
    values = dict.fromkeys(("token_cosine", "image_cosine", "mse", "loss", "samples"), 0.5)
    for i in range(1, 31):
        records.append(
            {"kind": "validation", "step": 2 * i, "above": [1, 0, 0], "seconds": 1.0, **values}
        )
    summary = summarise(records, total_steps=60, batch_size=1, seconds=60.0)
    page = render_page("run", records, summary | {"best": None}, {}, {"model": {}})
    assert "30 (50.0%): 1, 3, 5" in page and "39 and 10 more" in page
    assert "The last 20 of 30." in page and page.count("<td>1, 0, 0</td>") == 20


def test_logarithmic_ticks_are_round():
    svg = line_chart("y", [Curve("a", [(1, 0.03), (2, 40.0)])], log=True)
    labels = re.findall(r'text-anchor="end">([^<]+)<', svg)
    assert labels[:3] == ["0.1", "1", "10"]
    narrow = line_chart("y", [Curve("a", [(1, 0.9), (2, 2.2)])], log=True)
    assert re.findall(r'text-anchor="end">([^<]+)<', narrow)[:2] == ["1", "2"]


def coordinates(svg):
    return [tuple(map(float, pair)) for pair in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", svg)]


def test_curves_are_drawn_where_they_belong():
    svg = line_chart("y", [Curve("up", [(0, 0.0), (5, 5.0), (10, 10.0)])])
    line = re.search(r'class="c0" d="([^"]+)"', svg)[1]
    (x0, y0), (x1, y1), (x2, y2) = coordinates(line)
    assert x0 == 58 and x2 == 548 and x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y0 > y1 > y2 and y1 == pytest.approx((y0 + y2) / 2, abs=0.1)


def test_what_cannot_be_drawn_is_left_out():
    assert line_chart("y", [Curve("none", []), Curve("nan", [(1, math.nan)])]) == ""
    assert line_chart("y", [Curve("none", [(1, 0.0)])], log=True) == ""
    assert "h0" in line_chart("y", [Curve("one", [(1, 2.0)])])
    assert "nan" not in line_chart("y", [Curve("flat", [(1, 2.0), (2, 2.0), (3, math.inf)])])


def test_long_curves_keep_their_extremes():
    points = [(float(i), math.sin(i / 50)) for i in range(100_000)]
    points[54_321] = (54_321.0, 99.0)
    kept = thinned(points)
    assert len(kept) <= 560 and (54_321.0, 99.0) in kept
    assert kept == sorted(kept)
    smooth = smoothed(points[:20_000])
    assert len(smooth) <= 300 and smooth[-1][0] == 19_999.0
