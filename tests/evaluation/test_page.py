import base64
import dataclasses
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from blip3o_fast.evaluation import MetricAccumulator, Photo, Result
from blip3o_fast.evaluation.page import render_page
from blip3o_fast.evaluation.plots import DARK, LIGHT
from blip3o_fast.evaluation.table import comparison_rows

VOID = {"meta", "img", "br", "source", "wbr"}


class Checker(HTMLParser):
    """Collects text and attributes, and fails on a tag that is not closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text, self.links = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.links += [value for name, value in attrs if name in ("src", "srcset", "href")]
        assert tag != "img" or dict(attrs)["alt"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def check(html):
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    return checker, " ".join("".join(checker.text).split())


@pytest.fixture(scope="module")
def html(report, drawn):
    return render_page(report, drawn[LIGHT], drawn[DARK])


def test_the_page_is_balanced_and_self_contained(html):
    checker, _ = check(html)
    assert html.isascii()
    assert "http" not in html
    assert "script" not in checker.tags
    assert all(link.startswith("data:image/png;base64,") for link in checker.links)
    for link in checker.links:
        Image.open(io.BytesIO(base64.b64decode(link.partition(",")[2]))).verify()
    # Three plots in two themes, the scale, the average map, and two photos, one without a picture.
    assert len(checker.links) == 3 * 2 + 1 + 1 + 2 + 1


def test_the_page_suits_phones_and_dark_screens(html):
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    assert "@media (prefers-color-scheme: dark)" in html
    assert html.count('<source media="(prefers-color-scheme: dark)"') == 3


def test_the_page_holds_the_numbers(report, html):
    _, text = check(html)
    for row in comparison_rows(report):
        assert row.method in text
        for cell in row.cells:
            assert cell.replace(",", ", ") in text
    for metrics in (report.mean.metrics, report.ridge.metrics, report.best.metrics):
        for estimate in (
            *metrics.recall_target_to_generated.values(),
            *metrics.image_cosine_above.values(),
        ):
            assert f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]" in text
        assert f"{metrics.quantiles['image_cosine'][0.05]:.3f}" in text
    assert report.verdict.sentence in text
    assert "strength1e-3" in text.replace(" ", "")


def test_every_metric_is_explained(html):
    """Each column of the comparison has an entry below it."""
    columns = re.findall(r'<th scope="col">(.*?)</th>', html[: html.index("</thead>")])
    entries = " ".join(re.findall(r"<dt>(.*?)</dt>", html)).lower().replace("r@k", "r@1")
    assert columns[0] == "method" and len(columns) == 8
    assert [name for name in columns[1:] if name.lower() not in entries] == []


def test_the_curve_is_told_in_numbers(report, html):
    _, text = check(html)
    scores = {result.evaluations: result.metrics.token_cosine.value for result in report.dit}
    first, last, best = min(scores), max(scores), max(scores, key=scores.get)

    def told(evaluations):
        count = "1 evaluation" if evaluations == 1 else f"{evaluations} evaluations"
        return f"{scores[evaluations]:.3f} with {count}"

    expected = f"token cosine {told(first)} and {told(last)}; the best was {told(best)}."
    assert expected in text


def test_photos_show_their_rank(report, html):
    _, text = check(html)
    scores = report.best.scores
    for photo in report.photos:
        i = scores.keys.index(photo.key)
        rank = sorted(scores.token_cosine, reverse=True).index(scores.token_cosine[i]) + 1
        ridge = report.ridge.scores.token_cosine[i]
        assert f"{scores.token_cosine[i]:.3f} (ridge {ridge:.3f}), rank {rank} of 24" in text


@pytest.mark.parametrize(
    ("noise", "kind", "sentence"),
    [(0.3, "wins", "The DiT beats ridge"), (0.9, "loses", "The DiT does not beat ridge")],
)
def test_the_page_says_who_wins(make_report, noise, kind, sentence):
    html = render_page(make_report(best_noise=noise), {}, {})
    assert f'<p class="verdict {kind}">{sentence}' in html


def test_text_from_outside_is_escaped(report):
    title = 'A < B & "C" <script>alert(1)</script>'
    facts = {"<b>name": "</dd><script>"}
    changed = dataclasses.replace(report, title=title, facts=facts)
    html = render_page(changed, {}, {})
    checker, text = check(html)
    assert "script" not in checker.tags
    assert title in text
    assert "</dd><script>" in text


def test_keys_are_escaped(report, drawn):
    key = '"><script>x'

    def renamed(result):
        keys = (key, *result.scores.keys[1:])
        return dataclasses.replace(result, scores=dataclasses.replace(result.scores, keys=keys))

    changed = dataclasses.replace(
        report,
        mean=renamed(report.mean),
        ridge=renamed(report.ridge),
        dit=tuple(renamed(result) for result in report.dit),
        photos=(Photo(key, np.zeros((4, 4)), np.zeros((4, 4, 3), np.uint8)),),
    )
    checker, text = check(render_page(changed, drawn[LIGHT], drawn[DARK]))
    assert "script" not in checker.tags
    assert key in text


def test_a_page_without_plots_says_so(report):
    checker, text = check(render_page(report, {}, {}))
    assert "img" not in checker.tags
    assert "This report was written without plots." in text


def test_one_setting_is_told_as_one(report):
    _, text = check(render_page(dataclasses.replace(report, dit=report.dit[:1]), {}, {}))
    assert "Only one setting was measured: 1 evaluation," in text


def test_cls_has_a_table_where_there_is_one(report):
    assert "CLS token" not in render_page(report, {}, {})
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(6, 17, 5, generator=generator)

    def result(noise, evaluations=None):
        accumulator = MetricAccumulator(torch.zeros(17, 5), has_cls=True)
        generated = target + noise * torch.randn(6, 17, 5, generator=generator)
        accumulator.add(generated, target, list("abcdef"))
        return Result(accumulator.finish(bootstrap=50), accumulator.scores(), evaluations)

    fields = {"mean": result(2.0), "ridge": result(1.0), "dit": (result(0.5, 1),), "photos": ()}
    changed = dataclasses.replace(report, **fields)
    html = render_page(changed, {}, {})
    check(html)
    table = html[html.index("<summary>CLS token</summary>") :]
    cls = fields["dit"][0].metrics.cls
    assert f"<td>{cls.cosine.value:.3f} <small>" in table
    assert re.search(r"Centred cosine</th><td>" + f"{cls.centred_cosine.value:.3f}", table)
